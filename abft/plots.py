"""Tables and figures of runs; readable in print and by colour-blind readers (Okabe–Ito colours, hatches)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from abft.evaluation.label_attention import HeadStatistics

__all__ = ["accuracy_figure", "head_figure", "metrics_table", "new_figure", "training_figure"]

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_METRICS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "true_label_likelihood": ("likelihood", "{:.3f}"),
    "ece": ("ECE", "{:.3f}"),
    "induction_heads": ("induction heads", "{:.2f}"),
}


def metrics_table(rows: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return a table with one row per run: the metrics of its evaluation."""
    shown = [name for name in _METRICS if any(name in metrics for metrics in rows.values())]
    table = Table("", *(_METRICS[name][0] for name in shown), title=title)
    for run, metrics in rows.items():
        table.add_row(run, *(_METRICS[name][1].format(metrics[name]) if name in metrics else "" for name in shown))
    return table


def new_figure(width: float, height: float, columns: int = 1, *, rows: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure of this size in inches with rows of panels, drawn without a display; and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **kwargs)


def accuracy_figure(vanilla: float, runs: Mapping[str, Sequence[float]], n: int) -> Figure:
    """Draw the accuracy of each method, one point per training seed, over the untrained model's line.

    Args:
        vanilla: accuracy of the untrained model, 0 … 1.
        runs: method → accuracies over seeds.
        n: test prompts, for the band of one standard error around vanilla.
    """
    figure, axes = new_figure(4.2, 3.2)
    for index, values in enumerate(runs.values()):
        mean = sum(values) / len(values)
        color, hatch = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."))[index % 3]
        axes.bar(index, 100 * mean, width=0.55, color=color, hatch=hatch, edgecolor="white", alpha=0.85)
        spread = [index + 0.12 * (i - (len(values) - 1) / 2) / max(1, len(values) - 1) * 2 for i in range(len(values))]
        axes.plot(spread, [100 * value for value in values], "o", color="black", markersize=3.5)
        axes.annotate(f"{100 * mean:.1f}", (index, 2), ha="center", color="white", fontweight="bold")
    error = 100 * (vanilla * (1 - vanilla) / n) ** 0.5
    axes.axhspan(100 * vanilla - error, 100 * vanilla + error, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(100 * vanilla, color=GREY, linestyle="--", label=f"vanilla {100 * vanilla:.1f} (± 1 s.e.)")
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set_ylabel(f"in-context accuracy, % ({n} prompts)")
    axes.set_ylim(0, 100)
    axes.legend(loc="upper right", frameon=False)
    return figure


def head_figure(before: HeadStatistics, after: HeadStatistics, names: tuple[str, str] = ("before", "after")) -> Figure:
    """Draw the share of each head's attention on labels that is on correct ones; circles mark induction heads."""
    figure, axes = new_figure(6.4, 3.0, 2, sharey=True)
    for axis, statistics, name in zip(axes, (before, after), names, strict=True):
        image = axis.imshow(statistics.correct_share.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        layers, heads = torch.nonzero(statistics.induction_rate >= 0.5, as_tuple=True)
        axis.plot(heads.numpy(), layers.numpy(), "o", color="white", markeredgecolor="black", markersize=7)
        axis.set_title(name)
        axis.set_xlabel("head")
        axis.set_xticks(range(statistics.correct_share.shape[1]))
        axis.set_yticks(range(statistics.correct_share.shape[0]))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share on correct labels")
    figure.suptitle("Last-token attention on label tokens (○: induction head on half the prompts)", fontsize=9)
    return figure


def _steered(steps: Sequence[Mapping[str, float]]) -> tuple[str, str, str]:
    """Return the curve of the weight that is steered by the number of heads."""
    return "mass_award" if "mass_award" in steps[-1] else "wrong_penalty", ORANGE, "--"


def training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw induction heads and A (or κ), masses, and loss over the steps of a run (`trainer.state.log_history`)."""
    steps = [entry for entry in history if "loss" in entry]
    x = [entry["step"] for entry in steps]
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [("loss", [("loss", BLUE, "-")])]
    if steps and "induction_heads" in steps[-1]:
        panels += [
            ("mass per induction head", [("mass_correct", BLUE, "-"), ("mass_wrong", ORANGE, "--")]),
            ("per prompt", [("induction_heads", BLUE, "-"), _steered(steps)]),
        ]
    figure, axes = new_figure(3.2 * len(panels), 2.6, len(panels), squeeze=False)
    for axis, (label, series) in zip(axes[0], panels, strict=True):
        for name, color, style in series:
            axis.plot(x, [entry.get(name, float("nan")) for entry in steps], style, color=color, label=name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        if len(series) > 1:
            axis.legend(frameon=False)
    return figure
