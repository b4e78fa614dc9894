"""The seconds of each suite, and what they allow: no suite takes another's time, and none starts a row it cannot end.

The deadlines add up: a suite that ends early leaves its rest to the suites after it, and one that runs late takes
nothing from them but what was passed on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable

__all__ = ["BUDGETS", "FIRST_ROW", "LIMIT", "SUITES", "Budget", "Forecast", "Schedule"]

# In the order in which they run. `LIMIT` keeps some seconds for imports, ceilings and the last line.
BUDGETS = {
    "prewarm": 65.0,
    "correctness": 145.0,
    "kernels": 120.0,
    "rows": 30.0,
    "memory": 20.0,
    "training": 90.0,
    "flex": 35.0,
    "precision": 15.0,
}
LIMIT = 540.0
SUITES = tuple(name for name in BUDGETS if name != "prewarm")
# Of a row whose kind was never measured: what a short one takes.
FIRST_ROW = 2.0


class Budget:
    """The seconds that are left until a deadline."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def reason(self, expected: float) -> str:
        """Return the reason not to start what is expected to take so many seconds; empty if they are left."""
        left = self.left()
        return "" if expected <= left else f"out of time: {expected:.1f} s predicted, {max(0.0, left):.1f} s left"


class Schedule:
    """The deadlines of the chosen suites, from their budgets; `seconds` for all of them scales each alike."""

    def __init__(
        self, suites: Collection[str], seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ):
        chosen = {name: share for name, share in BUDGETS.items() if name == "prewarm" or name in suites}
        scale = 1.0 if seconds is None else seconds / sum(chosen.values())
        self._clock = clock
        self.shares = {name: scale * share for name, share in chosen.items()}
        self._deadlines: dict[str, float] = {}
        deadline = clock()
        for name, share in self.shares.items():
            deadline += share
            self._deadlines[name] = deadline

    def budget(self, name: str) -> Budget:
        """Return the time of a suite from now on: its own, and what the suites before it left."""
        return Budget(self._deadlines[name] - self._clock(), self._clock)


class Forecast:
    """The seconds that the next row of a kind will take: those of the last one, scaled by the work of both."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[float, float]] = {}

    def add(self, kind: Hashable, work: float, seconds: float) -> None:
        """Note what a row took."""
        self._last[kind] = (seconds, work)

    def seconds(self, kind: Hashable, work: float, first: float = FIRST_ROW) -> float:
        """Return the prediction: `first` for an unknown kind, and never less than the last row took."""
        if kind not in self._last:
            return first
        seconds, before = self._last[kind]
        return seconds * max(1.0, work / before)
