"""Accuracy of the untrained model with momentum attention (arXiv 2212.10559)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abft.analysis.momentum_gain import momentum_gain
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.results import Results
from abft.experiments.tables import Table, points

__all__ = ["ANALYSIS", "MomentumOptions"]


@dataclass(kw_only=True)
class MomentumOptions:
    """Options of the analysis `momentum`."""

    etas: list[float] = field(
        default_factory=lambda: [0.01, 0.03, 0.1, 0.2], metadata={"help": "factors of momentum attention"}
    )


def _run(subject: Subject, options: MomentumOptions) -> dict[str, Any]:
    prompts = subject.suite.normal[: subject.prompts]
    found = momentum_gain(subject.model, prompts, options.etas, progress=subject.progress)
    return found.to_dict()


def _table(results: Results, found: dict[str, Any]) -> Table:
    gains = found["gains"]
    accuracies = (found["plain"], *(gain["accuracy"] for gain in gains))
    return Table(
        f"{results.folder.name}-momentum",
        f"Momentum attention (arXiv 2212.10559) in the untrained model: accuracy in %, {found['n']} prompts.",
        ["", "plain", *(f"η = {gain['eta']:g}" for gain in gains)],
        [
            ["accuracy", *(f"{100 * accuracy:.1f}" for accuracy in accuracies)],
            ["gain", "", *(points(gain["gain"]) for gain in gains)],
        ],
    )


ANALYSIS = Analysis("momentum", _run, MomentumOptions, uses_prompts=True, table=_table)
