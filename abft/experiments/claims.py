"""The paper's claims, each judged by the runs of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from abft.evaluation.metrics import PairedComparison
from abft.experiments.methods import METHODS
from abft.experiments.results import Results, accuracy

__all__ = ["Claim", "claims"]

SAME = 0.03
"""Accuracies that differ by less are called level."""
NOISE = 0.01
"""Ablations whose averages differ by less count as equal."""
LONGER = 1.05
"""Ratio of times from which on one is called longer."""


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, and what was found.

    Args:
        text: the claim.
        holds: None if the experiment does not tell.
        evidence: figures, and the criterion.
    """

    text: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        """Return the finding in words."""
        return {True: "holds here", False: "does not hold here", None: "not tested"}[self.holds]


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims, each with what these runs say of it."""
    return [judge(results) for judge in (_gain, _level, _transfer, _consistency, _ablations, _time)]


def _interval(found: PairedComparison) -> str:
    return f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"


def _gain(results: Results) -> Claim:
    text = "ABFT is more accurate than the untrained model"
    found = results.compare("vanilla", "abft")
    if found is None:
        return Claim(text, None, "needs the methods vanilla and abft, and the test Normal")
    return Claim(
        text,
        found.low > 0,
        f"{100 * found.difference:+.1f} points over all tasks, {_interval(found)} (paired bootstrap over queries)",
    )


def _level(results: Results) -> Claim:
    text = "ABFT is level with E2E at 512 training prompts or fewer"
    found = results.compare("e2e", "abft")
    if found is None or results.largest > 512:
        return Claim(text, None, "needs the methods abft and e2e at 512 prompts or fewer")
    return Claim(
        text,
        abs(found.difference) < SAME,
        f"ABFT − E2E in domain {100 * found.difference:+.1f} points, {_interval(found)}; "
        f"level means less than {100 * SAME:.0f} points apart",
    )


def _transfer(results: Results) -> Claim:
    text = "On tasks that it was not trained on, ABFT does better than E2E"
    (abft, _), (e2e, _) = results.out_of_domain("abft"), results.out_of_domain("e2e")
    if abft is None or e2e is None:
        return Claim(text, None, "needs abft and e2e, two tasks and --generalization True")
    vanilla, _ = results.average("vanilla", accuracy)
    untrained = "" if vanilla is None else f", untrained {100 * vanilla:.1f} %"
    return Claim(
        text, abft > e2e, f"over all pairs of tasks: ABFT {100 * abft:.1f} %, E2E {100 * e2e:.1f} %{untrained}"
    )


def _consistency(results: Results) -> Claim:
    text = "ABFT makes predictions more consistent over templates and demonstrations"
    differences = {}
    for test, what in (("TempSensitivity", "templates"), ("DemoSensitivity", "demonstrations")):
        (before, _), (after, _) = (
            results.average(method, _share_consistent, test=test) for method in ("vanilla", "abft")
        )
        if before is not None and after is not None:
            differences[what] = (before, after)
    if len(differences) < 2:
        return Claim(text, None, "needs the tests TempSensitivity and DemoSensitivity")
    return Claim(
        text,
        all(after > before for before, after in differences.values()),
        "; ".join(f"{what} {100 * a:.1f} → {100 * b:.1f} %" for what, (a, b) in differences.items()),
    )


def _ablations(results: Results) -> Claim:
    text = "Ablations in the paper's order: ABFT, without PID, without PID and filter, A = 0, B = 0"
    names = ("abft", "no_pid", "no_pid_no_filter", "a0", "b0")
    found = [results.average(name, accuracy)[0] for name in names]
    known = [mean for mean in found if mean is not None]
    if len(known) < len(names):
        return Claim(text, None, "needs --methods ablation")
    falls = all(later <= earlier + NOISE for earlier, later in pairwise(known))
    apart = all(earlier - later >= NOISE for earlier, later in pairwise(known))
    return Claim(
        text,
        falls and apart,
        ", ".join(f"{METHODS[name].title} {100 * mean:.1f}" for name, mean in zip(names, known, strict=True))
        + f" %; {100 * NOISE:.0f} point or more apart counts as a difference"
        + ("; no step contradicts the order, but not every step is one" if falls and not apart else ""),
    )


def _time(results: Results) -> Claim:
    text = "Training end to end takes longer than ABFT"
    (abft, _), (e2e, _) = results.seconds("abft"), results.seconds("e2e")
    if abft is None or e2e is None:
        return Claim(text, None, "needs the methods abft and e2e")
    return Claim(
        text,
        e2e / abft >= LONGER,
        f"E2E / ABFT = {e2e / abft:.2f} (the paper: 2.2 to 2.7, with the published code); timed once per run, "
        f"beside whatever else the machine did; longer means {LONGER} and more",
    )


def _share_consistent(result: dict[str, Any]) -> float:
    return result["consistency"]
