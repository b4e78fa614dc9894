"""The outputs of W_Q in a pass: the query vectors of every token and layer, all heads side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.models.projections import attention_modules, find_parts

__all__ = ["QueryVectors"]


class QueryVectors:
    """Reads the query vectors of a pass, before normalisation and rotary positions, times the scale of the scores.

    Without rotary positions the inner product of two of them does not depend on where their tokens stand.

    Args:
        model: causal language model with W_Q in projections of a known form.

    Raises:
        ValueError: as :func:`find_parts`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        names = {part.name.rpartition(".")[0]: part for part in find_parts(model, ("q",))}
        self._layers = [
            (module, _scale(attention), None if part.dim is None else replace(part, dim=2))
            for (name, part), attention in zip(names.items(), attention_modules(model), strict=True)
            for module in [model.get_submodule(name)]
        ]
        self._found: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the vectors of the passes inside the block; those of the last pass remain."""
        handles = [module.register_forward_hook(self._keep) for module, _, _ in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._found[module] = output.detach()

    def vectors(self) -> Tensor:
        """Return the vectors of the last pass, `(L, B, N, width)` float32."""
        layers = []
        for module, scale, part in self._layers:
            output = self._found[module].float()
            layers.append((output if part is None else part.view(output).flatten(2)) * scale)
        return torch.stack(layers)


def _scale(attention: Any) -> float:
    """Return the scale of the layer's scores."""
    return float(getattr(attention, "scaling", None) or attention.head_dim**-0.5)
