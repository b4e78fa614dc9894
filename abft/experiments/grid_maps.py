"""Figures of a grid of options (arXiv 2505.14233, Fig. 6: A × B, with and without PID)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from abft.experiments.courses import course_figure
from abft.experiments.grid import changes_of, own_options
from abft.experiments.methods import METHODS
from abft.experiments.results import Results, accuracy
from abft.experiments.runs import Run
from abft.experiments.styles import generated_style
from abft.plots import new_figure

__all__ = ["GridRuns", "grid_figures"]

NAMES = {"wrong_penalty": "A", "correct_award": "B", "adaption": "adaption of A", "learning_rate": "learning rate"}
MOST_COURSES = 40
Point = tuple[Any, ...]


class GridRuns:
    """The runs of a grid by point; a point is the method and the value of each option that the grid varies.

    Args:
        results: of an experiment; its largest number of training prompts counts.

    Attributes:
        options: names of the options with several values, those with numbers first; the first two are the axes.
        values: by option, the values that occur, in order.
        runs: by point.
    """

    def __init__(self, results: Results) -> None:
        self.tasks = results.tasks
        grids = [run for run in results.runs if run.key.grid and run.key.num_prompts == results.largest]
        names = {name for run in grids for name in changes_of(run.key.grid)}
        methods = dict.fromkeys(run.key.method for run in grids)
        own = {method: own_options(METHODS[method], results.content["settings"]) for method in methods}
        plain = [run for run in results.runs if run.key.method in methods and not run.key.grid]
        found: dict[str, list[tuple[dict[str, Any], Run]]] = {method: [] for method in methods}
        for run in (*plain, *grids):
            if run.key.num_prompts == results.largest:
                changed = {**own[run.key.method], **changes_of(run.key.grid)}
                found[run.key.method].append(({name: changed[name] for name in names}, run))
        every = [values for pairs in found.values() for values, _ in pairs]
        self.values = {name: sorted({values[name] for values in every}, key=_order) for name in names}
        self.options = sorted(names, key=lambda name: (not _is_number(self.values[name][-1]), name))
        self.runs: dict[Point, list[Run]] = {}
        for method, pairs in found.items():
            for values, run in pairs:
                self.runs.setdefault((method, *(values[name] for name in self.options)), []).append(run)

    def accuracy(self, point: Point) -> float:
        """Return mean accuracy in % over the tasks, each over its seeds; NaN if the point lacks a task."""
        found = [(run.key.task, run.tests.get(run.key.task, {}).get("Normal")) for run in self.runs.get(point, ())]
        by_task = [
            [accuracy(normal) for name, normal in found if name == task and normal is not None] for task in self.tasks
        ]
        return 100 * float(np.mean([np.mean(values) for values in by_task])) if all(by_task) else float("nan")

    def panels(self) -> list[Point]:
        """Return the points without the two axes: method and values of the other options."""
        return sorted({(point[0], *point[3:]) for point in self.runs}, key=lambda panel: tuple(map(_order, panel)))

    def title(self, method: str, options: Sequence[str], values: Sequence[Any]) -> str:
        """Return method and values in words."""
        return ", ".join([METHODS[method].title, *map(_words, options, values)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, Any]:
    return (False, value) if _is_number(value) else (True, str(value))


def _words(name: str, value: Any) -> str:
    return f"{NAMES.get(name, name)} = {value:g}" if _is_number(value) else f"{NAMES.get(name, name)}: {value}"


def grid_figures(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw accuracy over the grid, and the training courses at its points; nothing without a grid."""
    grid = GridRuns(results)
    return {**_maps(grid), **_courses(grid)} if grid.options else {}


def _maps(grid: GridRuns) -> dict[str, tuple[Figure, str]]:
    across, *rest = grid.options
    down = rest[0] if rest else None
    columns, rows = grid.values[across], grid.values[down] if down else [None]
    values = {
        panel: np.array(
            [[grid.accuracy((panel[0], x, *([y] if down else []), *panel[1:])) for x in columns] for y in rows]
        )
        for panel in grid.panels()
    }
    if all(np.isnan(cells).all() for cells in values.values()):
        return {}
    lowest, highest = (fold([fold(cells) for cells in values.values()]) for fold in (np.nanmin, np.nanmax))
    width = max(2.2, 0.62 * len(columns) + 0.9)
    figure, axes = new_figure(width * len(values) + 1, 0.5 * len(rows) + 1.4, len(values), squeeze=False, sharey=True)
    for axis, (panel, cells) in zip(axes[0], values.items(), strict=True):
        image = axis.imshow(cells, vmin=lowest, vmax=max(highest, lowest + 1), cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(cells):
            if not np.isnan(value):
                bright = value > lowest + 0.6 * (highest - lowest)
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color="k" if bright else "w")
        axis.set_xticks(range(len(columns)), [_tick(value) for value in columns])
        axis.set_yticks(range(len(rows)), ["" if value is None else _tick(value) for value in rows])
        axis.set_xlabel(NAMES.get(across, across))
        axis.set_title(grid.title(panel[0], grid.options[2:], panel[1:]), fontsize=8)
    axes[0][0].set_ylabel("" if down is None else NAMES.get(down, down))
    figure.colorbar(image, ax=axes, label="accuracy, %")
    return {"grid": (figure, "Accuracy over the grid of options, mean over tasks and seeds.")}


def _tick(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value)


def _courses(grid: GridRuns) -> dict[str, tuple[Figure, str]]:
    if len(grid.runs) > MOST_COURSES:
        return {}
    settings: Mapping[str, Any] = {
        task: {
            grid.title(point[0], grid.options, point[1:]): (generated_style(number), histories)
            for number, (point, runs) in enumerate(grid.runs.items())
            if (histories := [run.training["history"] for run in runs if run.training and run.key.task == task])
        }
        for task in grid.tasks
    }
    figure = course_figure(settings)
    caption = "Training at each point of the grid, mean over seeds; bands: one standard error."
    return {} if figure is None else {"grid-training": (figure, caption)}
