"""Metrics over several sets of predictions: consistency, bias, calibration, comparison; and StaICC's own arithmetic.

StaICC 0.1.1 has errors: a second softmax over probabilities, an ECE that drops confidence 1.0, unequal steps on GLER's
axis, consistency over all earlier calls. Only :func:`staicc_metrics` repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from abft.evaluation.classification import Evaluation

__all__ = [
    "PairedComparison",
    "calibrate",
    "consistency",
    "distribution_bias",
    "gler",
    "mean_and_error",
    "paired_bootstrap",
    "posterior_bias",
    "staicc_metrics",
]

STAICC_BINS = 10


def consistency(predictions: Tensor) -> float:
    """Return the mean over queries of the share of variants that give the most frequent prediction.

    Args:
        predictions: `(V, Q)` int64, the predicted class of each query under each of V variants of the prompt.

    Raises:
        ValueError: no variants or no queries.
    """
    if predictions.ndim != 2 or 0 in predictions.shape:
        raise ValueError(f"predictions must be (variants, queries), got shape {tuple(predictions.shape)}")
    counts = torch.nn.functional.one_hot(predictions).sum(dim=0)  # [Q, C]
    return (counts.max(dim=1).values.double() / len(predictions)).mean().item()


def distribution_bias(probabilities: Tensor) -> dict[str, float | list[float]]:
    """Return a model's mean answer to queries without content, and its entropy.

    Args:
        probabilities: `(n, C)` floating point, over the labels.

    Returns:
        `distribution`, the mean probabilities, and `entropy` in nats, which is ln C for an unbiased model.
    """
    mean = probabilities.double().mean(dim=0)
    return {"distribution": mean.tolist(), "entropy": torch.special.entr(mean).sum().item()}


def posterior_bias(probabilities: Tensor, labels: Tensor) -> dict[str, float | list[float] | None]:
    """Return the distance of a model's mean prediction from the frequencies of the gold labels.

    Args:
        probabilities: `(n, C)` floating point.
        labels: `(n,)` int64.

    Returns:
        `difference`, mean probability minus frequency by class, and `kl`, KL(mean prediction ‖ frequencies) in nats;
        None, for infinity, if a predicted class is never gold.
    """
    mean = probabilities.double().mean(dim=0)
    frequency = torch.bincount(labels, minlength=len(mean)).double() / len(labels)
    kl = float(special.rel_entr(mean.numpy(), frequency.numpy()).sum())
    return {"difference": (mean - frequency).tolist(), "kl": kl if math.isfinite(kl) else None}


def gler(correct_label_shares: Sequence[float], values: Sequence[float]) -> float:
    """Return GLER as StaICC defines it (arXiv 2205.12685): the slope of a metric over the share of correct labels.

    Args:
        correct_label_shares: for each measurement, 1 − the share of demonstrations with a wrong label.
        values: for each measurement, the metric.

    Raises:
        ValueError: fewer than two different shares.
    """
    if len(set(correct_label_shares)) < 2:
        raise ValueError(f"a slope needs two different shares of correct labels, got {list(correct_label_shares)}")
    return float(stats.linregress(correct_label_shares, values).slope)


def calibrate(probabilities: Tensor, prior: Tensor) -> Tensor:
    """Calibrate probabilities in context (Zhao et al., arXiv 2102.09690): p / prior, normalised.

    Args:
        probabilities: `(n, C)` over the labels.
        prior: `(C,)`, the mean answer to prompts whose query is empty.
    """
    weighted = probabilities.double() / prior.double().clamp(min=1e-12)
    return (weighted / weighted.sum(dim=1, keepdim=True)).to(probabilities.dtype)


@dataclass(frozen=True)
class PairedComparison:
    """Difference of two accuracies on the same samples.

    Args:
        difference: mean of the second minus mean of the first.
        low, high: 95 % interval by the paired bootstrap (percentiles).
        p_value: two-sided, by the sign-flip permutation test on the differences.
    """

    difference: float
    low: float
    high: float
    p_value: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_bootstrap(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, resamples: int = 2000
) -> PairedComparison:
    """Compare two measurements of the same independent samples, such as how often each query was answered correctly.

    Args:
        before, after: n values each, in the same order.
        resamples: number of resamples of the bootstrap and of the permutation test, whose draws are fixed.

    Raises:
        ValueError: different numbers of samples, or fewer than two.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"a paired comparison needs the same two or more samples, got {len(before)} and {len(after)}")
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    mean = float(differences.mean())
    if not differences.any():
        return PairedComparison(0.0, 0.0, 0.0, 1.0)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(0), batch=100
    ).confidence_interval
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        rng=np.random.default_rng(0),
        batch=100,
        vectorized=True,
    )
    return PairedComparison(mean, float(interval.low), float(interval.high), float(test.pvalue))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error over repeats; the error of a single repeat is None."""
    error = float(stats.sem(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def staicc_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the figures that StaICC 0.1.1 would print for the same probabilities, its errors included.

    It takes probabilities for logits (unless every row sums to exactly 1 in floating point), so that likelihood and
    calibration come from a second softmax; F1 is averaged over all classes; a bin holds [b/10, (b+1)/10).
    """
    rows = [list(map(float, row)) for row in evaluation.probabilities]
    probabilities = torch.tensor(rows, dtype=torch.float64)
    if not all(sum(row) == 1 for row in rows):
        probabilities = probabilities.softmax(dim=1)
    labels, classes = evaluation.labels, probabilities.shape[1]
    confidence, predictions = probabilities.max(dim=1)
    correct = predictions == labels
    hits = torch.bincount(labels[correct], minlength=classes).double()
    support = torch.bincount(labels, minlength=classes) + torch.bincount(predictions, minlength=classes)
    ece = 0.0
    for index in range(STAICC_BINS):
        inside = (confidence >= index / STAICC_BINS) & (confidence < (index + 1) / STAICC_BINS)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].mean()
            ece += inside.double().mean().item() * abs(gap.item())
    return {
        "accuracy": correct.double().mean().item(),
        "averaged_truelabel_likelihood": probabilities.gather(1, labels[:, None]).mean().item(),
        "macro_F1": (2 * hits / support.clamp(min=1)).mean().item(),
        "expected_calibration_error_1": ece,
    }
