"""The colours and marks of each method in every figure: readable in print and by colour-blind readers."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from abft.experiments.methods import METHODS
from abft.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

__all__ = ["STYLES", "Style", "generated_style", "integer_ticks", "plot_layers", "style_of"]

Style = tuple[str, str, str, str]
"""Colour, hatch, line style, marker."""

PURPLE, SKY = "#CC79A7", "#56B4E9"
STYLES: dict[str, Style] = {
    "vanilla": (GREY, "", "--", "s"), "calibration": (SKY, "xx", "--", "D"), "abft": (BLUE, "", "-", "o"),
    "e2e": (ORANGE, "//", "-.", "^"), "no_pid": (GREEN, "..", ":", "v"), "no_pid_no_filter": (SKY, "++", ":", "<"),
    "a0": (PURPLE, "\\\\", ":", ">"), "b0": (VERMILION, "--", ":", "P"), "restricted": ("#F0E442", "oo", "-", "*"),
    "e2e_qk": ("#7A4A00", "**", "-.", "d"), "share": ("#000000", "OO", "-", "X"),
    "metaicl": ("#882255", "||", ":", "h"), "share_no_pid": (GREEN, "..", "--", "1"),
    "share_no_award": (PURPLE, "\\\\", "--", "2"), "share_no_filter": (SKY, "++", "--", "3"),
}  # fmt: skip
"""By method; a method without a row takes one of :func:`generated_style`."""


def generated_style(number: int) -> Style:
    """Return a style for the setting of this number: 20 colours, seven markers and four lines, in turn."""
    color = to_hex(colormaps["tab20"](number % 20))
    return color, "/\\|-+xo."[number % 8], ("-", "--", "-.", ":")[number % 4], "os^vDP*"[number % 7]


def style_of(method: str) -> Style:
    """Return the style of a method."""
    return STYLES.get(method) or generated_style(list(METHODS).index(method))


def plot_layers(axes: Any, method: str, values: Any) -> None:
    """Draw one value per layer as the method's curve."""
    color, _, line, marker = style_of(method)
    axes.plot(range(len(values)), values, line, marker=marker, color=color, label=METHODS[method].title)
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    if len(values) <= 12:
        axes.set_xticks(range(len(values)))


def integer_ticks(*sides: Any) -> None:
    """Let the ticks of these sides (`axes.xaxis`, `axes.yaxis`) stand at whole numbers."""
    for side in sides:
        side.get_major_locator().set_params(integer=True)
