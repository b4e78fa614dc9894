"""The Hugging Face adapter: attention masses out of any decoder that goes through transformers' attention interface.

One name, `"abft"`, is registered for the attention and for its mask; nothing is patched. The mask becomes the
first token and the number of tokens of each sample, so no N × N tensor exists. Keyword arguments of `model(...)`
reach the attention function, and what it returns as weights comes back as `outputs.attentions`:

    model = enable(model)
    outputs = model(input_ids, attention_mask=…, key_groups=…, query_positions=…, output_attentions=True)
    outputs.attentions[layer]          # mass (B, H, R, G), differentiable

This is the only file that knows transformers' internals.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from abft_kernels import attention, mass_attention

__all__ = ["ATTENTION", "attention_mass", "enable", "is_enabled"]

ATTENTION = "abft"
_Model = TypeVar("_Model", bound=nn.Module)

# Arguments that change the scores in ways the kernels do not compute: silence would give wrong masses.
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive position bias",
    "alibi": "an additive position bias",
    "head_mask": "a head mask",
    "indices": "a choice of keys of its own",
    "block_indices": "a choice of keys of its own",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
}
# Tensors that models hand down beside these, and that leave the scores as they are.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "num_items_in_batch", "labels", "input_ids",
             "inputs_embeds", "logits_to_keep", "mm_token_type_ids", "token_type_ids"}  # fmt: skip

# Before 5.3 some language-model heads (GPT-2's) do not hand unknown arguments down to the decoder.
_HEADS_PASS_ARGUMENTS = Version(transformers.__version__) >= Version("5.3")


def _unsupported(module: nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} uses {what}, which the 'abft' attention does not compute; "
        "use attn_implementation='sdpa' or 'eager' for this model"
    )


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    key_groups: Tensor | None = None,
    num_key_groups: int = 2,
    query_positions: Tensor | None = None,
    attention_backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, N, H, D)` and mass `(B, H, R, G)`; without `key_groups` plain attention and None."""
    for name, argument in kwargs.items():
        if argument is not None and name in _UNSUPPORTED:
            raise _unsupported(module, _UNSUPPORTED[name])
        if isinstance(argument, Tensor) and name not in _HARMLESS:
            raise _unsupported(module, f"an argument {name!r} that is not known here")
    of_its_own = getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(
        module, "scale_attn_weights", True
    )
    if scaling is None and of_its_own:
        raise _unsupported(module, "a scale of the scores that it does not pass on")
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise _unsupported(module, f"a sliding window of {window} tokens over {key.shape[2]} keys")
    if value.shape[-1] != query.shape[-1]:
        raise _unsupported(module, f"values of head_dim {value.shape[-1]} beside keys of {query.shape[-1]}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bounds: dict[str, Any] = {}
    if attention_mask is not None:
        if attention_mask.dtype != torch.int32 or attention_mask.dim() != 2 or attention_mask.shape[1] > 2:
            raise _unsupported(module, f"an attention mask of its own, of shape {tuple(attention_mask.shape)}")
        if attention_mask.shape[1] == 0:
            raise NotImplementedError(_NOT_PLAIN)
        causal = True  # bounds come from `_mask` alone, and stand for a causal mask
        bounds = dict(zip(("seq_lens", "seq_starts"), attention_mask.T.contiguous(), strict=False))
    shared = {**bounds, "causal": causal, "scale": scaling, "dropout_p": dropout, "backend": attention_backend}
    if key_groups is None:
        return attention(query, key, value, **shared).transpose(1, 2).contiguous(), None
    if not causal:
        raise _unsupported(module, "bidirectional or cross attention")
    if query_positions is not None and query_positions.shape[1] == query.shape[2] == 1:
        query_positions = None  # decoding: the only row there is
    out, mass = mass_attention(query, key, value, key_groups, num_key_groups, row_positions=query_positions, **shared)
    return out.transpose(1, 2).contiguous(), mass


_NOT_PLAIN = (
    "the 'abft' attention serves causal masks with padding; this model or batch asks for another one (a sliding "
    "window shorter than the input, packed sequences told by position_ids, bidirectional blocks). Pass an "
    "attention_mask to have position_ids taken as padding, or use attn_implementation='sdpa'"
)


def _is_plain_causal(mask_function: Any, sample: int, first: int, start: int, end: int, device: Any) -> bool:
    """Whether the rows `first … end − 1` of a sample see all its keys from `start` up to themselves, and no more.

    Looks at O(N) of the N² entries, enough for every mask that is made of windows, chunks, blocks, prefixes and
    packed sequences: all keys of the first and the last row, and of each row the first, the middle, its own, the
    next and the last.
    """
    if mask_function is causal_mask_function:
        return True
    if start >= end or first >= end:
        return True
    first = max(first, start)
    rows = torch.arange(first, end, device=device)
    keys = torch.arange(start, end, device=device)
    same = torch.ones_like(rows)
    probes = [(torch.full_like(keys, row), keys) for row in (first, end - 1)]
    probes += [(rows, k) for k in (same * start, (rows + start) // 2, rows, (rows + 1).clamp(max=end - 1))]
    probes.append((rows, same * (end - 1)))
    batch, head = torch.tensor(sample, device=device), torch.tensor(0, device=device)
    return all(
        torch.equal(torch.as_tensor(mask_function(batch, head, r, k), device=device).expand(r.shape), k <= r)
        for r, k in probes
    )


def _mask(
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask as int32 `(B, 1)` lengths, or `(B, 2)` lengths and starts if padded on the left; None if whole.

    A mask that is not causal with padding at the ends of the samples becomes `(B, 0)`, which the attention refuses:
    models make masks for kinds of layers that they may not have.
    """
    if cache_position is not None:  # transformers before 5.4 gives the query positions instead
        q_length, q_offset, device = len(cache_position), int(cache_position[0]), cache_position.device
    if q_length is None:
        raise TypeError("this release of transformers gives the mask neither q_length nor cache_position")
    if q_offset + q_length != kv_length + kv_offset:
        raise NotImplementedError(
            f"the cache holds {kv_length} keys for queries that end at {q_offset + q_length}: the 'abft' attention "
            "aligns the last query with the last key; use the default DynamicCache"
        )
    bounds = None
    ends = [kv_offset + kv_length] * batch_size
    starts = [0] * batch_size  # a cache that has dropped keys is a sliding window
    if attention_mask is not None and not attention_mask.all():
        bounds, device = _padding(attention_mask, kv_length), attention_mask.device
        if mask_function is not causal_mask_function:
            starts = [kv_offset + int(start) for start in bounds[:, 1]]
            ends = [start + int(length) for start, length in zip(starts, bounds[:, 0], strict=True)]
    if mask_function is not causal_mask_function:
        for sample, (start, end) in enumerate(zip(starts, ends, strict=True)):
            try:
                plain = _is_plain_causal(mask_function, sample, int(q_offset), start, end, device)
            except (IndexError, RuntimeError) as error:
                raise NotImplementedError(f"the 'abft' attention cannot read this model's mask: {error}") from error
            if not plain:
                return torch.empty((batch_size, 0), dtype=torch.int32, device=device)
    if bounds is None:
        if allow_is_causal_skip:
            return None
        return torch.full((batch_size, 1), kv_length, dtype=torch.int32, device=device)
    return bounds if bounds[:, 1].any() else bounds[:, :1]


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


def _transformer(model: nn.Module) -> PreTrainedModel:
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
    return _transformer(model).config.get_text_config()._attn_implementation == ATTENTION


def enable(model: _Model) -> _Model:
    """Switches `model` to the `"abft"` attention and returns it; outputs without `key_groups` are unchanged.

    The same as loading it with `attn_implementation="abft"` after `import abft.attention`. Undo it with
    `model.set_attn_implementation("sdpa")`.

    Raises:
        NotImplementedError: the model is no causal decoder that uses transformers' attention interface.
    """
    inner = _transformer(model)
    _check_architecture(inner)
    inner.set_attn_implementation(ATTENTION)
    if not is_enabled(inner):
        raise NotImplementedError(f"{type(inner).__name__} did not take attn_implementation={ATTENTION!r}")
    return model


def _check_architecture(inner: PreTrainedModel) -> None:
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; attention masses are for causal decoders")
    if not inner._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} computes attention in code of its own and not through transformers' AttentionInterface, so no "
            "mass can be read from it; use a model that supports attn_implementation='sdpa' by that interface"
        )


def attention_mass(
    model: nn.Module,
    input_ids: Tensor,
    key_groups: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    num_groups: int = 2,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """How much each head looks at groups of tokens: one mass `(B, H, R, G)` per layer, float32, with gradient.

    Args:
        model: a causal language model on the `"abft"` attention (see :func:`enable`).
        input_ids: `(B, N)`.
        key_groups: integers `(B, N)`: −1 for no group, else 0 … `num_groups` − 1.
        attention_mask: `(B, N)`, 1 for tokens; padding on either side.
        position_ids: `(B, N)`; counted from each sample's first token if None and padded.
        query_positions: `(B, R)` indices of the rows wanted; None for all N.
        num_groups: G.
        kwargs: handed to `model(...)`.

    Raises:
        ValueError: the model runs on another attention.
        NotImplementedError: a layer's attention does not come through the interface.
    """
    outputs = forward_with_mass(
        model, input_ids=input_ids, key_groups=key_groups, attention_mask=attention_mask, position_ids=position_ids,
        query_positions=query_positions, num_key_groups=num_groups, **kwargs,
    )  # fmt: skip
    return outputs.attentions


def forward_with_mass(
    model: nn.Module,
    *,
    input_ids: Tensor,
    key_groups: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`model(...)` with `outputs.attentions` holding the masses of every layer; logits of one position only."""
    inner = _transformer(model)
    if not is_enabled(inner):
        raise ValueError(
            f"the model runs on attn_implementation={inner.config.get_text_config()._attn_implementation!r}; "
            "call abft.enable(model) first"
        )
    _check_architecture(inner)  # the name can also be set while loading
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    num_key_groups = kwargs.pop("num_key_groups", 2)
    asked = {"key_groups": key_groups, "num_key_groups": num_key_groups, "query_positions": query_positions}
    kwargs = {"output_attentions": True, "use_cache": False, "logits_to_keep": 1, **kwargs}
    hook = None
    if not _HEADS_PASS_ARGUMENTS:
        hook = inner.base_model.register_forward_pre_hook(_adding(asked), with_kwargs=True)
        asked = {}
    try:
        outputs = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **asked, **kwargs
        )
    finally:
        if hook is not None:
            hook.remove()
    masses = getattr(outputs, "attentions", None) or ()
    expected = inner.config.get_text_config().num_hidden_layers
    rows = input_ids.shape[1] if query_positions is None else query_positions.shape[1]
    shape = (rows, num_key_groups)
    got = sum(mass is not None and mass.dim() == 4 and mass.shape[2:] == shape for mass in masses)
    if not len(masses) == got == expected:
        raise NotImplementedError(
            f"{type(inner).__name__} gave a mass for {got} of {expected} layers: some of its attention does not go "
            "through transformers' AttentionInterface"
        )
    return outputs


def _adding(arguments: dict[str, Any]) -> Any:
    return lambda module, args, kwargs: (args, {**kwargs, **arguments})
