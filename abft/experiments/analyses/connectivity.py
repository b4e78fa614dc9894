"""Accuracy over the plane through the untrained model, E2E's and ABFT's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from abft.analysis.weight_change import mode_connectivity
from abft.experiments.analyses.definition import Analysis, Subject
from abft.plots import BLUE, new_figure

__all__ = ["ANALYSIS", "ConnectivityOptions"]


@dataclass(kw_only=True)
class ConnectivityOptions:
    """Options of the analysis `connectivity`."""

    factors: list[float] = field(
        default_factory=lambda: [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25],
        metadata={"help": "factors of the plane through the untrained model, E2E's and ABFT's"},
    )


def _run(subject: Subject, options: ConnectivityOptions) -> dict[str, Any]:
    return mode_connectivity(
        subject.model,
        subject.differences["e2e"],
        subject.differences["abft"],
        subject.suite.normal[: subject.prompts],
        factors=options.factors,
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
    figure=_figure,
)
