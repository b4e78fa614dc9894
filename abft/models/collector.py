"""The output and the mass of an attention layer, and the collector that decides which of them are computed.

A `MassCollector` passed as `mass_collector` to `model(...)` takes the masses layer by layer in place of
`outputs.attentions`, and leaves out of each layer what nothing asks for (see `abft.models.masses`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from abft.models.bounds import Bounds
from abft.models.context_parallel import ContextParallel
from abft.models.momentum import add_momentum
from abft_kernels import attention, mass_attention, row_mass

__all__ = ["Layer", "MassCollector", "MassRequest", "StopForward"]


class StopForward(Exception):
    """Ends a forward pass after the last layer's mass: nothing after it is wanted."""


class MassRequest(NamedTuple):
    """The masses that a pass is asked for, under the names of the keywords of `model(...)`.

    Args:
        key_groups: `(B, N)`: −1 for no group, else 0 … `num_key_groups` − 1.
        num_key_groups: G.
        query_positions: `(B, R)` rows; None for all.
    """

    key_groups: Tensor
    num_key_groups: int = 2
    query_positions: Tensor | None = None

    def contiguous(self) -> MassRequest:
        """Return the request in the layout that the kernels take: once a pass, not in every layer."""
        rows = None if self.query_positions is None else self.query_positions.contiguous()
        return self._replace(key_groups=self.key_groups.contiguous(), query_positions=rows)

    def without_first(self, dropped: int) -> MassRequest:
        """Return the request for keys of which a cache has dropped the first."""
        if not dropped:
            return self
        rows = None if self.query_positions is None else self.query_positions - dropped
        return self._replace(key_groups=self.key_groups[:, dropped:], query_positions=rows)


class Layer(NamedTuple):
    """One attention layer: its heads after rotary embeddings, and what else decides its output and its mass.

    Args:
        query: `(B, H, N, D)`.
        key: `(B, H_kv, N_k, D)`.
        value: `(B, H_kv, N_k, D_v)`.
        bounds: the keys that each row sees.
        scores: keywords of the kernels: `scale`, `softcap`, `sinks` and `backend`.
        dropout: on the probabilities that make the output.
        momentum: η of momentum attention.
        context: the keys are spread over processes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bounds: Bounds
    scores: dict[str, Any]
    dropout: float = 0.0
    momentum: float | None = None
    context: ContextParallel | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return the keywords of the kernels that output and mass share."""
        return {**self.bounds.keywords(), **self.scores}

    def output(self) -> Tensor:
        """Return the attention output `(B, H, N, D_v)`."""
        attend = attention if self.context is None else self.context.attention
        return self._plus_momentum(attend(self.query, self.key, self.value, dropout_p=self.dropout, **self.options))

    def mass(self, request: MassRequest) -> Tensor:
        """Return the mass `(B, H, R, G)`, without the output."""
        if self.context is not None:
            return self.context.mass(self.query, self.key, *request, self.options)
        groups, num_groups, positions = request
        mass = row_mass(
            self.query, self.key, groups, num_groups, row_positions=positions, all_queries=True, **self.options
        )
        assert isinstance(mass, Tensor)
        return mass

    def output_and_mass(self, request: MassRequest) -> tuple[Tensor, Tensor]:
        """Return both, of one kernel where that is faster."""
        if self.context is not None:
            mass = self.mass(request)  # before the output: all processes communicate in one order
            return self.output(), mass
        groups, num_groups, positions = request
        out, mass = mass_attention(
            self.query,
            self.key,
            self.value,
            groups,
            num_groups,
            row_positions=positions,
            dropout_p=self.dropout,
            **self.options,
        )
        return self._plus_momentum(out), mass

    def zeros(self) -> Tensor:
        """Return an output of zeros."""
        return self.query.new_zeros(*self.query.shape[:3], self.value.shape[-1])

    def detached(self) -> Layer:
        """Return the layer without gradient."""
        return self._replace(query=self.query.detach(), key=self.key.detach(), value=self.value.detach())

    def _plus_momentum(self, out: Tensor) -> Tensor:
        return out if self.momentum is None else add_momentum(out, self.value, self.momentum, self.bounds)


class MassCollector:
    """Takes the masses of a forward pass, layer by layer, in place of `outputs.attentions`.

    Args:
        num_layers: attention layers of the model.
        stop: raise `StopForward` at the last layer's mass, before its attention output.
        detach: attention outputs carry no gradient, so that each mass reaches its own layer's W_Q and W_K alone.
        on_mass: called with each mass as it comes; what it returns is kept in the mass's place.
        context: the keys are spread over processes.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        stop: bool = False,
        detach: bool = False,
        on_mass: Callable[[Tensor], Tensor] | None = None,
        context: ContextParallel | None = None,
    ) -> None:
        self.num_layers, self.stop, self.detach, self.on_mass = num_layers, stop, detach, on_mass
        self.context = context
        self.masses: list[Tensor] = []
        self.closed = False  # layers that checkpointing runs again in the backward pass add nothing
        self._last: nn.Module | None = None

    def collect(self, module: nn.Module, layer: Layer, request: MassRequest) -> Tensor:
        """Keep the layer's mass and return its output `(B, H, N, D_v)`; zeros for the last layer's.

        Raises:
            StopForward: this is the last layer, and the collector stops there.
        """
        last = self._is_last(module)
        if not last and not self.detach:
            out, mass = layer.output_and_mass(request)
            self._add(mass)
            return out
        self._add(layer.mass(request))
        if last and self.stop:
            raise StopForward
        return layer.zeros() if last else layer.detached().output()

    def _is_last(self, module: nn.Module) -> bool:
        """Return True for the last layer's attention, in the forward pass and when it is run again."""
        if not self.closed and len(self.masses) == self.num_layers - 1:
            self._last = module
        return module is self._last

    def _add(self, mass: Tensor) -> None:
        if not self.closed:
            self.masses.append(mass if self.on_mass is None else self.on_mass(mass))
