"""The colours and marks of each method in every figure: readable in print and by colour-blind readers."""

from __future__ import annotations

from typing import Any

from abft.experiments.methods import METHODS
from abft.plots import BLUE, GREEN, GREY, ORANGE

__all__ = ["STYLES", "integer_ticks", "plot_layers"]

PURPLE, SKY = "#CC79A7", "#56B4E9"
STYLES = {
    "vanilla": (GREY, "", "--", "s"), "calibration": (SKY, "xx", "--", "D"), "abft": (BLUE, "", "-", "o"),
    "e2e": (ORANGE, "//", "-.", "^"), "no_pid": (GREEN, "..", ":", "v"), "no_pid_no_filter": (SKY, "++", ":", "<"),
    "a0": (PURPLE, "\\\\", ":", ">"), "b0": ("#D55E00", "--", ":", "P"), "restricted": ("#F0E442", "oo", "-", "*"),
    "e2e_qk": ("#7A4A00", "**", "-.", "d"),
}  # fmt: skip
"""Method → colour, hatch, line style, marker."""


def plot_layers(axes: Any, method: str, values: Any) -> None:
    """Draw one value per layer as the method's curve."""
    color, _, line, marker = STYLES[method]
    axes.plot(range(len(values)), values, line, marker=marker, color=color, label=METHODS[method].title)
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    if len(values) <= 12:
        axes.set_xticks(range(len(values)))


def integer_ticks(*sides: Any) -> None:
    """Let the ticks of these sides (`axes.xaxis`, `axes.yaxis`) stand at whole numbers."""
    for side in sides:
        side.get_major_locator().set_params(integer=True)
