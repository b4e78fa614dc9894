"""`abft demo`: the built-in model, before and after training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from abft.cli.command import Command

__all__ = ["COMMAND", "DemoOptions"]


@dataclass
class DemoOptions:
    """Compare the built-in model as it is with ABFT and E2E."""

    output: str = field(default="demo_run", metadata={"help": "folder of the results; what it already holds is kept"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "training seeds"})
    quiet: bool = field(default=False, metadata={"help": "show no progress bars"})


def run(options: DemoOptions) -> int:
    """Train and evaluate the built-in model; return 0."""
    from transformers.utils.logging import disable_progress_bar

    from abft.demo.run import run_demo

    disable_progress_bar()  # a bar for each time the small model is read from disk
    return run_demo(Path(options.output), options.seeds, progress=not options.quiet)


COMMAND = Command(
    "demo", "train and evaluate the built-in model; needs no download and no GPU", run, lambda: (DemoOptions,)
)
