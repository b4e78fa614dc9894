"""Evaluation of a model on attention targets: masses of every head, and accuracy of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.evaluation.label_attention import read_heads
from abft.models.attention import transformer_of
from abft.prompts.collation import Collator, padding_id
from abft.prompts.targets import AttentionTarget

__all__ = ["TargetEvaluation", "read_targets"]


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """Masses and predictions of a model on n targets; tensors are on the CPU.

    Args:
        n: number of targets.
        labelled: how many of them have a ``label_id``.
        accuracy: share of the labelled ones whose ``label_id`` is the most probable of all tokens after the last query
            position; None if no target is labelled.
        accuracy_stderr: standard error of the accuracy, √(a(1−a)/labelled); None likewise.
        positive_mass: (L, H) float32, mass on positive keys, mean over a target's rows and then over targets.
        negative_mass: (L, H) float32, likewise on negative keys.
        predictions: (n,) int64, the most probable token, in the order of the targets.
    """

    n: int
    labelled: int
    accuracy: float | None
    accuracy_stderr: float | None
    positive_mass: Tensor
    negative_mass: Tensor
    predictions: Tensor

    @property
    def best_head(self) -> tuple[int, int]:
        """Layer and head with the largest mass on positive keys."""
        layer, head = divmod(int(self.positive_mass.argmax()), self.positive_mass.shape[1])
        return layer, head

    def to_dict(self) -> dict[str, int | float]:
        """Return plain numbers, ready for JSON: masses as means over all heads, and of the best head."""
        numbers = {name: getattr(self, name) for name in ("n", "labelled", "accuracy", "accuracy_stderr")}
        return {
            **{name: number for name, number in numbers.items() if number is not None},
            "positive_mass": self.positive_mass.mean().item(),
            "negative_mass": self.negative_mass.mean().item(),
            "best_layer": self.best_head[0],
            "best_head": self.best_head[1],
            "best_head_positive_mass": self.positive_mass.max().item(),
        }


def read_targets(
    model: PreTrainedModel | PeftModel, targets: Sequence[AttentionTarget], batch_size: int, progress: bool
) -> TargetEvaluation:
    """Read the masses of every head and the next token, in one pass over targets; see :func:`abft.evaluate`.

    The LM head computes only the row of each last query position.
    """
    # On the left, so that the rows whose logits are needed are one column.
    collate = Collator(padding_id(transformer_of(model).config.get_text_config()), padding_side="left")
    predictions = torch.empty(len(targets), dtype=torch.long)

    def predict(indices: list[int], logits: Tensor) -> None:
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(
                f"logits of target {indices[int(finite.int().argmin())]} are not finite; load the model in bfloat16 "
                "or float32, or train at a lower rate"
            )
        predictions[indices] = logits.argmax(dim=-1).cpu()

    heads = read_heads(model, targets, collate, batch_size, progress, predict)
    hits = [int(p) == t.label_id for p, t in zip(predictions, targets, strict=True) if t.label_id is not None]
    accuracy = sum(hits) / len(hits) if hits else None
    stderr = None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / len(hits))
    return TargetEvaluation(
        len(targets), len(hits), accuracy, stderr, heads.mass_correct, heads.mass_wrong, predictions
    )
