"""In-context learning beside fine-tuning on the demonstrations (arXiv 2212.10559), in the untrained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from abft.analysis.implicit import compare_with_fine_tuning
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.styles import integer_ticks
from abft.plots import BLUE, GREY, ORANGE, new_figure

__all__ = ["ANALYSIS", "ImplicitOptions"]


@dataclass(kw_only=True)
class ImplicitOptions:
    """Options of the analysis `implicit`."""

    fine_tuning_rate: float = field(default=0.01, metadata={"help": "learning rate of fine-tuning on demonstrations"})
    fine_tuning_epochs: int = field(default=1, metadata={"help": "epochs of fine-tuning on demonstrations"})


def _run(subject: Subject, options: ImplicitOptions) -> dict[str, Any]:
    data = subject.suite.data
    return compare_with_fine_tuning(
        subject.model,
        subject.suite.builder,
        data.demonstrations[: subject.k],
        data.queries[: subject.prompts],
        learning_rate=options.fine_tuning_rate,
        epochs=options.fine_tuning_epochs,
        progress=subject.progress,
    ).to_dict()


_TUNED, _RANDOM = ("fine-tuned", BLUE, "-o"), ("random update", GREY, "--s")
_PANELS = {
    "SimAOU": {"sim_aou": _TUNED, "sim_aou_random": _RANDOM},
    "SimAM": {"sim_am": _TUNED, "sim_am_before": ("before fine-tuning", ORANGE, "-.^"), "sim_am_random": _RANDOM},
}


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    figure, axes = new_figure(7.0, 2.8, 2)
    for axis, (title, curves) in zip(axes, _PANELS.items(), strict=True):
        for name, (label, color, style) in curves.items():
            axis.plot(range(len(found[name])), found[name], style, color=color, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        integer_ticks(axis.xaxis)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("cosine with ICL")
    ratio = "none" if found["rec2ftp"] is None else f"{found['rec2ftp']:.2f}"
    return figure, (
        f"In-context learning beside fine-tuning on the demonstrations (arXiv 2212.10559), {found['n']} queries: "
        f"similarity of attention-output updates and of attention scores, by layer. Rec2FTP {ratio} of "
        f"{found['recovered']} queries."
    )


ANALYSIS = Analysis("implicit", _run, ImplicitOptions, uses_prompts=True, quantized=False, figure=_figure)
