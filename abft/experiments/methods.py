"""The methods that are compared: the untrained model, ABFT and its ablations, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GROUPS", "METHODS", "Method", "rates_of", "resolve_methods"]


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Args:
        name: as given on the command line.
        title: as shown.
        options: fields of `ABFTConfig` that make it differ from ABFT; None for a method without training.
        other_tasks: trains on prompts of all tasks but the one that it is tested on.
    """

    name: str
    title: str
    options: dict[str, Any] | None = field(default_factory=dict)
    other_tasks: bool = False

    @property
    def trained(self) -> bool:
        """True if the method trains."""
        return self.options is not None


METHODS = {
    method.name: method
    for method in (
        Method("vanilla", "vanilla", None),
        Method("calibration", "contextual calibration", None),
        Method("abft", "ABFT"),
        Method("share", "ABFT, share loss", {"method": "share"}),
        Method("e2e", "E2E", {"method": "e2e", "restricted_gradient": False}),
        Method("e2e_qk", "E2E on W_Q and W_K", {"method": "e2e_qk", "restricted_gradient": False}),
        Method("metaicl", "MetaICL", {"method": "metaicl", "restricted_gradient": False}, other_tasks=True),
        Method("no_pid", "ABFT without PID", {"adaption": "none"}),
        Method("no_pid_no_filter", "ABFT without PID and filter", {"adaption": "none", "head_filter": False}),
        # Without PID, as in Table 4: it would move A away from 0, and has no antagonist without B.
        Method("a0", "ABFT with A = 0", {"wrong_penalty": 0.0, "adaption": "none"}),
        Method("b0", "ABFT with B = 0", {"correct_award": 0.0, "adaption": "none"}),
        Method("restricted", "ABFT, restricted gradient", {"restricted_gradient": True}),
    )
}
"""By name. The ablations are those of arXiv 2505.14233, Table 4."""

GROUPS = {
    "paper": ("vanilla", "calibration", "abft", "e2e"),
    "ablation": ("vanilla", "abft", "no_pid", "no_pid_no_filter", "a0", "b0"),
}
"""Names that stand for several."""


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
