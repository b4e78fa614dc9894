"""`abft reproduce`: tables and figures of the paper, one command each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from abft.cli.command import Command, write_note

if TYPE_CHECKING:
    from abft.experiments.experiment import ExperimentOptions

__all__ = ["COMMAND"]


class _List(argparse.Action):
    """Prints the recipes and leaves, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from rich.console import Console

        from abft.experiments.recipes import recipe_table

        Console().print(recipe_table())
        parser.exit()


def _options() -> tuple[Any, ...]:
    from abft.experiments.experiment import ExperimentOptions

    return (ExperimentOptions,)


def run(options: ExperimentOptions, further: argparse.Namespace) -> int:
    """Run the experiments and analyses of the recipes, and write one report; return 0."""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from abft.experiments.analyze import AnalyzeOptions, analyze
    from abft.experiments.experiment import Experiment
    from abft.experiments.recipes import find_recipes, options_of
    from abft.experiments.report import write_report

    disable_progress_bar()
    recipes = find_recipes(further.recipe)
    # All are checked before the first one runs.
    experiments = [Experiment(options_of(recipe, options)) for recipe in recipes]
    console = Console()
    for recipe, experiment in zip(recipes, experiments, strict=True):
        console.rule(f"{recipe.name}: {recipe.title}")
        experiment.run()
        if recipe.parts:
            analyze(
                AnalyzeOptions(experiment=str(experiment.output), parts=list(recipe.parts), quiet=options.quiet),
            )
    shown = ", ".join(f"{recipe.name} → {', '.join(recipe.shows)}" for recipe in recipes)
    console.print(f"in the report: {shown}", highlight=False)
    folder = experiments[0].output
    write_note(write_report([folder], folder / "report.html", figures=folder / "figures"))
    return 0


COMMAND = Command(
    "reproduce",
    "make tables and figures of the paper by name, on any model (--list names them)",
    run,
    _options,
    {
        "recipe": {"nargs": "+", "metavar": "RECIPE", "help": "such as table1 or fig7; all for every one"},
        "--list": {"action": _List, "nargs": 0, "help": "print the recipes and what each needs"},
    },
)
