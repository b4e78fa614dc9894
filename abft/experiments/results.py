"""What the runs of an experiment say together: means over seeds, paired comparisons, and whether the claims hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from abft.evaluation.metrics import PairedComparison, mean_and_error, paired_bootstrap
from abft.evaluation.suites import CALIBRATION, correct_by_query
from abft.experiments.methods import METHODS
from abft.experiments.runs import Run, read_experiment

__all__ = ["PAPER", "Claim", "Results", "paper_averages"]

PAPER = {
    "gpt2-large": (45.86, 63.21), "gpt2-xl": (50.13, 67.74), "falcon3-7b": (67.55, 79.59), "llama-3-8b": (66.60, 80.20),
    "llama3-8b": (66.60, 80.20), "qwen2.5-32b": (75.29, 79.64), "llama3-56b": (70.95, 79.52),
}  # fmt: skip
"""Mean accuracy over the eight data sets, vanilla and ABFT, in %: arXiv 2505.14233, Table 1."""

SAME = 0.03
"""Accuracies that differ by less are called level."""
NOISE = 0.01
"""Ablations whose averages differ by less count as equal."""
LONGER = 1.05
"""Ratio of times from which on one is called longer."""


def paper_averages(model: str) -> tuple[float, float] | None:
    """The paper's averages, vanilla and ABFT, in %, for a model of that name or folder; None if it has none."""
    name = Path(model).name.lower().removeprefix("meta-").removesuffix("-base").removesuffix("-hf")
    return PAPER.get(name)


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, and what was found.

    Args:
        text: the claim.
        holds: None if the experiment does not tell.
        evidence: figures, and the criterion.
    """

    text: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        return {True: "holds here", False: "does not hold here", None: "not tested"}[self.holds]


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
        """The largest number of training prompts; 0 if nothing was trained."""
        return max(self.sizes, default=0)

    def of(self, method: str, task: str, num_prompts: int | None = None) -> list[Run]:
        """The runs of a method that were trained (or, untrained, tested) on the task."""
        name = "vanilla" if method == "calibration" else method
        size = 0 if not METHODS[method].trained else self.largest if num_prompts is None else num_prompts
        return [run for run in self.runs if (run.key.method, run.key.task, run.key.num_prompts) == (name, task, size)]

    def values(
        self, method: str, task: str, value: Value, *, test: str = "Normal", tested_on: str | None = None,
        num_prompts: int | None = None,
    ) -> list[float]:  # fmt: skip
        """One value per seed, read from the results of a test; empty where there are none."""
        test = CALIBRATION if method == "calibration" and test == "Normal" else test
        found = (run.tests.get(tested_on or task, {}).get(test) for run in self.of(method, task, num_prompts))
        return [number for result in found if result is not None and (number := value(result)) is not None]

    def summary(self, method: str, task: str, value: Value, **where: Any) -> tuple[float | None, float | None]:
        """Mean and standard error over seeds, each None if it does not exist."""
        values = self.values(method, task, value, **where)
        return mean_and_error(values) if values else (None, None)

    def average(
        self, method: str, value: Value, *, test: str = "Normal", num_prompts: int | None = None
    ) -> tuple[float | None, float | None]:
        """Over the tasks, then over seeds; None unless every task has been tested."""
        per_task = [self.values(method, task, value, test=test, num_prompts=num_prompts) for task in self.tasks]
        seeds = min(map(len, per_task))
        if not seeds:
            return None, None
        return mean_and_error([float(np.mean([values[seed] for values in per_task])) for seed in range(seeds)])

    def out_of_domain(self, method: str) -> tuple[float | None, float | None]:
        """Accuracy on tasks other than the trained one, over all pairs; mean and standard error over seeds."""
        pairs = [
            self.values(method, task, accuracy, tested_on=other)
            for task in self.tasks
            for other in self.tasks
            if other != task
        ]
        seeds = min(map(len, pairs), default=0)
        if not seeds:
            return None, None
        return mean_and_error([float(np.mean([values[seed] for values in pairs])) for seed in range(seeds)])

    def compare(self, before: str, after: str, task: str | None = None) -> PairedComparison | None:
        """Paired over the queries of a task, or of all; of each query the mean over its draws and the seeds."""
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

    def seconds(self, method: str) -> tuple[float | None, float | None]:
        """Training time, mean and standard error over tasks and seeds."""
        values = [
            run.training["seconds"]
            for task in self.tasks
            for run in self.of(method, task)
            if run.training and not run.training["resumed"]  # what came before the interruption was not timed
        ]
        return mean_and_error(values) if values else (None, None)

    # --- the paper's claims ------------------------------------------------------------------------------

    def claims(self) -> list[Claim]:
        """The paper's claims, each with what these runs say of it."""
        return [self._gain(), self._level(), self._transfer(), self._consistency(), self._ablations(), self._time()]

    def _gain(self) -> Claim:
        text = "ABFT is more accurate than the untrained model"
        found = self.compare("vanilla", "abft")
        if found is None:
            return Claim(text, None, "needs the methods vanilla and abft, and the test Normal")
        return Claim(
            text, found.low > 0,
            f"{100 * found.difference:+.1f} points over all tasks, 95 % interval {100 * found.low:+.1f} to "
            f"{100 * found.high:+.1f} (paired bootstrap over queries)",
        )  # fmt: skip

    def _level(self) -> Claim:
        text = "ABFT is level with E2E at 512 training prompts or fewer"
        found = self.compare("e2e", "abft")
        if found is None or self.largest > 512:
            return Claim(text, None, "needs the methods abft and e2e at 512 prompts or fewer")
        return Claim(
            text, abs(found.difference) < SAME,
            f"ABFT − E2E in domain {100 * found.difference:+.1f} points, 95 % interval {100 * found.low:+.1f} to "
            f"{100 * found.high:+.1f}; level means less than {100 * SAME:.0f} points apart",
        )  # fmt: skip

    def _transfer(self) -> Claim:
        text = "On tasks that it was not trained on, ABFT does better than E2E"
        (abft, _), (e2e, _) = self.out_of_domain("abft"), self.out_of_domain("e2e")
        if abft is None or e2e is None:
            return Claim(text, None, "needs abft and e2e, two tasks and --generalization True")
        vanilla, _ = self.average("vanilla", accuracy)
        untrained = "" if vanilla is None else f", untrained {100 * vanilla:.1f} %"
        return Claim(
            text, abft > e2e, f"over all pairs of tasks: ABFT {100 * abft:.1f} %, E2E {100 * e2e:.1f} %{untrained}"
        )  # fmt: skip

    def _consistency(self) -> Claim:
        text = "ABFT makes predictions more consistent over templates and demonstrations"
        differences = {}
        for test, what in (("TempSensitivity", "templates"), ("DemoSensitivity", "demonstrations")):
            (before, _), (after, _) = (self.average(method, _consistency, test=test) for method in ("vanilla", "abft"))
            if before is not None and after is not None:
                differences[what] = (before, after)
        if len(differences) < 2:
            return Claim(text, None, "needs the tests TempSensitivity and DemoSensitivity")
        return Claim(
            text, all(after > before for before, after in differences.values()),
            "; ".join(f"{what} {100 * a:.1f} → {100 * b:.1f} %" for what, (a, b) in differences.items()),
        )  # fmt: skip

    def _ablations(self) -> Claim:
        text = "Ablations in the paper's order: ABFT, without PID, without PID and filter, A = 0, B = 0"
        names = ("abft", "no_pid", "no_pid_no_filter", "a0", "b0")
        found = [self.average(name, accuracy)[0] for name in names]
        known = [mean for mean in found if mean is not None]
        if len(known) < len(names):
            return Claim(text, None, "needs --methods ablation")
        falls = all(later <= earlier + NOISE for earlier, later in pairwise(known))
        apart = all(earlier - later >= NOISE for earlier, later in pairwise(known))
        return Claim(
            text, falls and apart,
            ", ".join(f"{METHODS[name].title} {100 * mean:.1f}" for name, mean in zip(names, known, strict=True))
            + f" %; {100 * NOISE:.0f} point or more apart counts as a difference"
            + ("; no step contradicts the order, but not every step is one" if falls and not apart else ""),
        )  # fmt: skip

    def _time(self) -> Claim:
        text = "Training end to end takes longer than ABFT"
        (abft, _), (e2e, _) = self.seconds("abft"), self.seconds("e2e")
        if abft is None or e2e is None:
            return Claim(text, None, "needs the methods abft and e2e")
        return Claim(
            text, e2e / abft >= LONGER,
            f"E2E / ABFT = {e2e / abft:.2f} (the paper: 2.2 to 2.7, with the published code); timed once per run, "
            f"beside whatever else the machine did; longer means {LONGER} and more",
        )  # fmt: skip


def accuracy(result: dict[str, Any]) -> float:
    return result["accuracy"]


def _consistency(result: dict[str, Any]) -> float:
    return result["consistency"]
