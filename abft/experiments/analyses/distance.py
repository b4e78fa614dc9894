"""The distance that training moved W_Q and W_K, by layer."""

from __future__ import annotations

from matplotlib.figure import Figure

from abft.analysis.weight_change import weight_distance
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.styles import plot_layers
from abft.plots import new_figure

__all__ = ["ANALYSIS"]


def _run(subject: Subject, options: None) -> dict[str, list[float]]:
    return {name: weight_distance(subject.model, change).tolist() for name, change in subject.differences.items()}


def _figure(values: dict[str, list[float]]) -> tuple[Figure, str]:
    figure, axes = new_figure(4.2, 2.8)
    for name, layers in values.items():
        plot_layers(axes, name, layers)
    axes.set_ylabel("‖ΔW‖ / ‖W‖")
    axes.legend(frameon=False, fontsize=8)
    return figure, "How far training moved W_Q and W_K, by layer (relative Frobenius norm)."


ANALYSIS = Analysis("distance", _run, needs_weights=True, quantized=False, figure=_figure)
