"""`abft experiment`: train and test methods × tasks × seeds, and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from abft.cli.command import Command, write_note

if TYPE_CHECKING:
    from abft.experiments.experiment import ExperimentOptions

__all__ = ["COMMAND"]


def _options() -> tuple[Any, ...]:
    from abft.experiments.experiment import ExperimentOptions

    return (ExperimentOptions,)


def run(options: ExperimentOptions) -> int:
    """Run what is missing of the experiment, print its tables and write its report; return 0."""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from abft.experiments.claims import claims
    from abft.experiments.experiment import Experiment
    from abft.experiments.report import write_report
    from abft.experiments.report_tables import overview_table
    from abft.experiments.results import Results

    disable_progress_bar()  # a bar for each time that the model is read from disk
    experiment = Experiment(options)
    experiment.run()
    results = Results(experiment.output)
    console = Console()
    console.print(overview_table([results]).rich())
    for claim in claims(results):
        if claim.holds is not None:
            console.print(f"{claim.text}: {claim.verdict}. {claim.evidence}", highlight=False)
    for name, (first, last) in results.head_losses().items():
        console.print(f"{name}: induction heads per prompt fell from {first:.1f} to {last:.1f}", highlight=False)
    write_note(write_report([experiment.output], experiment.output / "report.html"))
    return 0


COMMAND = Command(
    "experiment", "train, test and report methods × tasks × seeds of the paper's evaluation", run, _options
)
