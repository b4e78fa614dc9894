"""E2E, the paper's baseline: cross-entropy of the gold label token at the last position."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from abft.training.objectives.objective import Batch, LogitObjective, SampleLosses

__all__ = ["EndToEnd"]


class EndToEnd(LogitObjective):
    """Cross-entropy of the gold label's first token, over the same parameters and samples as ABFT."""

    name = "e2e"
    description = "cross-entropy of the gold label token (the paper's baseline)"
    sample_needs = ("label_id",)

    def losses(self, outputs: Tensor, batch: Batch) -> SampleLosses:
        return SampleLosses(F.cross_entropy(outputs.float(), batch["label_ids"], reduction="none"), {})
