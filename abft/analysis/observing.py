"""Attention outputs and scores of the last tokens of a batch, read from hooks and probes of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.analysis.query_vectors import QueryVectors
from abft.evaluation.classification import label_logits
from abft.models.mixed_precision import exactly
from abft.models.projections import attention_modules
from abft.prompts.builder import PromptBuilder

__all__ = ["Observation", "check_all_seen", "common_ending", "observe"]


@dataclass(frozen=True, eq=False)
class Observation:
    """Predictions, attention outputs, scores and query vectors of a batch of B prompts, on the CPU."""

    predictions: Tensor  # (B,) int64
    outputs: Tensor  # (L, B, width), of length 1
    scores: Tensor  # (L, B, H, W), 0 before the query's own tokens
    context: Tensor | None = None  # (L, B, T), scores on chosen keys, added up over heads
    queries: Tensor | None = None  # (L, B, width), of the last tokens


def common_ending(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens that both sequences end with."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def check_all_seen(model: PreTrainedModel, seen: int) -> None:
    """Raise NotImplementedError unless every layer's attention was seen."""
    layers = model.config.get_text_config().num_hidden_layers
    if seen != layers:
        raise NotImplementedError(
            f"{type(model).__name__} shows the attention of {seen} of {layers} layers: some of it does not go through "
            "transformers' AttentionInterface"
        )


def observe(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    builder: PromptBuilder,
    own: Tensor,
    *,
    context: Tensor | None = None,
    queries: QueryVectors | None = None,
) -> Observation:
    """Return what the model does at the last tokens.

    Args:
        model: on the `"abft"` attention.
        batch: of the collator, padded on the right.
        builder: of the prompts.
        own: `(B,)` number of the query's own tokens, up to the last one.
        context: `(T,)` positions of keys whose scores are wanted too, the same in every prompt.
        queries: of this model, if the query vectors are wanted.

    Raises:
        ValueError: logits that are not finite.
        NotImplementedError: a layer's attention does not come through transformers' attention interface.
    """
    modules = attention_modules(model)
    outputs: dict[nn.Module, Tensor] = {}
    scores: dict[nn.Module, Tensor] = {}
    on_context: dict[nn.Module, Tensor] = {}
    last = batch["query_positions"]

    def keep_output(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        row = hidden.take_along_dim(last[..., None].to(hidden.device), dim=1)[:, 0]
        outputs[module] = nn.functional.normalize(row.float(), dim=-1).cpu()

    def keep_scores(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        rows = _rows(query, last.to(query.device), key.shape[1])
        scores[module] = _last_scores(rows, key, last.to(query.device), own.to(query.device), scale).cpu()
        if context is not None:
            keys = key[:, :, context.to(key.device)].float()
            on_context[module] = ((rows @ keys.transpose(2, 3)).sum((1, 2)) * scale).cpu()

    with _hooked(modules, keep_output), nullcontext() if queries is None else queries.recording():
        logits = label_logits(model, batch, builder.label_token_ids, attention_probe=keep_scores)
    check_all_seen(model, sum(module in scores and module in outputs for module in modules))
    if not logits.isfinite().all():
        raise ValueError("label logits that are not finite; load the model in float32, or lower the learning rate")
    return Observation(
        logits.argmax(1).cpu(),
        torch.stack([outputs[module] for module in modules]),
        torch.stack([scores[module] for module in modules]),
        None if context is None else torch.stack([on_context[module] for module in modules]),
        None if queries is None else _of_last_tokens(queries.vectors(), last),
    )


def _of_last_tokens(vectors: Tensor, last: Tensor) -> Tensor:
    """Return the vectors `(L, B, width)` of the rows `last` `(B, 1)` from those of all tokens `(L, B, N, width)`."""
    return vectors.take_along_dim(last[None, :, :, None].to(vectors.device), dim=2)[:, :, 0].cpu()


def _rows(query: Tensor, last: Tensor, kv_heads: int) -> Tensor:
    """Return the query of the row `last` `(B, 1)`, float32, `(B, H_kv, H / H_kv, D)`."""
    rows = query.take_along_dim(last[:, None, :, None], dim=2).float()  # [B, H, 1, D]
    return rows.unflatten(1, (kv_heads, -1))[:, :, :, 0]


def _last_scores(rows: Tensor, key: Tensor, last: Tensor, own: Tensor, scale: float) -> Tensor:
    """Return scores before the softmax, `(B, H, W)`: of the `rows` on the `own` `(B,)` keys up to `last` `(B, 1)`."""
    back = torch.arange(int(own.max()) - 1, -1, -1, device=key.device)
    keys = key.take_along_dim((last - back).clamp(min=0)[:, None, :, None], dim=2).float()  # [B, H_kv, W, D]
    with exactly(key.device):
        scores = (rows @ keys.transpose(2, 3)).flatten(1, 2) * scale
    return scores.masked_fill((back >= own[:, None])[:, None], 0.0)


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
