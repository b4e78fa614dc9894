"""The Hugging Face adapter: attention masses out of any decoder that goes through transformers' attention interface.

One name, `"abft"`, is registered for the attention and for its mask; nothing is patched. The mask becomes `Bounds`
(see `abft.models.layer_mask`), so no N × N tensor exists. Keyword arguments of `model(...)` reach the attention
function, and what it returns as weights comes back as `outputs.attentions`:

    model = enable(model)
    outputs = model(input_ids, attention_mask=…, key_groups=…, query_positions=…, output_attentions=True)
    outputs.attentions[layer]          # mass (B, H, R, G), differentiable

A `MassCollector` passed as `mass_collector` takes the masses as they come instead (see `abft.models.collector`). With
or without masses, `momentum` adds an exponential sum of earlier values (see `abft.models.momentum`), and
`attention_probe` is shown what each layer's attention gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from abft.models.bounds import Bounds
from abft.models.collector import Layer, MassCollector, MassRequest
from abft.models.layer_mask import LayerMask, layer_mask
from abft.models.momentum import check_momentum

__all__ = ["ATTENTION", "AttentionProbe", "check_architecture", "enable", "is_enabled", "transformer_of"]

ATTENTION = "abft"
AttentionProbe = Callable[[nn.Module, Tensor, Tensor, Tensor, float], None]
_Model = TypeVar("_Model", bound=nn.Module)

# Arguments that change the scores in ways the kernels do not compute: silence would give wrong masses.
_UNSUPPORTED = {
    "position_bias": "an additive position bias",
    "alibi": "an additive position bias",
    "head_mask": "a head mask",
    "indices": "a custom key selection",
    "block_indices": "a custom key selection",
    "cache": "a paged cache",
}
# Tensors that models pass beside these and that do not change the scores.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "num_items_in_batch",
    "labels",
    "input_ids",
    "inputs_embeds",
    "logits_to_keep",
    "mm_token_type_ids",
    "token_type_ids",
    "cu_seq_lens_k",
}
# Tensors that the kernels compute with.
_SERVED = {"s_aux", "sinks", "cu_seq_lens_q"}


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    layout: Bounds | None = None,
    key_groups: Tensor | None = None,
    num_key_groups: int = 2,
    query_positions: Tensor | None = None,
    mass_collector: MassCollector | None = None,
    momentum: float | None = None,
    attention_probe: AttentionProbe | None = None,
    attention_backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return output `(B, N, H, D)` and mass `(B, H, R, G)`; None for the mass without `key_groups` or with a collector.

    `layout` tells where the batch's tokens are, in place of `attention_mask`, which is then not read. `momentum` is η,
    between 0 and 1, of momentum attention. The probe is called with the module, query `(B, H, N, D)`, key and value
    `(B, H_kv, N, D)`, all after rotary embeddings, and the scale of the scores; again when checkpointing runs a layer
    again.
    """
    _check_arguments(module, scaling, momentum, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave q and k in float32, v in 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds = _bounds(module, attention_mask, layout, is_causal, key.shape[2], kwargs).to(query.device)
    context = None if mass_collector is None else mass_collector.context
    if context is not None:
        bounds = _bounds_over_processes(module, attention_mask, bounds, kwargs)
    sinks = kwargs.get("s_aux", kwargs.get("sinks"))
    scores = {
        "scale": scaling,
        "softcap": kwargs.get("softcap"),
        "sinks": None if sinks is None else sinks.reshape(-1),
        "backend": attention_backend,
    }
    layer = Layer(query, key, value, bounds, scores, dropout, momentum, context)
    dropped = attention_mask.dropped if isinstance(attention_mask, LayerMask) else 0
    _check_served(module, layer, key_groups is not None, dropped)
    if attention_probe is not None:
        attention_probe(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    mass = None
    if key_groups is None:
        out = layer.output()
    else:
        decoding = query_positions is not None and query_positions.shape[1] == query.shape[2] == 1
        rows = None if decoding else query_positions  # in decoding the only row there is
        request = MassRequest(key_groups, num_key_groups, rows).without_first(dropped)
        if mass_collector is not None:
            out = mass_collector.collect(module, layer, request)
        else:
            out, mass = layer.output_and_mass(request)
    return out.transpose(1, 2).contiguous(), mass


def _bounds(
    module: nn.Module, mask: Any, layout: Bounds | None, is_causal: bool | None, n_k: int, kwargs: dict[str, Any]
) -> Bounds:
    """Return what the mask, the layout and transformers' own arguments say together."""
    if isinstance(mask, LayerMask):
        bounds = mask.bounds(layout)
    elif mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        bounds = (layout or Bounds())._replace(causal=causal)
    else:
        raise _unsupported(module, f"an attention mask of its own, of shape {tuple(mask.shape)}")
    cu_seqlens, window = kwargs.get("cu_seq_lens_q"), kwargs.get("sliding_window")
    if cu_seqlens is not None:
        if bounds.seq_lens is not None:
            raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other; pass one of them")
        bounds = bounds._replace(cu_seqlens=cu_seqlens, causal=True)
    if window is not None and window < n_k and window != bounds.window:
        if bounds.cu_seqlens is None or bounds.window is not None:
            raise _unsupported(module, f"a sliding window of {window} tokens over {n_k} keys that its mask lacks")
        bounds = bounds._replace(window=window)  # sequences shorter than the window need none in the mask
    return bounds


def _bounds_over_processes(module: nn.Module, mask: Any, bounds: Bounds, kwargs: dict[str, Any]) -> Bounds:
    """Return the bounds in the whole context: the mask was made of this process's tokens."""
    if bounds.seq_lens is not None or bounds.cu_seqlens is not None:
        raise _unsupported(module, "padding or packed prompts in a context spread over processes")
    window, size = kwargs.get("sliding_window"), mask.local_size if isinstance(mask, LayerMask) else None
    if size is not None and size != window:
        raise _unsupported(module, f"a local mask of {size} tokens, no window, in a context spread over processes")
    return bounds._replace(window=window)


def _check_arguments(module: nn.Module, scaling: float | None, momentum: float | None, kwargs: dict[str, Any]) -> None:
    """Raise for an argument that the kernels do not compute."""
    if momentum is not None:
        check_momentum(momentum)
    for name, argument in kwargs.items():
        if argument is not None and name in _UNSUPPORTED:
            raise _unsupported(module, _UNSUPPORTED[name])
        if isinstance(argument, Tensor) and name not in _HARMLESS and name not in _SERVED:
            raise _unsupported(module, f"an argument {name!r} that is not known here")
    scaled_by_itself = getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(
        module, "scale_attn_weights", True
    )
    if scaling is None and scaled_by_itself:
        raise _unsupported(module, "a scale of the scores that it does not pass on")


def _check_served(module: nn.Module, layer: Layer, mass: bool, dropped: int) -> None:
    """Raise for masses or momentum where they are not defined."""
    if not layer.bounds.causal and (mass or layer.momentum is not None):
        raise _unsupported(module, f"{'masses' if mass else 'momentum'} in bidirectional or cross attention")
    if layer.momentum is not None and dropped:
        raise _unsupported(module, "momentum over a cache that has dropped earlier values")
    if layer.momentum is not None and layer.context is not None:
        raise _unsupported(module, "momentum in a context spread over processes")


def _unsupported(module: nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} uses {what}, which the 'abft' attention does not compute; "
        "use attn_implementation='sdpa' or 'eager' for this model"
    )


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, layer_mask)


def transformer_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT, DDP or compiled wrapper."""
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
    """Return True if `model` runs on the `"abft"` attention."""
    return transformer_of(model).config.get_text_config()._attn_implementation == ATTENTION


def enable(model: _Model) -> _Model:
    """Switch `model` to the `"abft"` attention and return it; outputs without `key_groups` are unchanged.

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
    """Raise a NotImplementedError unless the model is a causal decoder that uses transformers' attention interface."""
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; attention masses are for causal decoders")
    if not inner._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} computes attention in code of its own and not through transformers' AttentionInterface, so no "
            "mass can be read from it; use a model that supports attn_implementation='sdpa' by that interface"
        )
