"""The paper's claims, each judged from plain numbers: those of an experiment, or those of the paper's own tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from abft.evaluation.metrics import PairedComparison
from abft.experiments.methods import METHODS
from abft.experiments.paper_tables import ABLATIONS, AGAINST_E2E, AVERAGES, CONSISTENCY
from abft.experiments.results import Results, accuracy

__all__ = ["Claim", "Figures", "claims", "figures_of", "judge", "published_figures"]

SAME = 0.03
"""Accuracies that differ by less are called level."""
NOISE = 0.01
"""Averages that differ by less count as equal."""
LONGER = 1.05
"""Ratio of times from which on one is called longer."""
ABLATED = ("no_pid", "no_pid_no_filter", "a0", "b0")
"""In the order of the paper's Table 4."""


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, and what was found.

    Args:
        name: one word.
        text: the claim.
        holds: None if the figures do not tell.
        evidence: figures, and the criterion.
    """

    name: str
    text: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        """Return the finding in words."""
        return {True: "holds here", False: "does not hold here", None: "not tested"}[self.holds]


@dataclass(frozen=True)
class Figures:
    """The numbers that claims are judged by; what was not measured is left out.

    Args:
        accuracy: method → mean accuracy over tasks, 0 … 1, each trained on the task it is tested on.
        away: method → mean accuracy on tasks that it was not trained on.
        consistency: "templates" and "demonstrations" → consistency untrained and with ABFT, 0 … 1.
        seconds: method → training time, all in one unit.
        prompts: training prompts.
        paired: (before, after) → comparison query by query, where predictions are at hand.
    """

    accuracy: Mapping[str, float] = field(default_factory=dict)
    away: Mapping[str, float] = field(default_factory=dict)
    consistency: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    prompts: int = 512
    paired: Mapping[tuple[str, str], PairedComparison] = field(default_factory=dict)

    def difference(self, before: str, after: str) -> tuple[float, str] | None:
        """Return the difference of two accuracies, and it in words with its interval if it has one; None if unknown."""
        if (before, after) in self.paired:
            found = self.paired[before, after]
            interval = f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, paired bootstrap over queries"
            return found.difference, f"{100 * found.difference:+.1f} points ({interval})"
        if not {before, after} <= self.accuracy.keys():
            return None
        found_difference = self.accuracy[after] - self.accuracy[before]
        return found_difference, f"{100 * found_difference:+.1f} points"


def figures_of(results: Results) -> Figures:
    """Return the figures of an experiment."""

    def known(means: Mapping[Any, float | None]) -> dict[Any, float]:
        return {name: mean for name, mean in means.items() if mean is not None}

    consistency = {}
    for test, what in (("TempSensitivity", "templates"), ("DemoSensitivity", "demonstrations")):
        before, after = (results.average(method, _share_consistent, test=test)[0] for method in ("vanilla", "abft"))
        if before is not None and after is not None:
            consistency[what] = (before, after)
    pairs = {pair: results.compare(*pair) for pair in (("vanilla", "abft"), ("e2e", "abft"))}
    return Figures(
        accuracy=known({name: results.average(name, accuracy)[0] for name in results.methods}),
        away=known({name: results.out_of_domain(name)[0] for name in ("abft", "e2e")}),
        consistency=consistency,
        seconds=known({name: results.seconds(name)[0] for name in ("abft", "e2e")}),
        prompts=results.largest,
        paired={pair: found for pair, found in pairs.items() if found is not None},
    )


def published_figures() -> dict[str, Figures]:
    """Return the figures of the paper's tables: table and model → figures (see `abft.experiments.paper_tables`)."""

    def shares(row: Mapping[str, float]) -> dict[str, float]:
        return {name: value / 100 for name, value in row.items()}

    found = {f"Table 1, {name.rsplit('/', 1)[-1]}": Figures(shares(row)) for name, row in AVERAGES.items()}
    for name, row in AGAINST_E2E.items():
        found[f"Table 2, {name}"] = Figures(
            accuracy=shares({method: row[method] for method in ("vanilla", "abft", "e2e")}),
            away=shares({method: row[f"{method}_away"] for method in ("abft", "e2e")}),
            seconds={"abft": 1.0, "e2e": row["time"]},
        )
    for name, both in CONSISTENCY.items():
        found[f"Table 3, {name}"] = Figures(
            consistency={what: (before / 100, after / 100) for what, (before, after) in both.items()}
        )
    return found | {f"Table 4, {name}": Figures(shares(row)) for name, row in ABLATIONS.items()}


def claims(results: Results) -> list[Claim]:
    """Return the paper's claims, each with what these runs say of it."""
    return judge(figures_of(results))


def judge(figures: Figures) -> list[Claim]:
    """Return the paper's claims, each with what these figures say of it."""
    judges = (_gain, _level, _transfer, _consistency, _parts, _order, _time)
    return [decide(figures) for decide in judges]


def _gain(figures: Figures) -> Claim:
    text = "ABFT is more accurate than the untrained model"
    found = figures.difference("vanilla", "abft")
    if found is None:
        return Claim("gain", text, None, "needs the methods vanilla and abft, and the test Normal")
    paired = figures.paired.get(("vanilla", "abft"))
    criterion = "the interval must lie above 0" if paired else f"{100 * NOISE:.0f} point or more counts"
    holds = paired.low > 0 if paired else found[0] >= NOISE
    return Claim("gain", text, holds, f"{found[1]} over all tasks; {criterion}")


def _level(figures: Figures) -> Claim:
    text = "ABFT is level with E2E at 512 training prompts or fewer"
    found = figures.difference("e2e", "abft")
    if found is None or figures.prompts > 512:
        return Claim("level", text, None, "needs the methods abft and e2e at 512 prompts or fewer")
    evidence = f"ABFT − E2E in domain {found[1]}; level means less than {100 * SAME:.0f} points apart"
    return Claim("level", text, abs(found[0]) < SAME, evidence)


def _transfer(figures: Figures) -> Claim:
    text = "On tasks that it was not trained on, ABFT does better than E2E"
    if not {"abft", "e2e"} <= figures.away.keys():
        return Claim("transfer", text, None, "needs abft and e2e, two tasks and --generalization True")
    abft, e2e, untrained = figures.away["abft"], figures.away["e2e"], figures.accuracy.get("vanilla")
    evidence = f"over all pairs of tasks: ABFT {100 * abft:.1f} %, E2E {100 * e2e:.1f} %"
    return Claim(
        "transfer", text, abft > e2e, evidence + ("" if untrained is None else f", untrained {100 * untrained:.1f} %")
    )


def _consistency(figures: Figures) -> Claim:
    text = "ABFT makes predictions more consistent over templates and demonstrations"
    if len(figures.consistency) < 2:
        return Claim("consistency", text, None, "needs the tests TempSensitivity and DemoSensitivity")
    return Claim(
        "consistency",
        text,
        all(after > before for before, after in figures.consistency.values()),
        "; ".join(f"{what} {100 * a:.1f} → {100 * b:.1f} %" for what, (a, b) in figures.consistency.items()),
    )


def _ablation_means(figures: Figures) -> list[float] | None:
    """Return the accuracies of ABFT and its ablations; None unless all are known."""
    names = ("abft", *ABLATED)
    return [figures.accuracy[name] for name in names] if set(names) <= figures.accuracy.keys() else None


def _listed(means: list[float]) -> str:
    pairs = zip(("abft", *ABLATED), means, strict=True)
    return ", ".join(f"{METHODS[name].title} {100 * mean:.1f}" for name, mean in pairs) + " %"


def _parts(figures: Figures) -> Claim:
    text = "Accuracy falls without PID, without the filter, with A = 0 and with B = 0"
    means = _ablation_means(figures)
    if means is None:
        return Claim("parts", text, None, "needs --methods ablation")
    level = [METHODS[name].title for name, mean in zip(ABLATED, means[1:], strict=True) if means[0] - mean < NOISE]
    evidence = f"{_listed(means)}; {100 * NOISE:.0f} point or more counts as a fall"
    return Claim("parts", text, not level, evidence + (f"; no fall: {', '.join(level)}" if level else ""))


def _order(figures: Figures) -> Claim:
    text = "Ablations in the order of the paper's Table 4: ABFT, without PID, without PID and filter, A = 0, B = 0"
    means = _ablation_means(figures)
    if means is None:
        return Claim("order", text, None, "needs --methods ablation")
    falls = all(later <= earlier + NOISE for earlier, later in pairwise(means))
    apart = all(earlier - later >= NOISE for earlier, later in pairwise(means))
    return Claim(
        "order",
        text,
        falls and apart,
        f"{_listed(means)}; {100 * NOISE:.0f} point or more apart counts as a difference"
        + ("; no step contradicts the order, but not every step is one" if falls and not apart else ""),
    )


def _time(figures: Figures) -> Claim:
    text = "Training end to end takes longer than ABFT"
    if not {"abft", "e2e"} <= figures.seconds.keys():
        return Claim("time", text, None, "needs the methods abft and e2e")
    ratio = figures.seconds["e2e"] / figures.seconds["abft"]
    return Claim(
        "time",
        text,
        ratio >= LONGER,
        f"E2E / ABFT = {ratio:.2f} (the paper: 2.2 to 2.7, with the published code), without saving checkpoints; timed "
        f"once per run, beside whatever else the machine did; longer means {LONGER} and more",
    )


def _share_consistent(result: dict[str, Any]) -> float:
    return result["consistency"]
