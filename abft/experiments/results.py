"""The finished runs of an experiment, read together: means over seeds and paired comparisons."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from abft.evaluation.metrics import PairedComparison, mean_and_error, paired_bootstrap
from abft.evaluation.suites import CALIBRATION, correct_by_query
from abft.experiments.methods import METHODS
from abft.experiments.runs import Run, read_experiment
from abft.losses import HeadCountController

__all__ = ["Results", "Value", "accuracy"]

Value = Callable[[dict[str, Any]], float | None]


class Results:
    """The finished runs of one experiment.

    Args:
        folder: that `abft experiment` wrote.

    Raises:
        FileNotFoundError, ValueError: it is none, of another version, or has no finished run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.content, self.runs = read_experiment(folder)
        if not self.runs:
            raise ValueError(f"{folder} holds no finished run yet; give the `abft experiment` command again")
        self.tasks: list[str] = self.content["tasks"]
        self.model: str = self.content["settings"]["model"]
        present = {run.key.method for run in self.runs}
        if any(CALIBRATION in tests for run in self.runs for tests in run.tests.values()):
            present.add("calibration")
        wanted = set(self.content["methods"])
        self.methods = [name for name in METHODS if name in present and name in wanted | {"vanilla"}]
        self.sizes = sorted({run.key.num_prompts for run in self.runs} - {0})

    @property
    def largest(self) -> int:
        """Return the largest number of training prompts; 0 if nothing was trained."""
        return max(self.sizes, default=0)

    def of(self, method: str, task: str, num_prompts: int | None = None) -> list[Run]:
        """Return the plain runs of a method that were trained (or, if untrained, tested) on the task."""
        name = "vanilla" if method == "calibration" else method
        size = 0 if not METHODS[method].trained else self.largest if num_prompts is None else num_prompts
        wanted = (name, task, size, "")
        return [run for run in self.runs if (run.key.method, run.key.task, run.key.num_prompts, run.key.grid) == wanted]

    def values(
        self,
        method: str,
        task: str,
        value: Value,
        *,
        test: str = "Normal",
        tested_on: str | None = None,
        num_prompts: int | None = None,
    ) -> list[float]:
        """Return one value per seed, read from the results of a test; empty where there are none."""
        test = CALIBRATION if method == "calibration" and test == "Normal" else test
        found = (run.tests.get(tested_on or task, {}).get(test) for run in self.of(method, task, num_prompts))
        return [number for result in found if result is not None and (number := value(result)) is not None]

    def summary(self, method: str, task: str, value: Value, **where: Any) -> tuple[float | None, float | None]:
        """Return mean and standard error over seeds, each None if it does not exist."""
        values = self.values(method, task, value, **where)
        return mean_and_error(values) if values else (None, None)

    def average(
        self, method: str, value: Value, *, test: str = "Normal", num_prompts: int | None = None
    ) -> tuple[float | None, float | None]:
        """Return the mean over tasks, and its mean and standard error over seeds; None unless every task was tested."""
        per_task = [self.values(method, task, value, test=test, num_prompts=num_prompts) for task in self.tasks]
        return _mean_over_seeds(per_task)

    def out_of_domain(self, method: str) -> tuple[float | None, float | None]:
        """Return accuracy on tasks other than the trained one, over all pairs: mean and standard error over seeds."""
        pairs = [
            self.values(method, task, accuracy, tested_on=other)
            for task in self.tasks
            for other in self.tasks
            if other != task
        ]
        return _mean_over_seeds(pairs)

    def compare(self, before: str, after: str, task: str | None = None) -> PairedComparison | None:
        """Compare two methods over the queries of a task, or of all, each query with its mean over draws and seeds."""
        pairs = []
        for name in [task] if task else self.tasks:
            first, second = (self._correctness(method, name) for method in (before, after))
            if first is None or second is None or len(first) != len(second):
                return None
            pairs.append((first, second))
        first, second = (np.concatenate(values) for values in zip(*pairs, strict=True))
        return paired_bootstrap(first, second) if len(first) > 1 else None

    def _correctness(self, method: str, task: str) -> np.ndarray | None:
        test = CALIBRATION if method == "calibration" else "Normal"
        found = [run.tests.get(task, {}).get(test) for run in self.of(method, task)]
        rows = [correct_by_query(result) for result in found if result is not None]
        return np.mean(rows, axis=0) if rows else None

    def head_losses(self) -> dict[str, tuple[float, float]]:
        """Return the runs whose induction heads fell below half of their first number: run → heads per prompt.

        The heads are those of the first and the last step, before its update.
        """
        found = {}
        for run in self.runs:
            history = (run.training or {}).get("history", [])
            counts = [entry["induction_heads"] for entry in history if "induction_heads" in entry]
            if counts and counts[-1] < HeadCountController.HEALTHY * counts[0]:
                found[run.key.folder] = (counts[0], counts[-1])
        return found

    def seconds(self, method: str, *, checkpoints: bool = False) -> tuple[float | None, float | None]:
        """Return training time in seconds, without or with saving checkpoints: mean and standard error over runs."""
        values = []
        for training in self._trainings(method):
            saving = training.get("checkpoint_seconds")  # None in runs of before, whose seconds include it
            if training["resumed"] or (saving is None and not checkpoints):
                continue  # a part of the time is not known
            values.append(training["seconds"] + (saving or 0.0 if checkpoints else 0.0))
        return mean_and_error(values) if values else (None, None)

    def trained_parameters(self, method: str) -> int | None:
        """Return the number of parameters that the method trains; None if no run says."""
        return max((training.get("trained_parameters", 0) for training in self._trainings(method)), default=0) or None

    def _trainings(self, method: str) -> list[dict[str, Any]]:
        return [run.training for task in self.tasks for run in self.of(method, task) if run.training]


def _mean_over_seeds(places: list[list[float]]) -> tuple[float | None, float | None]:
    """Return mean and standard error over seeds of the mean over places; None unless each place has a seed.

    Args:
        places: of each task, or pair of tasks, one value per seed.
    """
    seeds = min(map(len, places), default=0)
    if not seeds:
        return None, None
    return mean_and_error([float(np.mean([values[seed] for values in places])) for seed in range(seeds)])


def accuracy(result: dict[str, Any]) -> float:
    """Return the accuracy of a test's result."""
    return result["accuracy"]
