"""`abft report`: experiments as files to read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from abft.cli.command import Command, write_note

__all__ = ["COMMAND", "ReportOptions"]


@dataclass(kw_only=True)
class ReportOptions:
    """Write experiments as HTML, Markdown and LaTeX."""

    output: str = field(
        default="report.html", metadata={"help": "HTML file; .md, .tex and .json are written beside it"}
    )
    figures: str | None = field(default=None, metadata={"help": "folder to write the figures to, as PNG"})


def run(options: ReportOptions, further: argparse.Namespace) -> int:
    """Write the report; return 0."""
    from abft.experiments.report import write_report

    paths = write_report(further.experiments, options.output, paper=not further.no_paper, figures=options.figures)
    write_note(paths)
    return 0


COMMAND = Command(
    "report",
    "write experiments as one HTML file, and their tables as Markdown and LaTeX",
    run,
    lambda: (ReportOptions,),
    {
        "experiments": {"nargs": "+", "metavar": "EXPERIMENT", "help": "folder that `abft experiment` wrote"},
        "--no_paper": {"action": "store_true", "help": "leave out the paper's own figures"},
    },
)
