"""`abft analyze`: look into the models of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft.cli.command import Command, write_note

if TYPE_CHECKING:
    from abft.experiments.analyze import AnalyzeOptions

__all__ = ["COMMAND"]


def _options() -> tuple[Any, ...]:
    from abft.experiments.analyses.analysis_registry import ANALYSES
    from abft.experiments.analyze import AnalyzeOptions

    return (AnalyzeOptions, *(row.options for row in ANALYSES if row.options is not None))


def run(options: AnalyzeOptions, *of_analyses: Any) -> int:
    """Run the analyses that are missing, and write them and the report; return 0."""
    from abft.experiments.analyze import analyze
    from abft.experiments.report import write_report

    analyze(options, *of_analyses)
    folder = Path(options.experiment)
    write_note([folder / "analysis.json", *write_report([folder], folder / "report.html")])
    return 0


COMMAND = Command(
    "analyze",
    "show what training changed inside: attention, weights, mode connectivity, implicit fine-tuning",
    run,
    _options,
)
