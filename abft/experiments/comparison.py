"""`abft compare`: two runs on the same prompts, paired query by query."""

from __future__ import annotations

import os
from pathlib import Path

from abft.evaluation.metrics import paired_bootstrap
from abft.evaluation.suites import correct_by_query
from abft.experiments.methods import METHODS
from abft.experiments.runs import Run, read_run
from abft.experiments.tables import Table, points

__all__ = ["compare_runs"]


def compare_runs(before: str | os.PathLike[str], after: str | os.PathLike[str], test: str = "Normal") -> Table:
    """Return a table of two runs on the same prompts, task by task.

    Args:
        before, after: folders that hold a `run.json`.
        test: a test with predictions: Normal, Unseen, ZeroShot or Calibration.

    Raises:
        ValueError: a folder without a run, no common task, or other prompts.
    """
    runs: list[Run] = []
    for folder in (before, after):
        run = read_run(folder)
        if run is None:
            raise ValueError(f"{folder} holds no run.json; give a folder under runs/ of an experiment")
        runs.append(run)
    for name in ("k", "data", "limit", "staicc_compat", "staicc_labels", "published_order", "protocol"):
        values = [run.settings.get(name) for run in runs]
        if values[0] != values[1]:
            raise ValueError(f"the runs have different prompts: {name} is {values[0]!r} and {values[1]!r}")
    names = [
        ", ".join(filter(None, (Path(run.settings["model"]).name, METHODS[run.key.method].title, run.key.grid)))
        for run in runs
    ]
    table = Table(
        "comparison",
        f"{test}: {names[0]} against {names[1]}; difference in points with its 95 % interval (paired "
        "bootstrap over queries), p by the sign-flip test.",
        ["task", "before", "after", "difference", "95 % interval", "p"],
    )
    for task in runs[0].tests:
        results = [run.tests.get(task, {}).get(test) for run in runs]
        if any(result is None or "predictions" not in result for result in results):
            continue
        correct = [correct_by_query(result) for result in results if result is not None]
        if results[0]["labels"] != results[1]["labels"]:  # type: ignore[index]
            raise ValueError(f"task {task}: the runs were tested on different queries")
        found = paired_bootstrap(*correct)
        table.rows.append(
            [
                task,
                *(f"{100 * sum(values) / len(values):.1f}" for values in correct),
                points(found.difference),
                f"{points(found.low)} to {points(found.high)}",
                f"{found.p_value:.3g}",
            ]
        )
    if not table.rows:
        raise ValueError(f"the runs have no task in common that has the test {test}")
    return table
