"""The losses on attention masses, and the controller of the paper's penalty; pure tensor functions.

Source: "Mechanistic Fine-tuning for In-context Learning" (arXiv 2505.14233), Eq. 1 (loss and filter), Eq. 3 (PID).

For a prompt with k demonstrations and n_t tokens of its own, and a head whose last row puts mass m⁺ on the
correct labels I⁺ and m⁻ on the wrong ones I⁻:

    induction head  ⇔  S = m⁺ + m⁻ > T = k / (k + ln n_t)
    L = A·m⁻ + B·(|I⁺| − m⁺)   for induction heads, 0 for the others        (the paper's, `abft_loss`)
    L = −log(m⁺ / S)           likewise, if I⁺ is not empty                  (the share, `share_loss`)
                − κ·log S

The first falls when a head looks away from all labels, wherever A·m⁻ outweighs B·m⁺, and always if I⁺ is empty. The
share's gradient never asks for that: with scores s_j of the row, m⁺ / S = Σ_{I⁺} e^{s_j} / Σ_I e^{s_j} holds the
scores of labels alone. Its gradient with respect to the score of any other key is 0, and over the labels it sums to 0:

    ∂L/∂s_j = P_j/S − [j ∈ I⁺]·P_j/m⁺   for j ∈ I,   0 elsewhere        (κ = 0)

It moves score from wrong labels to correct ones, and the sum of the labels' scores stays as it is. What it does not do
is hold S: a step that is common to many prompts may lower it. The award κ adds κ·(P_j − [j ∈ I]·P_j/S), which asks
every head that passes the filter to look at labels, right or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ABFTLoss",
    "HeadCountController",
    "MassAwardController",
    "abft_loss",
    "check_mass_award",
    "induction_heads",
    "induction_threshold",
    "share_loss",
]

Adaption = Literal["PID", "P", "none"]


class ABFTLoss(NamedTuple):
    """Loss and the statistics that training logs; all but `loss` and `per_prompt` without gradient."""

    loss: Tensor  # (), mean over the prompts of the sum over layers and heads
    per_prompt: Tensor  # (B,), with gradient: sums of it over micro-batches average exactly
    selected: Tensor  # (L, B, H) bool, the induction heads; of several rows (L, B, H, R)
    mass_correct: Tensor  # (), mean over the selected heads; NaN if there is none
    mass_wrong: Tensor  # (), likewise
    head_counts: Tensor  # (B,), induction heads of each prompt, weighted mean over its rows


def induction_threshold(demonstrations: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return T = k / (k + ln n_t), float32 in the shape of k and n_t, demonstrations and tokens (without padding)."""
    k = demonstrations.to(torch.float32)
    return k / (k + prompt_lengths.to(torch.float32).log())


def induction_heads(masses: Tensor, demonstrations: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return the heads that pass the filter S > T, without gradient.

    Bool `(L, B, H)` from masses `(L, B, H, 2)` and counts `(B,)`; of several rows `(L, B, H, R)` from
    `(L, B, H, R, 2)` and `(B, R)`.
    """
    threshold = induction_threshold(demonstrations, prompt_lengths)
    return masses.detach().sum(dim=-1) > threshold[:, None]


def abft_loss(
    masses: Tensor | Sequence[Tensor],
    correct_demonstrations: Tensor,
    demonstrations: Tensor,
    prompt_lengths: Tensor,
    *,
    wrong_penalty: float = 0.5,
    correct_award: float = 1.0,
    head_filter: bool = True,
    per_head_mean: bool = False,
    unmatched_weight: float = 1.0,
    row_weights: Tensor | None = None,
) -> ABFTLoss:
    """Compute Eq. 1: sum over layers and heads, mean over prompts.

    A prompt has one row, its last, or R rows, each with its own filter. With one row the counts are `(B,)` and masses
    `(L, B, H, 2)`; with R rows the counts are `(B, R)` and masses `(L, B, H, R, 2)`.

    Args:
        masses: on (correct, wrong) label tokens: one tensor as above, or a sequence of L tensors `(B, H, R, 2)`.
        correct_demonstrations: |I⁺|, the demonstrations that carry the gold label.
        demonstrations: k.
        prompt_lengths: n_t, the prompt's own tokens.
        wrong_penalty: A ≥ 0.
        correct_award: B ≥ 0.
        head_filter: train induction heads only; off, every head.
        per_head_mean: divide the loss of each prompt, or row, by its number of selected heads.
        unmatched_weight: weight of a prompt, or row, without a correct demonstration, where A·m⁻ acts alone; 1 in the
            paper.
        row_weights: with R rows, `(B, R)`: a prompt's loss is the sum of its rows' losses with these weights. None for
            one row of weight 1.

    Raises:
        ValueError: shapes that do not fit, or a negative A, B or weight.
    """
    counts = (correct_demonstrations, demonstrations, prompt_lengths)
    masses = _stacked(masses, counts[0])
    _check_shapes(masses, counts, row_weights)
    if min(wrong_penalty, correct_award, unmatched_weight) < 0:
        raise ValueError(
            f"A, B and unmatched_weight must not be negative, got A={wrong_penalty}, B={correct_award}, "
            f"unmatched_weight={unmatched_weight}"
        )
    correct, wrong = masses.unbind(-1)
    per_head = wrong_penalty * wrong + correct_award * (correct_demonstrations[:, None] - correct)
    if unmatched_weight != 1:
        matched = correct_demonstrations[:, None] > 0
        per_head = per_head * torch.where(matched, 1.0, unmatched_weight)
    return _reduce(per_head, masses, counts, head_filter, per_head_mean, row_weights)


def share_loss(
    masses: Tensor | Sequence[Tensor],
    correct_demonstrations: Tensor,
    demonstrations: Tensor,
    prompt_lengths: Tensor,
    *,
    head_filter: bool = True,
    per_head_mean: bool = False,
    mass_award: float = 0.0,
    mass_floor: float = 0.0,
    row_weights: Tensor | None = None,
) -> ABFTLoss:
    """Compute −log(m⁺ / S) − κ·log S of each induction head, S = m⁺ + m⁻: sum over layers and heads, mean over prompts.

    With κ = 0 this is the share of the correct labels in the attention on labels, with κ = 1 the log-mass −log m⁺.
    Prompts, or rows, without a correct demonstration have no share: their loss is 0, and their heads still count.

    Args:
        masses, correct_demonstrations, demonstrations, prompt_lengths, head_filter, per_head_mean, row_weights: as for
            :func:`abft_loss`.
        mass_award: κ, from 0 to 1: weight of −log S. The share itself does not hold S up: weights shared between
            prompts may still lower it.
        mass_floor: λ ≥ 0: heads with S > T/2 also pay λ·max(0, T − S), which keeps induction heads above the filter's
            threshold and lifts those that just miss it.

    Raises:
        ValueError: shapes that do not fit, κ out of its range, or a negative floor.
    """
    counts = (correct_demonstrations, demonstrations, prompt_lengths)
    masses = _stacked(masses, counts[0])
    _check_shapes(masses, counts, row_weights)
    check_mass_award(mass_award)
    if mass_floor < 0:
        raise ValueError(f"mass_floor must not be negative, got {mass_floor}")
    # Of a mass so small that the square of its inverse overflows, the gradient is 0.
    tiny = torch.finfo(masses.dtype).tiny ** 0.5
    total = masses.sum(dim=-1)
    share = (1 - mass_award) * total.clamp(min=tiny).log() - masses[..., 0].clamp(min=tiny).log()
    per_head = torch.where(correct_demonstrations[:, None] > 0, share, 0.0)
    floor = None
    if mass_floor:
        threshold = induction_threshold(demonstrations, prompt_lengths)[:, None]
        floor = mass_floor * (threshold - total).clamp(min=0) * (total.detach() > threshold / 2)
    return _reduce(per_head, masses, counts, head_filter, per_head_mean, row_weights, floor)


def check_mass_award(mass_award: float) -> None:
    """Raise a ValueError unless κ of :func:`share_loss` lies from 0 to 1."""
    if not 0 <= mass_award <= 1:
        raise ValueError(f"mass_award must lie from 0 to 1, got {mass_award}")


def _reduce(
    per_head: Tensor,
    masses: Tensor,
    counts: tuple[Tensor, Tensor, Tensor],
    head_filter: bool,
    per_head_mean: bool,
    row_weights: Tensor | None,
    floor: Tensor | None = None,
) -> ABFTLoss:
    """Sum the losses of the heads that pass the filter, and the `floor` of every head, prompt by prompt."""
    correct, wrong = masses.unbind(-1)
    _, demonstrations, prompt_lengths = counts
    if head_filter:
        selected = induction_heads(masses, demonstrations, prompt_lengths)
    else:
        selected = torch.ones_like(correct, dtype=torch.bool)
    summed = per_head * selected if floor is None else per_head * selected + floor
    per_prompt, head_counts = summed.sum(dim=(0, 2)), selected.sum(dim=(0, 2))
    if per_head_mean:
        per_prompt = per_prompt / head_counts.clamp(min=1)
    weights = torch.ones_like(head_counts) if row_weights is None else row_weights
    if head_counts.dim() == 2:
        per_prompt, head_counts = (per_prompt * weights).sum(dim=1), (head_counts * weights).sum(dim=1)
    with torch.no_grad():
        count = head_counts.sum()
        mass_correct = (correct * selected * weights[:, None]).sum() / count
        mass_wrong = (wrong * selected * weights[:, None]).sum() / count
    return ABFTLoss(per_prompt.mean(), per_prompt, selected, mass_correct, mass_wrong, head_counts)


def _stacked(masses: Tensor | Sequence[Tensor], counts: Tensor) -> Tensor:
    """Return the masses of all layers as one tensor on the device of the counts, without rows if the counts have none.

    The layers of a model may be spread over several devices.
    """
    if not isinstance(masses, Tensor):
        masses = torch.stack([mass.to(counts.device) for mass in masses])
        if counts.dim() == 1 and masses.dim() == 5 and masses.shape[3] == 1:
            masses = masses.squeeze(3)
    return masses


def _check_shapes(masses: Tensor, counts: tuple[Tensor, Tensor, Tensor], row_weights: Tensor | None) -> None:
    """Raise ValueError unless masses, counts and weights are of the same prompts and rows."""
    given = [tuple(count.shape) for count in counts]
    shape = given[0] if row_weights is None else tuple(row_weights.shape)
    several = row_weights is not None or shape[1:] == (1,)
    fits = masses.dim() == (5 if several else 4) and (masses.shape[1], *masses.shape[3:]) == (*shape, 2)
    if fits and given == [shape] * 3:
        return
    if row_weights is not None:
        raise ValueError(
            f"with row_weights of shape {shape} masses must have shape (layers, batch, heads, rows, 2) and counts "
            f"(batch, rows), got {tuple(masses.shape)} and {', '.join(map(str, given))}"
        )
    if masses.dim() == 5 and masses.shape[3] != 1:
        raise ValueError(
            f"masses must be of one row per prompt, got {masses.shape[3]} rows; ask the model for one query position, "
            "or give row_weights"
        )
    raise ValueError(
        f"masses must have shape (layers, batch={shape[0]}, heads, 2), got {tuple(masses.shape)}; ask the model for "
        "one query position per prompt and two key groups, correct and wrong"
    )


@dataclass
class HeadCountController:
    """A controller that steers a weight of the loss by the number of induction heads, once per optimizer step.

    As the paper has it (Eq. 3) the weight is A. With n̄_t the mean induction-head count per prompt of step t, for t > 2:

        A_t = A_{t−1} + Cp(n̄_t − n̄_{t−1}) + Ci(n̄_t − n̄_1) + Cd(n̄_t − 2n̄_{t−1} + n̄_{t−2}),   A ≥ 0

    `adaption="P"` keeps the first term alone, `"none"` keeps A fixed. The count of step t is known once its loss
    is computed, so A_t is used from step t + 1 on. The state is plain data: save it with :meth:`state_dict`.

    A moves in proportion to the number of heads: a model with a tenth of them moves it by a tenth. With `relative` the
    counts enter as shares of the first one, n̄_t / n̄_1, and the gains do not depend on that number.

    Args:
        weight: its first value.
        adaption, proportional, integral, derivative, relative: as above.
        head_counts: n̄_1, …, n̄_t.

    Raises:
        ValueError: an unknown adaption, or a weight out of its range.
    """

    weight: float = 0.5
    adaption: Adaption = "PID"
    proportional: float = 0.03
    integral: float = 0.005
    derivative: float = 0.005
    relative: bool = False
    head_counts: list[float] = field(default_factory=list)

    # A subclass may steer another weight: one that rises as heads vanish, or has a highest value.
    SIGN: ClassVar[float] = 1.0
    HIGHEST: ClassVar[float] = math.inf
    # Below this share of its first value the count is called collapsed.
    COLLAPSE: ClassVar[float] = 0.1
    # From this share on it is called healthy.
    HEALTHY: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.adaption not in ("PID", "P", "none"):
            raise ValueError(f"adaption must be 'PID', 'P' or 'none', got {self.adaption!r}")
        self.check_weight()

    def check_weight(self) -> None:
        """Raise ValueError for a weight out of its range."""
        if self.weight < 0:
            raise ValueError(f"A must not be negative, got {self.weight}")

    def update(self, head_count: float) -> float:
        """Record n̄_t and return the weight for the next step."""
        self.head_counts.append(float(head_count))
        if self.adaption != "none" and len(self.head_counts) > 2:
            before, last, now = self.head_counts[-3:]
            step = self.proportional * (now - last)
            if self.adaption == "PID":
                step += self.integral * (now - self.head_counts[0])
                step += self.derivative * (now - 2 * last + before)
            if self.relative:
                step /= max(self.head_counts[0], 1e-6)
            self.weight = min(self.HIGHEST, max(0.0, self.weight + self.SIGN * step))
        return self.weight

    @property
    def collapsed(self) -> bool:
        """True if the count has fallen to a tenth of its first value or below, or never was above 0."""
        return bool(self.head_counts) and self.head_counts[-1] <= self.COLLAPSE * self.head_counts[0]

    @property
    def healthy(self) -> bool:
        """True if the count is at least half of its first value."""
        return bool(self.head_counts) and self.head_counts[-1] >= self.HEALTHY * self.head_counts[0]

    def state_dict(self) -> dict[str, float | list[float]]:
        """Return the weight and the counts as plain data."""
        return {"weight": self.weight, "head_counts": list(self.head_counts)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.weight = float(state["weight"])
        self.head_counts = [float(count) for count in state["head_counts"]]


class MassAwardController(HeadCountController):
    """The same for κ of :func:`share_loss`: it rises as heads vanish and falls as they multiply, within 0 … 1."""

    SIGN: ClassVar[float] = -1.0
    HIGHEST: ClassVar[float] = 1.0

    def check_weight(self) -> None:
        check_mass_award(self.weight)
