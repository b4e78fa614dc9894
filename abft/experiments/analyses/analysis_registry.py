"""The list of analyses, in the order of a report."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from abft.experiments.analyses import connectivity, distance, icl_as_tuning, induction, last_row, momentum_attention
from abft.experiments.analyses.definition import Analysis

__all__ = ["ANALYSES", "stored_parts"]

ANALYSES: tuple[Analysis, ...] = (
    distance.ANALYSIS,
    connectivity.ANALYSIS,
    connectivity.METAICL,
    last_row.ANALYSIS,
    induction.ANALYSIS,
    icl_as_tuning.ANALYSIS,
    momentum_attention.ANALYSIS,
)


def _fields(row: Analysis) -> tuple[Any, ...]:
    return () if row.options is None else fields(row.options)


def stored_parts(analysis: dict[str, Any] | None) -> list[tuple[Analysis, Any]]:
    """Return each analysis with its result in `analysis.json`, if it was made with the options that it has today."""
    if analysis is None:
        return []
    made = analysis["options"]
    return [
        (row, analysis["parts"][row.name])
        for row in ANALYSES
        if row.name in analysis["parts"] and {option.name for option in _fields(row)} <= made.get(row.name, {}).keys()
    ]
