"""The Hugging Face adapter: attention masses out of any decoder that goes through transformers' attention interface.

One name, `"abft"`, is registered for the attention and for its mask; nothing is patched. The mask becomes `Bounds`:
first token and number of tokens of each sample, window, packed sequences; so no N × N tensor exists. Keyword arguments
of `model(...)` reach the attention function, and what it returns as weights comes back as `outputs.attentions`:

    model = enable(model)
    outputs = model(input_ids, attention_mask=…, key_groups=…, query_positions=…, output_attentions=True)
    outputs.attentions[layer]          # mass (B, H, R, G), differentiable

A `MassCollector` passed as `mass_collector` takes the masses as they come instead (see `abft.models.masses`). With or
without masses, `momentum` adds an exponential sum of earlier values (see `abft.models.momentum`), and `attention_probe`
is shown what each layer's attention gets. This is the only file that knows transformers' internals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from abft.models.context_parallel import ContextParallel
from abft.models.momentum import add_momentum, check_momentum
from abft_kernels import attention, gather_rows, mass_attention, row_mass

__all__ = ["ATTENTION", "AttentionProbe", "Bounds", "MassCollector", "StopForward", "enable", "is_enabled"]

ATTENTION = "abft"
AttentionProbe = Callable[[nn.Module, Tensor, Tensor, Tensor, float], None]
_Model = TypeVar("_Model", bound=nn.Module)

# Arguments that change the scores in ways the kernels do not compute: silence would give wrong masses.
_UNSUPPORTED = {
    "position_bias": "an additive position bias",
    "alibi": "an additive position bias",
    "head_mask": "a head mask",
    "indices": "a choice of keys of its own",
    "block_indices": "a choice of keys of its own",
    "cache": "a paged cache",
}
# Tensors that models hand down beside these, and that leave the scores as they are.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "num_items_in_batch", "labels", "input_ids",
             "inputs_embeds", "logits_to_keep", "mm_token_type_ids", "token_type_ids", "cu_seq_lens_k"}  # fmt: skip

# What the kernels compute.
_SERVED = {"s_aux", "sinks", "cu_seq_lens_q"}


def _unsupported(module: nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} uses {what}, which the 'abft' attention does not compute; "
        "use attn_implementation='sdpa' or 'eager' for this model"
    )


class StopForward(Exception):
    """Ends a forward pass at the last layer's scores: nothing behind them is wanted."""


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

    def is_last(self, module: nn.Module) -> bool:
        """Whether `module` is the last layer's attention, in the forward pass and when it is run again."""
        if not self.closed and len(self.masses) == self.num_layers - 1:
            self._last = module
        return module is self._last

    def add(self, mass: Tensor) -> None:
        if not self.closed:
            self.masses.append(mass if self.on_mass is None else self.on_mass(mass))


class Bounds(NamedTuple):
    """What `_mask` hands to the attention of each layer in place of an N × N mask; always a causal one."""

    seq_lens: Tensor | None = None  # (B,) int32
    seq_starts: Tensor | None = None  # (B,) int32
    cu_seqlens: Tensor | None = None  # (S + 1,) int32, packed sequences in a batch of one
    window: int | None = None
    dropped: int = 0  # keys that a cache of a sliding-window layer has let go
    served: bool = True  # False: another mask, which a layer may not use


def _bounds(module: nn.Module, attention_mask: Any, kwargs: dict[str, Any], n_k: int) -> Bounds | None:
    """What the mask and the arguments say together."""
    if attention_mask is not None and not isinstance(attention_mask, Bounds):
        raise _unsupported(module, f"an attention mask of its own, of shape {tuple(attention_mask.shape)}")
    if attention_mask is not None and not attention_mask.served:
        raise NotImplementedError(_NOT_PLAIN)
    cu_seqlens, window = kwargs.get("cu_seq_lens_q"), kwargs.get("sliding_window")
    bounds = attention_mask
    if cu_seqlens is not None:
        if bounds is not None and bounds.seq_lens is not None:
            raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other; pass one of them")
        bounds = (bounds or Bounds())._replace(cu_seqlens=cu_seqlens)
    in_mask = None if bounds is None else bounds.window
    packed = bounds is not None and bounds.cu_seqlens is not None
    if window is not None and window < n_k and window != in_mask:
        if not packed or in_mask is not None:
            raise _unsupported(module, f"a sliding window of {window} tokens over {n_k} keys that its mask lacks")
        assert bounds is not None  # sequences shorter than the window need none in the mask
        bounds = bounds._replace(window=window)
    return bounds


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    key_groups: Tensor | None = None,
    num_key_groups: int = 2,
    query_positions: Tensor | None = None,
    attention_backend: str = "auto",
    mass_collector: MassCollector | None = None,
    momentum: float | None = None,
    attention_probe: AttentionProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, N, H, D)` and mass `(B, H, R, G)`; without `key_groups`, or with a collector, None for the mass.

    `momentum` is η, between 0 and 1, of momentum attention. The probe is called with the module, query `(B, H, N, D)`,
    key and value `(B, H_kv, N, D)`, all after rotary embeddings, and the scale of the scores; again when checkpointing
    runs a layer again.
    """
    if momentum is not None:
        check_momentum(momentum)
    for name, argument in kwargs.items():
        if argument is not None and name in _UNSUPPORTED:
            raise _unsupported(module, _UNSUPPORTED[name])
        if isinstance(argument, Tensor) and name not in _HARMLESS and name not in _SERVED:
            raise _unsupported(module, f"an argument {name!r} that is not known here")
    of_its_own = getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(
        module, "scale_attn_weights", True
    )
    if scaling is None and of_its_own:
        raise _unsupported(module, "a scale of the scores that it does not pass on")
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave q and k in float32, v in 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds = _bounds(module, attention_mask, kwargs, key.shape[2])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sinks = kwargs.get("s_aux", kwargs.get("sinks"))
    shared: dict[str, Any] = {
        "causal": causal or bounds is not None,  # bounds come from `_mask` alone
        "scale": scaling, "dropout_p": dropout, "softcap": kwargs.get("softcap"), "backend": attention_backend,
        "sinks": None if sinks is None else sinks.reshape(-1),
    }  # fmt: skip
    if bounds is not None:
        shared |= {name: getattr(bounds, name) for name in ("seq_lens", "seq_starts", "cu_seqlens", "window")}
    if momentum is not None:
        _check_momentum_served(module, shared["causal"], bounds, mass_collector)
    if attention_probe is not None:
        attention_probe(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if key_groups is None:
        out = attention(query, key, value, **shared)
        return _with_momentum(out, value, momentum, shared).transpose(1, 2).contiguous(), None
    if not shared["causal"]:
        raise _unsupported(module, "bidirectional or cross attention")
    if bounds is not None and bounds.dropped:
        key_groups = key_groups[:, bounds.dropped :]
        query_positions = None if query_positions is None else query_positions - bounds.dropped
    if query_positions is not None and query_positions.shape[1] == query.shape[2] == 1:
        query_positions = None  # decoding: the only row there is
    if mass_collector is not None:
        last = mass_collector.is_last(module)
        if mass_collector.context is not None:
            # The mask was made of this process's tokens; a window reaches over the whole context.
            if bounds is not None and (bounds.seq_lens is not None or bounds.cu_seqlens is not None):
                raise _unsupported(module, "padding or packed prompts in a context spread over processes")
            shared |= {"window": kwargs.get("sliding_window")}
        out = _collected(
            mass_collector, last, query, key, value, key_groups, num_key_groups, query_positions, shared, momentum
        )
        return out, None
    out, mass = mass_attention(query, key, value, key_groups, num_key_groups, row_positions=query_positions, **shared)
    return _with_momentum(out, value, momentum, shared).transpose(1, 2).contiguous(), mass


def _check_momentum_served(
    module: nn.Module, causal: bool, bounds: Bounds | None, collector: MassCollector | None
) -> None:
    if not causal:
        raise _unsupported(module, "momentum in bidirectional or cross attention")
    if bounds is not None and bounds.dropped:
        raise _unsupported(module, "momentum over a cache that has let go of earlier values")
    if collector is not None and collector.context is not None:
        raise _unsupported(module, "momentum in a context spread over processes")


def _with_momentum(out: Tensor, value: Tensor, momentum: float | None, shared: dict[str, Any]) -> Tensor:
    if momentum is None:
        return out
    bounds = {name: shared.get(name) for name in ("seq_lens", "seq_starts", "cu_seqlens")}
    return add_momentum(out, value, momentum, **bounds)


def _collected(
    collector: MassCollector, last: bool, query: Tensor, key: Tensor, value: Tensor, key_groups: Tensor,
    num_key_groups: int, query_positions: Tensor | None, shared: dict[str, Any], momentum: float | None,
) -> Tensor:  # fmt: skip
    """Hands the mass to the collector; the attention output `(B, N, H, D)`, made only where something follows it."""
    context = collector.context
    alone: dict[str, Any] = {name: value for name, value in shared.items() if name != "dropout_p"}
    if context is not None:
        assert query_positions is not None
        collector.add(context.mass(query, key, key_groups, num_key_groups, query_positions, alone))
        if last and collector.stop:
            raise StopForward
        if collector.detach:
            query, key, value = query.detach(), key.detach(), value.detach()
        out = context.attention(query, key, value, shared)
    elif last or collector.detach:
        rows = query
        if query_positions is not None:
            first = key.shape[2] - query.shape[2]
            rows = gather_rows(query, query_positions, first)
            alone["row_positions"] = query_positions
        mass = row_mass(rows, key, key_groups, num_key_groups, **alone)
        assert isinstance(mass, Tensor)
        collector.add(mass)
        if last and collector.stop:
            raise StopForward
        if last:
            out = query.new_zeros(*query.shape[:3], value.shape[-1])  # nothing that depends on it is used
        else:
            value = value.detach()
            out = _with_momentum(attention(query.detach(), key.detach(), value, **shared), value, momentum, shared)
    else:
        out, mass = mass_attention(
            query, key, value, key_groups, num_key_groups, row_positions=query_positions, **shared
        )
        collector.add(mass)
        out = _with_momentum(out, value, momentum, shared)
    return out.transpose(1, 2).contiguous()


_NOT_PLAIN = (
    "the 'abft' attention serves causal masks with padding, a sliding window or packed sequences; this model or batch "
    "asks for another one (chunks, bidirectional blocks, several samples packed by position_ids). Pass an "
    "attention_mask to have position_ids taken as padding, or use attn_implementation='sdpa'"
)


def _agrees(
    mask_function: Any, sample: int, rows: Tensor, row_starts: Tensor | int, start: int, end: int, window: int | None
) -> bool:
    """Whether each of `rows` sees the keys from its start, and within the window, up to itself, and no others.

    Looks at O(N) of the N² entries, enough for every mask that is made of windows, chunks, blocks, prefixes and packed
    sequences: all keys of the first and the last row, and of each row the ends of what it sees and their neighbours,
    the middle, and the first and the last key.
    """
    if rows.numel() == 0 or start >= end:
        return True
    starts = torch.as_tensor(row_starts, device=rows.device).expand(rows.shape)
    keys = torch.arange(start, end, device=rows.device)
    probes = [(row.expand(keys.shape), first.expand(keys.shape), keys)
              for row, first in ((rows[0], starts[0]), (rows[-1], starts[-1]))]  # fmt: skip
    wanted = [starts, starts - 1, (rows + starts) // 2, rows, rows + 1]
    wanted += [torch.full_like(rows, key) for key in (start, end - 1)]
    if window is not None:
        wanted += [rows - window, rows - window + 1]
    probes += [(rows, starts, k.clamp(start, end - 1)) for k in wanted]
    batch, head = torch.tensor(sample, device=rows.device), torch.tensor(0, device=rows.device)
    for r, first, k in probes:
        seen = torch.as_tensor(mask_function(batch, head, r, k), device=rows.device).expand(r.shape)
        expected = (k >= first) & (k <= r)
        if window is not None:
            expected &= k > r - window
        if not torch.equal(seen, expected):
            return False
    return True


def _packed(mask_function: Any, length: int, window: int | None, device: Any) -> Tensor | None:
    """`cu_seqlens` of the packed sequences that the mask tells apart; None if it is another mask."""
    rows = torch.arange(length, device=device)
    zero = torch.tensor(0, device=device)
    sees_previous = torch.as_tensor(mask_function(zero, zero, rows[1:], rows[:-1]), device=device)
    firsts = torch.cat([rows[:1], rows[1:][~sees_previous.expand(length - 1)]])
    row_starts = firsts[torch.searchsorted(firsts, rows, right=True) - 1]
    if not _agrees(mask_function, 0, rows, row_starts, 0, length, window):
        return None
    return torch.cat([firsts, firsts.new_tensor([length])]).to(torch.int32)


def _mask(
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> Bounds | None:
    """The mask as `Bounds`; None if it is plainly causal.

    A mask that the kernels cannot make gives bounds that are not `served`, which the attention refuses: models make
    masks for kinds of layers that they may not have.
    """
    if isinstance(torch.empty(0, device=device), FakeTensor):  # shapes without values (`abft plan`): no padding
        bites = local_size is not None and local_size < kv_length
        return Bounds(window=local_size) if bites else None
    if cache_position is not None:  # transformers before 5.4 gives the query positions instead
        q_length, q_offset, device = len(cache_position), int(cache_position[0]), cache_position.device
    if q_length is None:
        raise TypeError("this release of transformers gives the mask neither q_length nor cache_position")
    if q_offset + q_length != kv_length + kv_offset:
        raise NotImplementedError(
            f"the cache holds {kv_length} keys for queries that end at {q_offset + q_length}: the 'abft' attention "
            "aligns the last query with the last key; use the default DynamicCache"
        )
    bounds = Bounds(dropped=int(kv_offset))
    ends = [kv_offset + kv_length] * batch_size
    starts = [kv_offset] * batch_size
    if attention_mask is not None and not attention_mask.all():
        padding, device = _padding(attention_mask, kv_length), attention_mask.device
        bounds = bounds._replace(seq_lens=padding[:, 0].contiguous())
        if padding[:, 1].any():
            bounds = bounds._replace(seq_starts=padding[:, 1].contiguous())
        starts = [kv_offset + int(start) for start in padding[:, 1]]
        ends = [start + int(length) for start, length in zip(starts, padding[:, 0], strict=True)]
    if mask_function is not causal_mask_function:
        windows = (None,) if local_size is None or local_size >= kv_length + kv_offset else (None, local_size)

        def agrees(window: int | None) -> bool:
            return all(
                _agrees(
                    mask_function, sample, torch.arange(max(int(q_offset), start), end, device=device), start, start,
                    end, window,
                )
                for sample, (start, end) in enumerate(zip(starts, ends, strict=True))
            )  # fmt: skip

        try:
            window = next((window for window in windows if agrees(window)), -1)
            if window != -1:
                bounds = bounds._replace(window=window)
            elif batch_size == 1 and bounds.seq_lens is None and q_length == kv_length > 1:
                packings = ((_packed(mask_function, kv_length, window, device), window) for window in windows)
                cu_seqlens, window = next((found for found in packings if found[0] is not None), (None, None))
                bounds = bounds._replace(cu_seqlens=cu_seqlens, window=window, served=cu_seqlens is not None)
            else:
                bounds = bounds._replace(served=False)
        except (IndexError, RuntimeError) as error:
            raise NotImplementedError(f"the 'abft' attention cannot read this model's mask: {error}") from error
    plain = bounds.served and not bounds.dropped and all(value is None for value in bounds[:4])
    return None if plain and allow_is_causal_skip else bounds


def _padding(attention_mask: Tensor, kv_length: int) -> Tensor:
    """Lengths and starts of the samples, int32 `(B, 2)`, from a padding mask."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not cover the {kv_length} keys; "
            "with a cache it must cover the cached tokens too"
        )
    padding_mask = attention_mask[:, -kv_length:].to(torch.bool)
    lengths = padding_mask.sum(dim=1)
    starts = padding_mask.to(torch.int8).argmax(dim=1)
    keys = torch.arange(kv_length, device=padding_mask.device)
    expected = (keys >= starts[:, None]) & (keys < (starts + lengths)[:, None])
    if not torch.equal(expected, padding_mask):
        sample = int((expected != padding_mask).any(dim=1).nonzero()[0])
        raise ValueError(
            f"attention_mask of sample {sample} has a hole: its ones must be consecutive, with padding on the "
            "left or the right only"
        )
    return torch.stack([lengths, starts], dim=1).to(torch.int32)


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)


def transformer_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT, DDP or compiled wrapper."""
    inner: Any = model
    for _ in range(8):
        if isinstance(inner, PreTrainedModel):
            return inner
        for attribute in ("get_base_model", "module", "_orig_mod"):
            if hasattr(inner, attribute):
                inner = getattr(inner, attribute)
                inner = inner() if attribute == "get_base_model" else inner
                break
        else:
            break
    raise TypeError(f"expected a transformers model, possibly wrapped by PEFT, got {type(model).__name__}")


def is_enabled(model: nn.Module) -> bool:
    """Whether `model` runs on the `"abft"` attention."""
    return transformer_of(model).config.get_text_config()._attn_implementation == ATTENTION


def enable(model: _Model) -> _Model:
    """Switches `model` to the `"abft"` attention and returns it; outputs without `key_groups` are unchanged.

    The same as loading it with `attn_implementation="abft"` after `import abft.models.attention`. Undo it with
    `model.set_attn_implementation("sdpa")`.

    Raises:
        NotImplementedError: the model is no causal decoder that uses transformers' attention interface.
    """
    inner = transformer_of(model)
    check_architecture(inner)
    inner.set_attn_implementation(ATTENTION)
    if not is_enabled(inner):
        raise NotImplementedError(f"{type(inner).__name__} did not take attn_implementation={ATTENTION!r}")
    return model


def check_architecture(inner: PreTrainedModel) -> None:
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; attention masses are for causal decoders")
    if not inner._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} computes attention in code of its own and not through transformers' AttentionInterface, so no "
            "mass can be read from it; use a model that supports attn_implementation='sdpa' by that interface"
        )
