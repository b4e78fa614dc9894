"""The objectives by name."""

from __future__ import annotations

from abft.training.objectives.attention_behavior import AttentionBehavior, LabelShare
from abft.training.objectives.end_to_end import EndToEnd, EndToEndProjections, MetaICL
from abft.training.objectives.objective import Objective

__all__ = ["DEFAULT", "OBJECTIVES", "objective_of", "plan_modes", "register"]

_BUILT_IN: tuple[type[Objective], ...] = (LabelShare, AttentionBehavior, EndToEnd, EndToEndProjections, MetaICL)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in _BUILT_IN}
DEFAULT = LabelShare.name


def register(objective: type[Objective]) -> type[Objective]:
    """Add an objective to the choices of `--method`; usable as a decorator of its class.

    Raises:
        ValueError: the name is taken.
    """
    if OBJECTIVES.get(objective.name, objective) is not objective:
        raise ValueError(f"method {objective.name!r} is {OBJECTIVES[objective.name].__name__}; choose another name")
    OBJECTIVES[objective.name] = objective
    return objective


def objective_of(method: str) -> type[Objective]:
    """Return the objective of a `--method`.

    Raises:
        ValueError: there is none of this name.
    """
    if method not in OBJECTIVES:
        raise ValueError(f"method must be {' or '.join(map(repr, OBJECTIVES))}, got {method!r}")
    return OBJECTIVES[method]


def plan_modes() -> dict[str, tuple[type[Objective], bool]]:
    """Return the training modes of `abft plan`: objective, and whether its gradients are restricted."""
    return {
        mode: (objective, restricted)
        for objective in OBJECTIVES.values()
        for mode, restricted in objective.plan_modes().items()
    }
