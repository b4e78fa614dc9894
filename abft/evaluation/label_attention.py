"""What the heads of a model look at: induction-head rates and masses on labels, per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.losses import induction_heads
from abft.models.masses import forward_with_mass
from abft.prompts.builder import Prompt, PromptBuilder
from abft.prompts.collation import MASS_INPUTS

__all__ = ["HeadStatistics", "head_statistics"]


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Means over prompts, of the last row's attention; each `(L, H)` float32 on the CPU.

    Args:
        induction_rate: share of the prompts on which the head passes the induction-head filter.
        mass_correct: mass on the labels equal to the gold one.
        mass_wrong: mass on the other labels.
        induction_heads: mean number of induction heads per prompt, over all layers.
    """

    induction_rate: Tensor
    mass_correct: Tensor
    mass_wrong: Tensor
    induction_heads: float

    @property
    def correct_share(self) -> Tensor:
        """Of the mass on labels, the part on correct ones, `(L, H)`; 0 for a head without any."""
        total = self.mass_correct + self.mass_wrong
        return torch.where(total > 0, self.mass_correct / total.clamp(min=1e-30), 0.0)

    def strongest_head(self) -> tuple[int, int]:
        """Layer and head that passes the filter on most prompts; ties go to the larger mass on labels."""
        score = self.induction_rate + (self.mass_correct + self.mass_wrong) * 1e-6
        layer, head = divmod(int(score.argmax()), score.shape[1])
        return layer, head

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and nested lists, for JSON."""
        tensors = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {"induction_heads": self.induction_heads, **tensors, "correct_share": self.correct_share.tolist()}


@torch.inference_mode()
def head_statistics(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Prompt],
    builder: PromptBuilder,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> HeadStatistics:
    """Reads the masses on label tokens of every head over `prompts`, in batches, without an N × N tensor.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        prompts: at least one.
        builder: the prompts' builder.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no prompts, or a model on another attention.
    """
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    with evaluation_mode(model):
        for _, batch in length_sorted_batches(prompts, builder, batch_size, "Reading heads", progress):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            passed: dict[str, Any] = {name: inputs[name] for name in MASS_INPUTS if name in inputs}
            outputs = forward_with_mass(model, **passed)
            masses = torch.stack([mass.squeeze(2) for mass in outputs.attentions])  # [L, B, H, 2]
            selected = induction_heads(masses, inputs["demonstrations"], inputs["prompt_lengths"])
            per_head = torch.cat([selected[..., None].to(masses.dtype), masses], dim=-1)
            sums.append(per_head.sum(dim=1).cpu())
    rate, correct, wrong = (torch.stack(sums).sum(0) / len(prompts)).float().unbind(-1)
    return HeadStatistics(rate, correct, wrong, rate.sum().item())
