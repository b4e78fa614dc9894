"""The distance that training moved W_Q and W_K, by layer: relative to their norms, and absolute as in the paper."""

from __future__ import annotations

from matplotlib.figure import Figure

from abft.analysis.weight_change import weight_shift
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.methods import METHODS
from abft.experiments.styles import STYLES, plot_layers
from abft.plots import new_figure

__all__ = ["ANALYSIS"]

Shifts = dict[str, dict[str, list[float]]]
"""Method → `relative`, `q` and `k` → a value by layer."""


def _run(subject: Subject, options: None) -> Shifts:
    return {
        method: {name: layers.tolist() for name, layers in weight_shift(subject.model, change).items()}
        for method, change in subject.differences.items()
    }


def _figure(values: Shifts) -> tuple[Figure, str]:
    figure, (relative, absolute) = new_figure(7.4, 2.8, 2)
    for method, shifts in values.items():
        plot_layers(relative, method, shifts["relative"])
        color, _, _, marker = STYLES[method]
        for part, line in (("q", "-"), ("k", ":")):
            label = f"{METHODS[method].title}, W_{part.upper()}"
            absolute.plot(range(len(shifts[part])), shifts[part], line, marker=marker, color=color, label=label)
    relative.set_ylabel("‖ΔW‖ / ‖W‖")
    absolute.set_xlabel("layer")
    absolute.set_ylabel("‖ΔW‖")
    absolute.set_ylim(bottom=0)
    absolute.set_xticks(relative.get_xticks())
    for axes in (relative, absolute):
        axes.legend(frameon=False, fontsize=8)
    return (
        figure,
        "How far training moved W_Q and W_K, by layer (Frobenius norms): relative, and each in absolute terms.",
    )


ANALYSIS = Analysis("distance", _run, needs_weights=True, quantized=False, figure=_figure)
