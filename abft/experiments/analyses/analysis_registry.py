"""The list of analyses, in the order of a report."""

from __future__ import annotations

from abft.experiments.analyses import connectivity, distance, icl_as_tuning, induction, last_row, momentum_attention
from abft.experiments.analyses.definition import Analysis

__all__ = ["ANALYSES"]

ANALYSES: tuple[Analysis, ...] = (
    distance.ANALYSIS,
    connectivity.ANALYSIS,
    last_row.ANALYSIS,
    induction.ANALYSIS,
    icl_as_tuning.ANALYSIS,
    momentum_attention.ANALYSIS,
)
