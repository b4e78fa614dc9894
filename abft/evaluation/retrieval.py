"""Where every head looks on attention targets, and what the model says next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_chunks
from abft.models.attention import transformer_of
from abft.models.masses import forward_with_mass
from abft.prompts.collation import MASS_INPUTS, padding_id
from abft.prompts.targets import AttentionTarget, TargetCollator

__all__ = ["TargetEvaluation", "evaluate_targets"]


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """What a model attends to and predicts on n targets; tensors are on the CPU.

    Args:
        n: number of targets.
        labelled: how many of them have a ``label_id``.
        accuracy: share of the labelled ones whose ``label_id`` is the most probable of all tokens behind the last query
            position; None if there is none.
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
        """Plain numbers, ready for JSON: masses as means over all heads, and of the best head."""
        numbers = {name: getattr(self, name) for name in ("n", "labelled", "accuracy", "accuracy_stderr")}
        return {
            **{name: number for name, number in numbers.items() if number is not None},
            "positive_mass": self.positive_mass.mean().item(),
            "negative_mass": self.negative_mass.mean().item(),
            "best_layer": self.best_head[0],
            "best_head": self.best_head[1],
            "best_head_positive_mass": self.positive_mass.max().item(),
        }


@torch.inference_mode()
def evaluate_targets(
    model: PreTrainedModel | PeftModel,
    targets: Sequence[AttentionTarget],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> TargetEvaluation:
    """Reads where every head looks, and what the model says next, in one pass over ``targets``, batched by length.

    Of the LM head only the row of each last query position is computed. Under tensor parallelism the masses are those
    of the process's own heads. The model runs in evaluation mode, and every
    module is put back into the mode it was in.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`); on any device.
        targets: at least one.
        batch_size: targets per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no targets, ``batch_size`` is not positive, a model on another attention, or one that returned a
            logit that is not finite.
    """
    device = next(model.parameters()).device
    # On the left, so that the rows of which logits are wanted are one column.
    collate = TargetCollator(padding_id(transformer_of(model).config.get_text_config()), padding_side="left")
    predictions = torch.empty(len(targets), dtype=torch.long)
    sums: list[Tensor] = []
    with evaluation_mode(model):
        for chunk in length_sorted_chunks(targets, batch_size, "Reading targets", progress):
            batch = {name: tensor.to(device) for name, tensor in collate([targets[i] for i in chunk]).items()}
            outputs = forward_with_mass(model, **{name: batch[name] for name in MASS_INPUTS if name in batch})
            logits = outputs.logits[:, -1]
            finite = logits.isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"logits of target {chunk[int(finite.int().argmin())]} are not finite; load the model in bfloat16 "
                    "or float32, or train at a lower rate"
                )
            predictions[chunk] = logits.argmax(dim=-1).cpu()
            masses = torch.stack([mass.to(device) for mass in outputs.attentions])  # [L, B, H, R, 2]
            sums.append((masses * batch["row_weights"][:, None, :, None]).sum(dim=(1, 3)).cpu())
    positive, negative = (torch.stack(sums).sum(0) / len(targets)).float().unbind(-1)
    hits = [int(p) == t.label_id for p, t in zip(predictions, targets, strict=True) if t.label_id is not None]
    accuracy = sum(hits) / len(hits) if hits else None
    stderr = None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / len(hits))
    return TargetEvaluation(len(targets), len(hits), accuracy, stderr, positive, negative, predictions)
