"""The methods that are compared: the untrained model, ABFT and its ablations, and its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from abft.training.objectives.objective import Objective
from abft.training.objectives.objective_registry import objective_of
from abft.training.options import TrainingOptions

__all__ = ["GROUPS", "METHODS", "Method", "rates_of", "resolve_methods", "unused_options"]


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Args:
        name: as given on the command line.
        title: as shown.
        loss: name of the objective that it trains; None for a method without training.
        options: its own training options, whatever the experiment's are.
        other_tasks: trains on prompts of all tasks but the one that it is tested on.
    """

    name: str
    title: str
    loss: str | None
    options: dict[str, Any] = field(default_factory=dict)
    other_tasks: bool = False

    @property
    def trained(self) -> bool:
        """True if the method trains."""
        return self.loss is not None

    @property
    def objective(self) -> type[Objective]:
        """The objective of a method that trains."""
        assert self.loss is not None
        return objective_of(self.loss)

    def training_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `ABFTConfig` of its runs: those of `given` that concern it, under its own."""
        concerned = {name: value for name, value in given.items() if name not in self.objective.ignores}
        return {**concerned, "method": self.loss, **self.options}


METHODS = {
    method.name: method
    for method in (
        Method("vanilla", "vanilla", None),
        Method("calibration", "contextual calibration", None),
        Method("abft", "ABFT", "abft"),
        Method("share", "ABFT, share loss", "share"),
        Method("e2e", "E2E", "e2e", {"restricted_gradient": False}),
        Method("e2e_qk", "E2E on W_Q and W_K", "e2e_qk", {"restricted_gradient": False}),
        Method("metaicl", "MetaICL", "metaicl", {"restricted_gradient": False}, other_tasks=True),
        Method("no_pid", "ABFT without PID", "abft", {"adaption": "none"}),
        Method("no_pid_no_filter", "ABFT without PID and filter", "abft", {"adaption": "none", "head_filter": False}),
        # Without PID, as in Table 4: it would move A away from 0, and has no antagonist without B.
        Method("a0", "ABFT with A = 0", "abft", {"wrong_penalty": 0.0, "adaption": "none"}),
        Method("b0", "ABFT with B = 0", "abft", {"correct_award": 0.0, "adaption": "none"}),
        Method("restricted", "ABFT, restricted gradient", "abft", {"restricted_gradient": True}),
        Method("share_no_pid", "ABFT, share loss without PID", "share", {"adaption": "none"}),
        Method("share_no_award", "ABFT, share loss without award", "share", {"mass_award": 0.0, "adaption": "none"}),
        Method("share_no_filter", "ABFT, share loss without filter", "share", {"head_filter": False}),
    )
}
"""By name. The ablations of `abft`, the paper's loss, are those of arXiv 2505.14233, Table 4."""

GROUPS = {
    "paper": ("vanilla", "calibration", "abft", "e2e"),
    "ablation": ("vanilla", "abft", "no_pid", "no_pid_no_filter", "a0", "b0"),
    "share_ablation": ("vanilla", "share", "share_no_pid", "share_no_award", "share_no_filter"),
}
"""Names that stand for several."""


def unused_options(methods: Sequence[Method], given: Mapping[str, Any]) -> list[str]:
    """Return the training options of `given`, other than their defaults, that none of these methods heeds."""
    ignored = set.intersection(*(set(method.objective.ignores) for method in methods))
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    return [name for name in defaults if name in ignored and given[name] != defaults[name]]


def rates_of(texts: Sequence[str]) -> dict[str, float]:
    """Return the learning rates of single methods, given as texts like `e2e=1e-4`.

    Raises:
        ValueError: another form, an unknown method or one without training, or a rate that is not above 0.
    """
    rates: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            rates[name] = float(number)
        except ValueError:
            raise ValueError(f"learning_rates are given as method=rate, such as e2e=1e-4; got {text!r}") from None
        if name not in METHODS or not METHODS[name].trained or not 0 < rates[name] < float("inf"):
            raise ValueError(f"learning_rates must name methods that train and rates above 0, got {text!r}")
    return rates


def resolve_methods(names: Sequence[str]) -> list[Method]:
    """Return the methods of these names and groups, each once, in the order of `METHODS`.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in METHODS and name not in GROUPS:
            raise ValueError(f"unknown method {name!r}; known are {', '.join((*METHODS, *GROUPS))}")
        wanted |= set(GROUPS.get(name, (name,)))
    if not wanted:
        raise ValueError(f"no methods; choose among {', '.join((*METHODS, *GROUPS))}")
    return [method for name, method in METHODS.items() if name in wanted]
