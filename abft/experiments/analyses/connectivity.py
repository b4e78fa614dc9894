"""Accuracy over the plane through the untrained model and two trained ones, such as E2E's and ABFT's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PretrainedConfig

from abft.analysis.plane import measure_plane
from abft.evaluation.suites import TaskSuite
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.methods import METHODS
from abft.plots import BLUE, new_figure

__all__ = ["ANALYSIS", "METAICL", "ConnectivityOptions"]


@dataclass(kw_only=True)
class ConnectivityOptions:
    """Options of the analysis `connectivity`."""

    plane_methods: list[str] = field(
        default_factory=lambda: ["e2e", "abft"],
        metadata={"help": "the two methods that span the plane; on a 4-bit base e2e_qk in place of e2e"},
    )
    plane_lowest: float = field(default=-0.5, metadata={"help": "lowest factor of the plane, for both models"})
    plane_highest: float = field(default=1.5, metadata={"help": "highest factor of the plane"})
    plane_steps: int = field(default=9, metadata={"help": "factors from the lowest to the highest, on each side"})


def _methods(options: ConnectivityOptions) -> Sequence[str]:
    """Return the two methods.

    Raises:
        ValueError: another number of them, or a method that does not train.
    """
    if len(set(options.plane_methods)) != 2 or not all(
        m in METHODS and METHODS[m].trained for m in options.plane_methods
    ):
        raise ValueError(f"plane_methods must be two methods that train, got {options.plane_methods}")
    return options.plane_methods


def _check(suite: TaskSuite, config: PretrainedConfig, options: ConnectivityOptions) -> None:
    if not options.plane_lowest < options.plane_highest or options.plane_steps < 2:
        raise ValueError(
            "plane_lowest must be below plane_highest and plane_steps 2 or more, got "
            f"{options.plane_lowest}, {options.plane_highest} and {options.plane_steps}"
        )


def _run(subject: Subject, options: ConnectivityOptions | None) -> dict[str, Any]:
    """Measure the plane of the options; without any, that of MetaICL and ABFT."""
    options = options or ConnectivityOptions(plane_methods=["metaicl", "abft"])
    first, second = options.plane_methods
    found = measure_plane(
        subject.model,
        lambda x, y: subject.at({first: x, second: y}),
        subject.suite.normal[: subject.prompts],
        factors=np.linspace(options.plane_lowest, options.plane_highest, options.plane_steps).tolist(),
        progress=subject.progress,
    )
    return {**found, "methods": [first, second]}


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    figure, (plane, line) = new_figure(8.4, 3.1, 2)
    figure.set_layout_engine("constrained", wspace=0.1)
    factors, accuracy = found["factors"], 100 * np.array(found["accuracy"])
    levels = MaxNLocator(9).tick_values(accuracy.min(), max(accuracy.max(), accuracy.min() + 1))
    image = plane.contourf(factors, factors, accuracy.T, levels=levels, cmap="cividis")
    first, second = (METHODS[name].title for name in found["methods"])
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
    for (x, y), name, marker in (((0, 0), "untrained", "s"), ((1, 0), first, "^"), ((0, 1), second, "o")):
        plane.plot(x, y, marker, color="white", markeredgecolor="black")
        plane.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, bbox=box)
    plane.set_xlabel(f"λ₁ of {first}")
    plane.set_ylabel(f"λ₂ of {second}")
    figure.colorbar(image, ax=plane, label="accuracy, %")
    line.plot(found["line"]["step"], 100 * np.array(found["line"]["accuracy"]), "-o", color=BLUE)
    line.set_xlabel(f"from {first} (0) to {second} (1)")
    line.set_ylabel("accuracy, %")
    line.set_ylim(0, 100)
    return (
        figure,
        f"Accuracy over θ₀ + λ₁(θ₁ − θ₀) + λ₂(θ₂ − θ₀) of {first} and {second}, and on the line between them.",
    )


ANALYSIS = Analysis(
    "connectivity",
    _run,
    ConnectivityOptions,
    uses_prompts=True,
    needs_weights=True,
    methods=_methods,
    check=_check,
    figure=_figure,
)
METAICL = Analysis(
    "connectivity_metaicl",
    _run,
    uses_prompts=True,
    needs_weights=True,
    methods=lambda options: ("metaicl", "abft"),
    quantized=False,
    on_demand=True,
    figure=_figure,
)
"""Fig. 9, beside Fig. 7."""
