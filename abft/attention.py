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
    "position_bias": "an additive position bias",
    "cu_seq_lens_q": "packed sequences",
}


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
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise _unsupported(module, what)
    window = kwargs.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise _unsupported(module, f"a sliding window of {window} tokens over {key.shape[2]} keys")
    if value.shape[-1] != query.shape[-1]:
        raise _unsupported(module, f"values of head_dim {value.shape[-1]} beside keys of {query.shape[-1]}")
    bounds: dict[str, Any] = {}
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.dtype != torch.int32:
            raise _unsupported(module, f"an attention mask of its own, of shape {tuple(attention_mask.shape)}")
        bounds["seq_lens"] = attention_mask[:, 0]
        if attention_mask.shape[1] == 2:
            bounds["seq_starts"] = attention_mask[:, 1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shared = {**bounds, "causal": causal, "scale": scaling, "dropout_p": dropout, "backend": attention_backend}
    if key_groups is None:
        return attention(query, key, value, **shared).transpose(1, 2), None
    if query_positions is not None and query_positions.shape[1] == query.shape[2] == 1:
        query_positions = None  # decoding: the only row there is
    out, mass = mass_attention(
        query, key, value, key_groups, num_key_groups, row_positions=query_positions, **shared
    )
    return out.transpose(1, 2), mass


def _is_plain_causal(mask_function: Any, batch: int, first: int, last: int) -> bool:
    """Whether rows `first … last − 1` see exactly the keys up to themselves.

    Windows, chunks and packed sequences hide the first key from some row, look-ahead shows the next one.
    """
    if mask_function is causal_mask_function:
        return True
    rows = torch.arange(first, last)
    none = torch.zeros_like(rows)

    def seen(sample: int, keys: Tensor) -> Tensor:
        visible = mask_function(torch.tensor(sample), torch.tensor(0), rows, keys)
        return torch.as_tensor(visible).expand(rows.shape)

    return all(
        bool(seen(b, none).all()) and bool(seen(b, rows).all()) and not bool(seen(b, rows + 1)[:-1].any())
        for b in range(batch)
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
    **_: Any,
) -> Tensor | None:
    """The mask as int32 `(B, 1)` lengths, or `(B, 2)` lengths and starts if padded on the left; None if whole.

    Raises NotImplementedError for any mask but a causal one with padding at the ends of the samples.
    """
    if cache_position is not None:  # transformers before 5.6 gives the query positions instead
        q_length, q_offset = len(cache_position), int(cache_position[0])
    if q_length is None:
        raise TypeError("this release of transformers gives the mask neither q_length nor cache_position")
    if q_offset + q_length != kv_length + kv_offset:
        raise NotImplementedError(
            f"the cache holds {kv_length} keys for queries that end at {q_offset + q_length}: the 'abft' attention "
            "aligns the last query with the last key; use the default DynamicCache"
        )
    try:
        plain = _is_plain_causal(mask_function, batch_size, int(q_offset), int(q_offset) + q_length)
    except (IndexError, RuntimeError) as error:
        raise NotImplementedError(f"the 'abft' attention cannot read this model's mask: {error}") from error
    if not plain:
        raise NotImplementedError(
            "the 'abft' attention serves causal masks with padding; this model or batch asks for another one (a "
            "sliding window shorter than the input, packed sequences told by position_ids, bidirectional blocks). "
            "Pass an attention_mask to have position_ids taken as padding, or use attn_implementation='sdpa'"
        )
    if attention_mask is None or attention_mask.all():
        return None
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
    columns = [lengths] if not starts.any() else [lengths, starts]
    return torch.stack(columns, dim=1).to(torch.int32)


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
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; attention masses are for causal decoders")
    if not inner._can_set_attn_implementation():
        raise NotImplementedError(
            f"{name} computes attention in code of its own and not through transformers' AttentionInterface, so no "
            "mass can be read from it; use a model that supports attn_implementation='sdpa' by that interface"
        )
    inner.set_attn_implementation(ATTENTION)
    if not is_enabled(inner):
        raise NotImplementedError(f"{name} did not take attn_implementation={ATTENTION!r}")
    return model


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


def forward_with_mass(model: nn.Module, *, attention_mask: Tensor | None, position_ids: Tensor | None = None,
                      **kwargs: Any) -> Any:  # fmt: skip
    """`model(...)` with `outputs.attentions` holding the masses of every layer; logits of one position only."""
    inner = _transformer(model)
    if not is_enabled(inner):
        raise ValueError(
            f"the model runs on attn_implementation={inner.config.get_text_config()._attn_implementation!r}; "
            "call abft.enable(model) first"
        )
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    outputs = model(
        attention_mask=attention_mask, position_ids=position_ids, output_attentions=True, use_cache=False,
        logits_to_keep=1, **kwargs,
    )  # fmt: skip
    masses = outputs.attentions
    expected = inner.config.get_text_config().num_hidden_layers
    if masses is None or len(masses) != expected or any(mass is None for mass in masses):
        got = 0 if masses is None else sum(mass is not None for mass in masses)
        raise NotImplementedError(
            f"{type(inner).__name__} gave a mass for {got} of {expected} layers: some of its attention does not go "
            "through transformers' AttentionInterface"
        )
    return outputs
