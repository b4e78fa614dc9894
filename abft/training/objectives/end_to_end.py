"""E2E, the paper's baseline, with and without the LM head, and MetaICL: cross-entropy of the gold label token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from abft.training.objectives.objective import Batch, LogitObjective, SampleLosses

__all__ = ["EndToEnd", "EndToEndProjections", "MetaICL"]


class EndToEndProjections(LogitObjective):
    """Cross-entropy of the gold label's first token, over the same parameters and samples as ABFT."""

    name = "e2e_qk"
    description = "cross-entropy of the gold label token, on the parameters of abft"
    sample_needs = ("label_id",)
    ignores = (
        "wrong_penalty",
        "correct_award",
        "adaption",
        "pid_proportional",
        "pid_integral",
        "pid_derivative",
        "pid_relative",
        "unmatched_weight",
        "mass_award",
        "mass_floor",
        "head_filter",
        "per_head_mean",
        "stop_on_collapse",
    )

    def losses(self, outputs: Tensor, batch: Batch) -> SampleLosses:
        return SampleLosses(F.cross_entropy(outputs.float(), batch["label_ids"], reduction="none"), {})


class EndToEnd(EndToEndProjections):
    """The same loss, on W_Q, W_K and the LM head (arXiv 2505.14233, section 3 and Table 2)."""

    name = "e2e"
    description = "cross-entropy of the gold label token, on the LM head too (the paper's baseline)"
    trains = "qk_head"


class MetaICL(EndToEndProjections):
    """The same loss on all parameters: MetaICL (Min et al., arXiv 2110.15943) with prompts of several tasks.

    The samples decide on the tasks; `abft experiment` takes all but the one that is tested.
    """

    name = "metaicl"
    description = "cross-entropy of the gold label token, on the whole model"
    trains = "model"
