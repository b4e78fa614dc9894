"""The targets of the kernels, and what a result says about each: target, measured, met or not.

Speeds are held against this project's own targets, against competitors in the same run, and against what others have
published for the same card.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.gpu.published import Published, published_for

__all__ = ["Verdict", "exponent", "print_verdicts", "verdicts"]

Points = list[tuple[float, int]]  # a value and the length that it was measured at


class Verdict(NamedTuple):
    """A target beside what was measured; `met` is None where nothing was."""

    target: str
    measured: str
    met: bool | None


def _at_least(target: str, points: Points, bound: float, unit: str, label: str = "least") -> Verdict:
    """Return the verdict on the smallest value."""
    if not points:
        return Verdict(target, "not measured", None)
    value, n = min(points)
    return Verdict(target, f"{label} {value:.3g}{unit} at n = {n:,}", value >= bound)


def _at_most(target: str, points: Points, bound: float, unit: str) -> Verdict:
    """Return the verdict on the largest value."""
    if not points:
        return Verdict(target, "not measured", None)
    value, n = max(points)
    return Verdict(target, f"most {value:.3g}{unit} at n = {n:,}", value <= bound)


def _rows(result: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    return [row for row in result.get("suites", {}).get(suite, {}).get("rows", []) if "reason" not in row]


def _rate(result: dict[str, Any], key: str, bound: float) -> Verdict:
    points = [
        (row[key], row["n"])
        for row in _rows(result, "kernels")
        if row["name"] == "abft, sparse" and row["head_dim"] == 128 and row["n"] >= 4096
    ]
    target = f"fused {key.split('_')[0]}, head_dim 128, n ≥ 4k: ≥ {bound:.0f} TFLOP/s"
    return _at_least(target, points, bound, " TFLOP/s")


def _ratio(result: dict[str, Any], column: Published) -> Verdict:
    """Compare our rate with a published one at every length that both have."""
    points = [
        (row[f"{column.way}_tflops"] / column.tflops[row["n"]], row["n"])
        for row in _rows(result, "kernels")
        if row["name"] == "abft, sparse" and row["head_dim"] == 128 and row["n"] in column.tflops
    ]
    target = f"fused {column.way}, head_dim 128: ≥ {column.source} as published for {column.card} ({column.column})"
    return _at_least(target, points, 1.0, "×")


def _published(result: dict[str, Any]) -> Iterator[Verdict]:
    name = result.get("provenance", {}).get("gpu", {}).get("name") or "no GPU"
    columns = published_for(name)
    if not columns:
        none = f"no published figure for this card: {name}"
        yield Verdict("fused, head_dim 128: as fast as published kernels", none, None)
    for column in columns:
        yield _ratio(result, column)


def _against(result: dict[str, Any], suite: str, rival: str) -> Verdict:
    """Compare forward and backward together, ours with the mass, at every length, head_dim and grouping."""
    ours = {(r["n"], r["head_dim"], r["kv_heads"]): r for r in _rows(result, "kernels") if r["name"] == "abft, sparse"}
    points = []
    for row in _rows(result, suite):
        mine = ours.get((row["n"], row["head_dim"], row["kv_heads"]))
        if row["name"] == rival and mine:
            times = [sum(r[key]["median"] for key in ("forward_ms", "backward_ms")) for r in (row, mine)]
            points.append((times[0] / times[1], row["n"]))
    target = f"faster than {rival}, forward + backward, at every length"
    return _at_least(target, points, math.nextafter(1.0, 2.0), "×", "least speed-up")


def _overhead(result: dict[str, Any], labels: str, key: str, bound: float) -> Verdict:
    """Compare the fused kernel with and without the mass, in percent."""
    rows = {(r["name"], r["n"], r["head_dim"], r["kv_heads"]): r for r in _rows(result, "kernels")}
    points = []
    for (name, n, head_dim, kv_heads), row in rows.items():
        plain = rows.get(("abft, no mass", n, head_dim, kv_heads))
        if name == f"abft, {labels}" and plain:
            points.append((100 * (row[key]["median"] / plain[key]["median"] - 1), n))
    target = f"cost of the mass, {labels} labels, {key.split('_')[0]}: ≤ {bound:g} %"
    return _at_most(target, points, bound, " %")


def _row_op(result: dict[str, Any]) -> Iterator[Verdict]:
    rows = _rows(result, "rows")
    ours = {r["n"]: r for r in rows if r["name"] == "abft"}
    copy = result.get("ceilings", {}).get("copy_gb_per_s", 0)
    shares = [(100 * r["forward_gb_per_s"] / copy, n) for n, r in ours.items() if n >= 32768 and copy]
    yield _at_least("row op forward, n ≥ 32k: ≥ 80 % of the copy bandwidth", shares, 80, " %")
    gains = [
        (r["both_ms"]["median"] / ours[r["n"]]["both_ms"]["median"], r["n"])
        for r in rows
        if r["name"] == "PyTorch" and r["n"] in ours
    ]
    yield _at_least("row op, both ways: ≥ 3 × PyTorch at n = 1k … 128k", gains, 3, "×")
    launches = [r["launches"] for r in ours.values() if r.get("launches") is not None]
    most = max(launches, default=None)
    measured = "not measured" if most is None else f"{most} launches"
    yield Verdict("row op: ≤ 4 launches, both ways", measured, None if most is None else most <= 4)
    graphs = [r["graph_equals_eager"] for r in ours.values() if r.get("graph_equals_eager") is not None]
    measured = f"{sum(graphs)} of {len(graphs)}" if graphs else "not measured"
    yield Verdict("row op in a CUDA graph: the same bits", measured, all(graphs) if graphs else None)


def exponent(points: list[tuple[float, float]]) -> float:
    """Return x of the least-squares line log y = x·log n + c."""
    logs = [(math.log(n), math.log(max(y, 1.0))) for n, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _memory(result: dict[str, Any]) -> Verdict:
    points = [(r["n"], r["both_bytes"]) for r in _rows(result, "memory") if r["name"] == "abft" and r.get("both_bytes")]
    target = "peak memory beyond inputs and outputs: O(n)"
    if len(points) < 3:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"n^{exponent(points):.2f}", exponent(points) <= 1.05)


def _faster(target: str, ours: float | None, theirs: float | None, factor: float, where: str = "") -> Verdict:
    """Return the verdict on the ratio of two speeds, either of which may be missing."""
    if ours is None or theirs is None:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"{ours / theirs:.3g}×{where}", ours / theirs >= factor)


def _training(result: dict[str, Any]) -> Iterator[Verdict]:
    rows = _rows(result, "training")
    speed = {(r["model"], r["name"], r["n"]): r["prompts_per_second"] for r in rows}
    seven, lengths = "7B bf16", sorted({r["n"] for r in rows if r["prompts"] == 1})
    longest = max((n for n in lengths if (seven, "reference", n) in speed), default=0)
    survived = "the longest prompt that the reference survives"
    for name, n, factor in (("paper-like prompts", 200, 5), (survived, longest, 10)):
        ours = max((speed[seven, m, n] for m in ("full", "restricted") if (seven, m, n) in speed), default=None)
        target = f"7B step, {name}: ≥ {factor} × the reference's prompts per second"
        yield _faster(target, ours, speed.get((seven, "reference", n)), factor, f" at n = {n:,}")
    for model, method, least in (
        (seven, "full", 32768),
        (seven, "restricted", 131072),
        ("32B NF4", "restricted", 65536),
    ):
        reached = max((n for n in lengths if (model, method, n) in speed), default=None)
        measured = "not measured" if reached is None else f"{reached:,} tokens"
        target = f"{model}, {method} gradients: ≥ {least:,} tokens"
        yield Verdict(target, measured, None if reached is None else reached >= least)
    batched, single = (speed.get((seven, name, 200)) for name in ("evaluation", "evaluation, one by one"))
    target = "7B evaluation: ≥ 10 × the prompts per second of one at a time with full logits"
    yield _faster(target, batched, single, 10)
    planned = [(100 * abs(r["planned_bytes"] / r["peak_bytes"] - 1), r["n"]) for r in rows if r.get("planned_bytes")]
    yield _at_most("`abft plan` within 10 % of the measured peak", planned, 10, " %")


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Return the verdict on every target, in the order in which they are printed."""
    return [
        _rate(result, "forward_tflops", 450),
        _rate(result, "backward_tflops", 350),
        *_published(result),
        _against(result, "kernels", "SDPA flash"),
        _against(result, "kernels", "SDPA cuDNN"),
        _against(result, "flex", "FlexAttention, V columns"),
        _against(result, "flex", "FlexAttention, second LSE"),
        *(
            _overhead(result, labels, key, bound)
            for labels, bound in (("sparse", 3.0), ("dense", 8.0))
            for key in ("forward_ms", "backward_ms")
        ),
        *_row_op(result),
        _memory(result),
        *_training(result),
    ]


def print_verdicts(result: dict[str, Any]) -> None:
    """Print the targets as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "measured", "met")
    for verdict in verdicts(result):
        table.add_row(verdict.target, verdict.measured, {True: "yes", False: "no", None: "–"}[verdict.met])
    Console(width=150).print(table)
