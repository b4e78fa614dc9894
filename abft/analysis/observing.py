"""Attention outputs and scores of the last tokens of a batch, read from hooks and probes of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.evaluation.classification import label_logits
from abft.models.mixed_precision import exactly
from abft.models.projections import attention_modules
from abft.prompts.builder import Prompt, PromptBuilder

__all__ = ["Observation", "check_all_seen", "common_ending", "observe"]


@dataclass(frozen=True, eq=False)
class Observation:
    """Predictions, attention outputs and scores of a batch of B prompts, on the CPU."""

    predictions: Tensor  # (B,) int64
    outputs: Tensor  # (L, B, width), of length 1
    scores: Tensor  # (L, B, H, W), 0 before the query's own tokens


def common_ending(a: Prompt, b: Prompt) -> int:
    """Return the number of tokens that both prompts end with."""
    pairs = zip(reversed(a.input_ids), reversed(b.input_ids), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.length, b.length))


def check_all_seen(model: PreTrainedModel, seen: int) -> None:
    """Raise NotImplementedError unless every layer's attention was seen."""
    layers = model.config.get_text_config().num_hidden_layers
    if seen != layers:
        raise NotImplementedError(
            f"{type(model).__name__} shows the attention of {seen} of {layers} layers: some of it does not go through "
            "transformers' AttentionInterface"
        )


def observe(model: PreTrainedModel, batch: dict[str, Tensor], builder: PromptBuilder, own: Tensor) -> Observation:
    """Return what the model does at the last tokens; `own` `(B,)` is the number of the query's own tokens."""
    modules = attention_modules(model)
    outputs: dict[nn.Module, Tensor] = {}
    scores: dict[nn.Module, Tensor] = {}
    last = batch["query_positions"]

    def keep_output(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        row = hidden.take_along_dim(last[..., None].to(hidden.device), dim=1)[:, 0]
        outputs[module] = nn.functional.normalize(row.float(), dim=-1).cpu()

    def keep_scores(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        scores[module] = _last_scores(query, key, last.to(query.device), own.to(query.device), scale).cpu()

    with _hooked(modules, keep_output):
        logits = label_logits(model, batch, builder.label_token_ids, attention_probe=keep_scores)
    check_all_seen(model, sum(module in scores and module in outputs for module in modules))
    if not logits.isfinite().all():
        raise ValueError("label logits that are not finite; load the model in float32, or lower the learning rate")
    return Observation(
        logits.argmax(1).cpu(),
        torch.stack([outputs[module] for module in modules]),
        torch.stack([scores[module] for module in modules]),
    )


def _last_scores(query: Tensor, key: Tensor, last: Tensor, own: Tensor, scale: float) -> Tensor:
    """Return scores before the softmax, `(B, H, W)`: row `last` `(B, 1)` on the `own` `(B,)` keys up to itself."""
    back = torch.arange(int(own.max()) - 1, -1, -1, device=key.device)
    keys = key.take_along_dim((last - back).clamp(min=0)[:, None, :, None], dim=2).float()  # [B, H_kv, W, D]
    rows = query.take_along_dim(last[:, None, :, None], dim=2).float()  # [B, H, 1, D]
    rows = rows.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, H_kv, H / H_kv, D]
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
