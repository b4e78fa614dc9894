"""Attention of each head to the keys of prompts or targets: induction-head rates and masses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.losses import induction_heads
from abft.models.attention import transformer_of
from abft.models.masses import forward_with_mass
from abft.prompts.collation import MASS_INPUTS, Collator, padding_id
from abft.prompts.targets import AttentionTarget

__all__ = ["HeadStatistics", "HeadSums", "head_statistics", "read_heads"]


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Means over samples of the attention of their rows (of a prompt, the last row); each `(L, H)` float32 on the CPU.

    Args:
        induction_rate: share of the rows on which the head passes the induction-head filter.
        mass_correct: mass on positive keys; for prompts, the labels equal to the gold one.
        mass_wrong: mass on negative keys; for prompts, the other labels.
        induction_heads: mean number of induction heads per sample, over all layers.
    """

    induction_rate: Tensor
    mass_correct: Tensor
    mass_wrong: Tensor
    induction_heads: float

    @property
    def correct_share(self) -> Tensor:
        """Share of the mass on labels that is on correct ones, `(L, H)`; 0 for a head without mass on labels."""
        total = self.mass_correct + self.mass_wrong
        return torch.where(total > 0, self.mass_correct / total.clamp(min=1e-30), 0.0)

    def strongest_head(self) -> tuple[int, int]:
        """Return the layer and head that passes the filter most often; ties go to the larger mass on labels."""
        score = self.induction_rate + (self.mass_correct + self.mass_wrong) * 1e-6
        layer, head = divmod(int(score.argmax()), score.shape[1])
        return layer, head

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and nested lists, for JSON."""
        tensors = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {"induction_heads": self.induction_heads, **tensors, "correct_share": self.correct_share.tolist()}


class HeadSums:
    """Adds up the attention of heads batch by batch."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._samples = 0

    def add(self, masses: Sequence[Tensor], batch: Mapping[str, Tensor]) -> None:
        """Add the masses of a batch, one `(B, H, R, 2)` per layer; `batch` holds the collator's entries."""
        device = batch["row_weights"].device
        stacked = torch.stack([mass.to(device) for mass in masses])  # [L, B, H, R, 2]
        selected = induction_heads(stacked, batch["demonstrations"], batch["prompt_lengths"])
        per_row = torch.cat([selected[..., None].to(stacked.dtype), stacked], dim=-1)
        self._sums.append((per_row * batch["row_weights"][:, None, :, None]).sum(dim=(1, 3)).cpu())
        self._samples += stacked.shape[1]

    def statistics(self) -> HeadStatistics:
        """Return the means over the samples so far."""
        rate, positive, negative = (torch.stack(self._sums).sum(0) / self._samples).float().unbind(-1)
        return HeadStatistics(rate, positive, negative, rate.sum().item())


def head_statistics(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[AttentionTarget],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> HeadStatistics:
    """Read the masses of every head on the samples' positive and negative keys, in batches, without an N × N tensor.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        samples: a set of prompts, or attention targets; at least one.
        batch_size: samples per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no samples, or a model on another attention.
    """
    collate = Collator(padding_id(samples, transformer_of(model).config.get_text_config()))
    return read_heads(model, samples, collate, batch_size, progress)


def read_heads(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[AttentionTarget],
    collate: Collator,
    batch_size: int,
    progress: bool,
    on_logits: Callable[[list[int], Tensor], None] | None = None,
) -> HeadStatistics:
    """Read the masses of every head, and hand out the logits at the last column of each batch on the way.

    Args:
        model, samples, batch_size, progress: as for :func:`head_statistics`.
        collate: without packing.
        on_logits: called with the indices of a batch's samples and its logits `(B, vocabulary)`.
    """
    device = next(model.parameters()).device
    heads = HeadSums()
    with evaluation_mode(model):
        for indices, batch in length_sorted_batches(samples, collate, batch_size, "Reading heads", progress):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = forward_with_mass(model, **{name: inputs[name] for name in MASS_INPUTS if name in inputs})
            if on_logits is not None:
                on_logits(indices, outputs.logits[:, -1])
            heads.add(outputs.attentions, inputs)
    return heads.statistics()
