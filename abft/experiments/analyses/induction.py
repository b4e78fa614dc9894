"""Induction heads of the untrained and of the trained models, on random tokens that repeat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from abft.analysis.heads import HeadScores, induction_scores
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.methods import METHODS
from abft.experiments.styles import integer_ticks
from abft.plots import new_figure

__all__ = ["ANALYSIS", "InductionOptions"]


@dataclass(kw_only=True)
class InductionOptions:
    """Options of the analysis `induction`."""

    tokens: int = field(default=1024, metadata={"help": "length of the repeated text for induction heads, at most"})


def _run(subject: Subject, options: InductionOptions) -> dict[str, Any]:
    length = min(options.tokens, subject.suite.max_length or options.tokens)
    values: dict[str, Any] = {"tokens": length}
    for name in ("vanilla", *subject.trained):
        with subject.at({name: 1.0} if name in subject.trained else {}):
            scores = induction_scores(subject.model, length=length, progress=subject.progress)
        values[name] = HeadScores(scores).to_dict()
    return values


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    names = [name for name in found if name in METHODS]
    figure, axes = new_figure(2.3 * len(names) + 0.8, 2.7, len(names), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        image = axis.imshow(found[name]["scores"], vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(METHODS[name].title, fontsize=9)
        axis.set_xlabel("head")
        integer_ticks(axis.xaxis, axis.yaxis)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="mass")
    return figure, f"Mass on the token to copy, in {found['tokens']:,} random tokens that repeat: induction heads."


ANALYSIS = Analysis("induction", _run, InductionOptions, figure=_figure)
