"""The objectives on label masses: ABFT's loss (arXiv 2505.14233) with its steered penalty, and the share loss."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abft.losses import ABFTLoss, HeadCountController, MassAwardController, abft_loss, check_mass_award, share_loss
from abft.training.objectives.objective import Batch, MassObjective, SampleLosses
from abft.training.options import TrainingOptions

__all__ = ["AttentionBehavior", "LabelShare"]


class _LabelMass(MassObjective):
    """A loss on the masses of label tokens, which counts induction heads; a subclass computes :meth:`loss`.

    Attributes:
        controller: holds the weight that is steered, A or κ, and the induction heads per prompt of each step.
    """

    def __init__(self, options: TrainingOptions) -> None:
        super().__init__(options)
        self.controller = self.make_controller(options)
        self._warned = False

    @abstractmethod
    def make_controller(self, options: TrainingOptions) -> HeadCountController:
        """Return what records the head counts and steers a weight by them."""

    @abstractmethod
    def loss(self, masses: Sequence[Tensor], *counts: Tensor, **shared: Any) -> ABFTLoss:
        """Compute the loss; arguments as of :func:`abft.abft_loss`."""

    @classmethod
    def mixing(cls, options: TrainingOptions) -> tuple[str, ...]:
        return ("per_head_mean",) if options.per_head_mean else ()

    def losses(self, outputs: Sequence[Tensor], batch: Batch) -> SampleLosses:
        result = self.loss(
            outputs,
            batch["correct_demonstrations"],
            batch["demonstrations"],
            batch["prompt_lengths"],
            head_filter=self.options.head_filter,
            per_head_mean=self.options.per_head_mean,
            row_weights=batch.get("row_weights"),
        )
        heads = result.head_counts.sum().to(torch.float32)
        statistics = {
            "heads": heads,
            "mass_correct": torch.nan_to_num(result.mass_correct) * heads,
            "mass_wrong": torch.nan_to_num(result.mass_wrong) * heads,
        }
        return SampleLosses(result.per_prompt, statistics)

    def end_step(self, sums: Mapping[str, float], samples: float) -> dict[str, float]:
        head_count = sums["heads"] / samples
        self.controller.update(head_count)
        self._warn_of_collapse(head_count)
        heads = max(sums["heads"], 1.0)
        return {
            "induction_heads": head_count,
            "mass_correct": sums["mass_correct"] / heads,
            "mass_wrong": sums["mass_wrong"] / heads,
        }

    @property
    def collapsed(self) -> bool:
        return self.controller.collapsed

    @property
    def healthy(self) -> bool:
        return self.controller.healthy

    def _warn_of_collapse(self, head_count: float) -> None:
        """Warn once if hardly any head passes the filter."""
        if self._warned or not self.controller.collapsed:
            return
        self._warned = True
        first = self.controller.head_counts[0]
        warnings.warn(
            f"step {len(self.controller.head_counts)}: induction heads per prompt fell from {first:.2f} to "
            f"{head_count:.2f}; attention is collapsing. Lower the learning rate (now {self.options.learning_rate:g}), "
            "or stop and go back to the weights before it with stop_on_collapse=True"
            if first
            else "no head passes the induction-head filter, so nothing is trained: this model does not look at label "
            "tokens, or at the keys of targets. Use a larger model, more demonstrations, or head_filter=False",
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(dict(state))


class AttentionBehavior(_LabelMass):
    """The ABFT loss (:func:`abft.abft_loss`); a controller sets A after each optimizer step."""

    name = "abft"
    description = "attention mass on correct labels (the paper's loss)"
    ignores = ("mass_award", "mass_floor")

    def make_controller(self, options: TrainingOptions) -> HeadCountController:
        return HeadCountController(options.wrong_penalty, *_gains(options))

    @classmethod
    def plan_modes(cls) -> dict[str, bool]:
        return {}  # takes what the share loss takes

    @classmethod
    def check_options(cls, options: TrainingOptions) -> None:
        super().check_options(options)
        for name in ("wrong_penalty", "correct_award", "unmatched_weight"):
            if getattr(options, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(options, name)}")

    def loss(self, masses: Sequence[Tensor], *counts: Tensor, **shared: Any) -> ABFTLoss:
        return abft_loss(
            masses,
            *counts,
            wrong_penalty=self.controller.weight,
            correct_award=self.options.correct_award,
            unmatched_weight=self.options.unmatched_weight,
            **shared,
        )

    def end_step(self, sums: Mapping[str, float], samples: float) -> dict[str, float]:
        used_penalty = self.controller.weight
        return {**super().end_step(sums, samples), "wrong_penalty": used_penalty}


class LabelShare(_LabelMass):
    """The share loss (:func:`abft.share_loss`); a controller sets κ after each optimizer step."""

    name = "share"
    description = "share of correct labels in the attention on labels, -log(m+ / S) - kappa log S"
    ignores = ("wrong_penalty", "correct_award", "unmatched_weight")

    def make_controller(self, options: TrainingOptions) -> HeadCountController:
        return MassAwardController(options.mass_award, *_gains(options))

    @classmethod
    def plan_modes(cls) -> dict[str, bool]:
        return {"full": False, "restricted": True}

    @classmethod
    def check_options(cls, options: TrainingOptions) -> None:
        super().check_options(options)
        check_mass_award(options.mass_award)
        if options.mass_floor < 0:
            raise ValueError(f"mass_floor must not be negative, got {options.mass_floor}")

    def loss(self, masses: Sequence[Tensor], *counts: Tensor, **shared: Any) -> ABFTLoss:
        award, floor = self.controller.weight, self.options.mass_floor
        return share_loss(masses, *counts, mass_award=award, mass_floor=floor, **shared)

    def end_step(self, sums: Mapping[str, float], samples: float) -> dict[str, float]:
        used_award = self.controller.weight
        return {**super().end_step(sums, samples), "mass_award": used_award}


def _gains(options: TrainingOptions) -> tuple[Any, ...]:
    return (
        options.adaption,
        options.pid_proportional,
        options.pid_integral,
        options.pid_derivative,
        options.pid_relative,
    )
