"""Training courses of several settings over one another (arXiv 2505.14233, Figs. 5 and 20 to 28)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from abft.evaluation.metrics import mean_and_error
from abft.experiments.methods import METHODS
from abft.experiments.results import Results
from abft.experiments.styles import Style, style_of
from abft.plots import new_figure

__all__ = ["course", "course_figure", "training_courses"]

History = Sequence[Mapping[str, float]]

PANELS = {
    "loss": "loss, first step = 1",
    "induction_heads": "induction heads per prompt",
    "wrong_penalty": "A",
    "mass_award": "κ",
    "mass_correct": "mass on correct labels",
    "mass_wrong": "mass on wrong labels",
}
"""Value of a training step → its axis. Losses of different methods have different units, so each is relative."""


def course(histories: Sequence[History], value: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the steps that all runs logged a value at, and its mean and standard error over the runs.

    Args:
        histories: of each run, what it logged (`trainer.state.log_history`).
        value: one of `PANELS`; a loss is divided by the run's first one.

    Returns:
        S steps, means `(S,)` and standard errors `(S,)`, 0 for a single run; all empty if a run lacks the value.
    """
    runs = [{int(entry["step"]): float(entry[value]) for entry in history if value in entry} for history in histories]
    if value == "loss":
        runs = [_relative(run) for run in runs]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    pairs = [mean_and_error([run[step] for run in runs]) for step in steps]
    return steps, np.array([mean for mean, _ in pairs]), np.array([error or 0.0 for _, error in pairs])


def _relative(run: Mapping[int, float]) -> dict[int, float]:
    """Return the values divided by the first; nothing if that is 0, which no ratio describes."""
    first = run[min(run)] if run else 0.0
    return {step: value / first for step, value in run.items()} if first else {}


def course_figure(settings: Mapping[str, Mapping[str, tuple[Style, Sequence[History]]]]) -> Figure | None:
    """Draw one row of panels per group, with the curve of each setting: mean over runs, band of one standard error.

    Args:
        settings: group (a task) → label of a setting → its style and the histories of its runs.

    Returns:
        The figure; None if no run logged anything.
    """
    found = {
        (group, label, value): found
        for group, by_label in settings.items()
        for label, (_, histories) in by_label.items()
        for value in PANELS
        if (found := course(histories, value))[0]
    }
    groups = [group for group in settings if any(key[0] == group for key in found)]
    values = [value for value in PANELS if any(key[2] == value for key in found)]
    if not found:
        return None
    figure, axes = new_figure(2.7 * len(values), 2.3 * len(groups) + 0.5, len(values), rows=len(groups), squeeze=False)
    handles: dict[str, Any] = {}
    for (group, label, value), (steps, means, errors) in found.items():
        color, _, line, marker = settings[group][label][0]
        axis = axes[groups.index(group)][values.index(value)]
        (handles[label],) = axis.plot(steps, means, line, color=color, label=label, marker=marker, markevery=0.25)
        axis.fill_between(steps, means - errors, means + errors, color=color, alpha=0.2, linewidth=0)
    for axis, value in zip(axes[0], values, strict=True):
        axis.set_title(PANELS[value], fontsize=9)
    for row, group in zip(axes, groups, strict=True):
        row[0].set_ylabel(group)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def training_courses(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw the course of every trained method on each task, mean and band over seeds."""
    settings = {
        task: {
            METHODS[name].title: (style_of(name), histories)
            for name in results.methods
            if (histories := [run.training["history"] for run in results.of(name, task) if run.training])
        }
        for task in results.tasks
    }
    figure = course_figure(settings)
    if figure is None:
        return {}
    return {
        "training": (
            figure,
            "Training: loss, induction heads per prompt, A or κ, and the attention of induction heads on labels; "
            "mean over seeds, bands: one standard error. E2E logs its loss alone.",
        )
    }
