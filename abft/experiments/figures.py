"""Figures of an experiment's runs, as in the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from abft.experiments.analyses import analysis_registry as registry
from abft.experiments.courses import training_courses
from abft.experiments.grid_maps import grid_figures
from abft.experiments.methods import METHODS
from abft.experiments.results import Results, accuracy
from abft.experiments.styles import integer_ticks, plot_layers, style_of
from abft.plots import new_figure

__all__ = ["all_figures", "head_scores_figure"]


def all_figures(results: Results, analysis: dict[str, Any] | None = None) -> dict[str, tuple[Figure, str]]:
    """Return name → figure and caption, for what the runs and `analysis.json` have data for."""
    makers = (
        accuracy_bars,
        label_attention,
        training_courses,
        generalization,
        data_efficiency,
        label_errors,
        grid_figures,
    )
    figures = {name: found for make in makers for name, found in make(results).items()}
    for row, found in registry.stored_parts(analysis):
        if row.figure is not None:
            figures[row.name] = row.figure(found)
    return figures


def accuracy_bars(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw accuracy by task and method, with one standard error over seeds."""
    methods = [name for name in results.methods if results.average(name, accuracy)[0] is not None]
    if not methods:
        return {}
    figure, axes = new_figure(max(4.5, 1.2 + 0.24 * len(methods) * (len(results.tasks) + 1)), 3.0)
    groups = [*results.tasks, "average"]
    width = 0.8 / len(methods)
    for index, name in enumerate(methods):
        cells = [results.summary(name, task, accuracy) for task in results.tasks]
        cells.append(results.average(name, accuracy))
        heights = [100 * (mean or 0) for mean, _ in cells]
        errors = [100 * (error or 0) for _, error in cells]
        color, hatch = style_of(name)[:2]
        x = np.arange(len(groups)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            x,
            heights,
            width,
            yerr=errors,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=METHODS[name].title,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    _legend_above(axes, len(methods))
    return {"accuracy": (figure, "In-context accuracy by task; bars: one standard error over training seeds.")}


def label_attention(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw attention on label tokens and on correct ones by layer, before and after (paper, Fig. 4)."""
    trained = [name for name in ("abft", "e2e") if name in results.methods]
    curves: dict[str, dict[str, np.ndarray]] = {}
    for name in ("vanilla", *trained):
        found = [
            run.tests[task]["heads"]
            for task in results.tasks
            for run in results.of(name, task)
            if "heads" in run.tests.get(task, {})
        ]
        if found:
            correct, wrong = (
                np.mean([np.asarray(x[part]).mean(axis=1) for x in found], axis=0)
                for part in ("mass_correct", "mass_wrong")
            )
            curves[name] = {"all labels": correct + wrong, "correct labels": correct}
    if len(curves) < 2:
        return {}
    figure, axes = new_figure(6.6, 2.9, 2)
    for axis, part in zip(axes, ("all labels", "correct labels"), strict=True):
        for name, parts in curves.items():
            plot_layers(axis, name, parts[part])
        axis.set_title(f"on {part}", fontsize=10)
    axes[0].set_ylabel("last token's attention")
    axes[0].legend(frameon=False, fontsize=8)
    caption = "Attention of the last token on the demonstrations' label tokens, mean over heads, tasks and seeds."
    return {"label-attention": (figure, caption)}


def generalization(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw accuracy on every task after training on one, as the difference from the untrained model."""
    tasks = results.tasks
    shown = {}
    for name in ("abft", "e2e"):
        means: Any = [[results.summary(name, a, accuracy, tested_on=b)[0] for b in tasks] for a in tasks]
        base: Any = [results.summary("vanilla", b, accuracy)[0] for b in tasks]
        if len(tasks) > 1 and all(mean is not None for row in [*means, base] for mean in row):
            shown[name] = 100 * (np.array(means, dtype=float) - np.array(base, dtype=float))
    if not shown:
        return {}
    side = 0.62 * len(tasks)
    figure, axes = new_figure(max(3.4, side + 1.6) * len(shown), side + 1.5, len(shown), squeeze=False, sharey=True)
    limit = max(1.0, max(float(np.abs(values).max()) for values in shown.values()))
    for axis, (name, values) in zip(axes[0], shown.items(), strict=True):
        image = axis.imshow(values, vmin=-limit, vmax=limit, cmap="PuOr_r")
        for (row, column), value in np.ndenumerate(values):
            dark = abs(value) > 0.6 * limit
            axis.text(
                column, row, f"{value:+.0f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        axis.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_title(METHODS[name].title, fontsize=10)
        axis.set_xlabel("tested on")
    axes[0][0].set_ylabel("trained on")
    figure.colorbar(image, ax=axes, label="accuracy less untrained, points")
    return {"generalization": (figure, "Accuracy gained and lost on each task (columns) by training on one (rows).")}


def data_efficiency(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw average accuracy by the number of training prompts."""
    if len(results.sizes) < 2:
        return {}
    figure, axes = new_figure(4.6, 3.3)
    for name in results.methods:
        color, _, line, marker = style_of(name)
        if not METHODS[name].trained:
            mean, _ = results.average(name, accuracy)
            if mean is not None:
                axes.axhline(100 * mean, color=color, linestyle=line, label=METHODS[name].title)
            continue
        cells = [(size, *results.average(name, accuracy, num_prompts=size)) for size in results.sizes]
        known = [(size, 100 * mean, 100 * (error or 0)) for size, mean, error in cells if mean is not None]
        if len(known) > 1:
            x, y, errors = zip(*known, strict=True)
            axes.errorbar(
                x, y, errors, color=color, linestyle=line, marker=marker, capsize=2, label=METHODS[name].title
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.sizes, [f"{size:,}" for size in results.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training prompts")
    axes.set_ylabel("accuracy, %")
    _legend_above(axes, 2)
    return {
        "data-efficiency": (figure, "Average accuracy by the number of training prompts; bars: one standard error.")
    }


def label_errors(results: Results) -> dict[str, tuple[Figure, str]]:
    """Draw accuracy by the share of correct labels among the demonstrations (GLER)."""
    curves = {}
    for name in results.methods:
        found = [
            run.tests[task]["GLER"]
            for task in results.tasks
            for run in results.of(name, task)
            if name != "calibration" and "GLER" in run.tests.get(task, {})
        ]
        if found:
            curves[name] = (found[0]["correct_label_shares"], np.mean([x["accuracy"] for x in found], axis=0))
    if not curves:
        return {}
    figure, axes = new_figure(4.2, 2.9)
    for name, (shares, means) in curves.items():
        color, _, line, marker = style_of(name)
        axes.plot(100 * np.array(shares), 100 * means, line, marker=marker, color=color, label=METHODS[name].title)
    axes.set_xlabel("demonstrations with a correct label, %")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    return {"label-errors": (figure, "Accuracy with wrong labels among the demonstrations, mean over tasks and seeds.")}


def _legend_above(axes: Any, entries: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(entries, 4), frameon=False, fontsize=8)


def head_scores_figure(scores: dict[str, Any], tokens: int) -> Figure:
    """Draw a map of `(L, H)` scores for each kind of head."""
    figure, axes = new_figure(3.4 * len(scores) + 0.8, 3.2, len(scores), squeeze=False)
    for axis, (name, values) in zip(axes[0], scores.items(), strict=True):
        image = axis.imshow(values, vmin=0, cmap="cividis", aspect="auto")
        axis.set_title(f"{name} heads, {tokens:,} tokens", fontsize=9)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        integer_ticks(axis.xaxis, axis.yaxis)
        figure.colorbar(image, ax=axis, label="mass")
    return figure
