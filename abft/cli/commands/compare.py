"""`abft compare`: two runs side by side."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from abft.cli.command import Command

__all__ = ["COMMAND", "CompareOptions"]


@dataclass(kw_only=True)
class CompareOptions:
    """Compare two runs on the same prompts."""

    test: str = field(default="Normal", metadata={"help": "Normal, Unseen or Calibration"})


def run(options: CompareOptions, further: argparse.Namespace) -> int:
    """Print the table; return 0."""
    from rich.console import Console

    from abft.experiments.comparison import compare_runs

    Console().print(compare_runs(further.before, further.after, options.test).rich())
    return 0


COMMAND = Command(
    "compare",
    "compare two runs on the same prompts",
    run,
    lambda: (CompareOptions,),
    {
        "before": {"metavar": "RUN", "help": "folder with a run.json, under runs/ of an experiment"},
        "after": {"metavar": "RUN", "help": "another such folder"},
    },
)
