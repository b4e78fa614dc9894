"""Accuracy over the plane through the untrained model, E2E's and ABFT's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PretrainedConfig

from abft.analysis.plane import measure_plane
from abft.evaluation.suites import TaskSuite
from abft.experiments.analyses.definition import Analysis, Subject
from abft.plots import BLUE, new_figure

__all__ = ["ANALYSIS", "ConnectivityOptions"]


@dataclass(kw_only=True)
class ConnectivityOptions:
    """Options of the analysis `connectivity`."""

    plane_lowest: float = field(default=-0.5, metadata={"help": "lowest factor of the plane, for both models"})
    plane_highest: float = field(default=1.5, metadata={"help": "highest factor of the plane"})
    plane_steps: int = field(default=9, metadata={"help": "factors from the lowest to the highest, on each side"})


def _check(suite: TaskSuite, config: PretrainedConfig, options: ConnectivityOptions) -> None:
    if not options.plane_lowest < options.plane_highest or options.plane_steps < 2:
        raise ValueError(
            "plane_lowest must be below plane_highest and plane_steps 2 or more, got "
            f"{options.plane_lowest}, {options.plane_highest} and {options.plane_steps}"
        )


def _run(subject: Subject, options: ConnectivityOptions) -> dict[str, Any]:
    return measure_plane(
        subject.model,
        lambda e2e, abft: subject.at({"e2e": e2e, "abft": abft}),
        subject.suite.normal[: subject.prompts],
        factors=np.linspace(options.plane_lowest, options.plane_highest, options.plane_steps).tolist(),
        progress=subject.progress,
    )


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    figure, (plane, line) = new_figure(8.4, 3.1, 2)
    figure.set_layout_engine("constrained", wspace=0.1)
    factors, accuracy = found["factors"], 100 * np.array(found["accuracy"])
    levels = MaxNLocator(9).tick_values(accuracy.min(), max(accuracy.max(), accuracy.min() + 1))
    image = plane.contourf(factors, factors, accuracy.T, levels=levels, cmap="cividis")
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
    for (x, y), name, marker in (((0, 0), "untrained", "s"), ((1, 0), "E2E", "^"), ((0, 1), "ABFT", "o")):
        plane.plot(x, y, marker, color="white", markeredgecolor="black")
        plane.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, bbox=box)
    plane.set_xlabel("λ of E2E")
    plane.set_ylabel("λ of ABFT")
    figure.colorbar(image, ax=plane, label="accuracy, %")
    line.plot(found["line"]["step"], 100 * np.array(found["line"]["accuracy"]), "-o", color=BLUE)
    line.set_xlabel("from E2E (0) to ABFT (1)")
    line.set_ylabel("accuracy, %")
    line.set_ylim(0, 100)
    return figure, "Accuracy over θ₀ + λ₁(θ_E2E − θ₀) + λ₂(θ_ABFT − θ₀), and on the line between the two."


ANALYSIS = Analysis(
    "connectivity",
    _run,
    ConnectivityOptions,
    uses_prompts=True,
    needs_weights=True,
    methods=("abft", "e2e"),
    check=_check,
    figure=_figure,
)
