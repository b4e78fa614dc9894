"""What the kernels are meant to reach on an H100, and what a result says about each: target, measured, met or not."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Verdict", "print_verdicts", "verdicts"]


class Verdict(NamedTuple):
    target: str
    measured: str
    met: bool | None  # None: not measured


def _rows(result: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    return [row for row in result.get("suites", {}).get(suite, {}).get("rows", []) if "reason" not in row]


def _worst(values: list[tuple[float, int]], unit: str, smallest: bool = True) -> str:
    value, n = (min if smallest else max)(values)
    return f"{value:.3g}{unit} at n = {n:,}"


def _rate(result: dict[str, Any], key: str, at_least: float) -> Verdict:
    values = [(row[key], row["n"]) for row in _rows(result, "kernels")
              if row["name"] == "abft, sparse" and row["head_dim"] == 128 and row["n"] >= 4096]  # fmt: skip
    what = f"fused {key.split('_')[0]}, head_dim 128, n ≥ 4k: ≥ {at_least:.0f} TFLOP/s"
    if not values:
        return Verdict(what, "not measured", None)
    return Verdict(what, "least " + _worst(values, " TFLOP/s"), min(values)[0] >= at_least)


def _against(result: dict[str, Any], suite: str, rival: str) -> Verdict:
    """Forward and backward together, ours with the mass, at every length, head_dim and grouping."""
    ours = {(r["n"], r["head_dim"], r["kv_heads"]): r for r in _rows(result, "kernels") if r["name"] == "abft, sparse"}
    ratios = []
    for row in _rows(result, suite):
        mine = ours.get((row["n"], row["head_dim"], row["kv_heads"]))
        if row["name"] == rival and mine:
            times = [sum(r[key]["median"] for key in ("forward_ms", "backward_ms")) for r in (row, mine)]
            ratios.append((times[0] / times[1], row["n"]))
    what = f"faster than {rival}, forward + backward, at every length"
    if not ratios:
        return Verdict(what, "not measured", None)
    return Verdict(what, "least speed-up " + _worst(ratios, "×"), min(ratios)[0] > 1)


def _overhead(result: dict[str, Any], labels: str, key: str, at_most: float) -> Verdict:
    rows = {(r["name"], r["n"], r["head_dim"], r["kv_heads"]): r for r in _rows(result, "kernels")}
    costs = []
    for (name, n, head_dim, kv_heads), row in rows.items():
        plain = rows.get(("abft, no mass", n, head_dim, kv_heads))
        if name == f"abft, {labels}" and plain:
            costs.append((100 * (row[key]["median"] / plain[key]["median"] - 1), n))
    what = f"cost of the mass, {labels} labels, {key.split('_')[0]}: ≤ {at_most:g} %"
    if not costs:
        return Verdict(what, "not measured", None)
    return Verdict(what, "most " + _worst(costs, " %", smallest=False), max(costs)[0] <= at_most)


def _row_op(result: dict[str, Any]) -> list[Verdict]:
    rows = _rows(result, "rows")
    ours = {r["n"]: r for r in rows if r["name"] == "abft"}
    copy = result.get("ceilings", {}).get("copy_gb_per_s", 0)
    shares = [(100 * r["forward_gb_per_s"] / copy, n) for n, r in ours.items() if n >= 32768 and copy]
    gains = [(r["both_ms"]["median"] / ours[r["n"]]["both_ms"]["median"], r["n"])
             for r in rows if r["name"] == "PyTorch" and r["n"] in ours]  # fmt: skip
    launches = [(r["launches"], n) for n, r in ours.items() if r.get("launches") is not None]
    graphs = [r["graph_equals_eager"] for r in ours.values() if r.get("graph_equals_eager") is not None]
    missing = ("not measured", None)
    return [
        Verdict("row op forward, n ≥ 32k: ≥ 80 % of the copy bandwidth",
                *(("least " + _worst(shares, " %"), min(shares)[0] >= 80) if shares else missing)),
        Verdict("row op, both ways: ≥ 3 × PyTorch at n = 1k … 128k",
                *(("least " + _worst(gains, "×"), min(gains)[0] >= 3) if gains else missing)),
        Verdict("row op: ≤ 4 launches, both ways",
                *((f"{max(launches)[0]} launches", max(launches)[0] <= 4) if launches else missing)),
        Verdict("row op in a CUDA graph: the same bits",
                *((f"{sum(graphs)} of {len(graphs)}", all(graphs)) if graphs else missing)),
    ]  # fmt: skip


def _memory(result: dict[str, Any]) -> Verdict:
    from bench.gpu.kernels import exponent

    points = [(r["n"], r["both_bytes"]) for r in _rows(result, "memory") if r["name"] == "abft" and r.get("both_bytes")]
    what = "peak memory beyond inputs and outputs: O(n)"
    if len(points) < 3:
        return Verdict(what, "not measured", None)
    return Verdict(what, f"n^{exponent(points):.2f}", exponent(points) <= 1.05)


def _training(result: dict[str, Any]) -> list[Verdict]:
    rows = _rows(result, "training")
    speed = {(r["model"], r["name"], r["n"]): r["prompts_per_second"] for r in rows}
    seven, lengths = "7B bf16", sorted({r["n"] for r in rows if r["prompts"] == 1})
    survived = [n for n in lengths if (seven, "reference", n) in speed]
    found = []
    for what, n, factor in (("paper-like prompts", 200, 5), ("the longest prompt that the reference survives",
                                                            survived[-1] if survived else 0, 10)):  # fmt: skip
        ours = max((speed[seven, m, n] for m in ("full", "restricted") if (seven, m, n) in speed), default=None)
        target = f"7B step, {what}: ≥ {factor} × the reference's prompts per second"
        if ours is None or (seven, "reference", n) not in speed:
            found.append(Verdict(target, "not measured", None))
        else:
            ratio = ours / speed[seven, "reference", n]
            found.append(Verdict(target, f"{ratio:.3g}× at n = {n:,}", ratio >= factor))
    for model, method, least in (
        (seven, "full", 32768),
        (seven, "restricted", 131072),
        ("32B NF4", "restricted", 65536),
    ):
        reached = [n for n in lengths if (model, method, n) in speed]
        target = f"{model}, {method} gradients: ≥ {least:,} tokens"
        found.append(Verdict(target, f"{reached[-1]:,} tokens" if reached else "not measured",
                             reached[-1] >= least if reached else None))  # fmt: skip
    pair = [speed.get((seven, name, 200)) for name in ("evaluation", "evaluation, one by one")]
    measured = pair[0] is not None and pair[1] is not None
    found.append(Verdict("7B evaluation: ≥ 10 × the prompts per second of one at a time with full logits",
                         f"{pair[0] / pair[1]:.3g}×" if measured else "not measured",
                         pair[0] / pair[1] >= 10 if measured else None))  # fmt: skip
    planned = [(100 * abs(r["planned_bytes"] / r["peak_bytes"] - 1), r["n"]) for r in rows if r.get("planned_bytes")]
    found.append(Verdict("`abft plan` within 10 % of the measured peak",
                         "most " + _worst(planned, " %", smallest=False) if planned else "not measured",
                         max(planned)[0] <= 10 if planned else None))  # fmt: skip
    return found


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Every target, in the order in which it is told."""
    return [
        _rate(result, "forward_tflops", 450), _rate(result, "backward_tflops", 350),
        _against(result, "kernels", "SDPA flash"), _against(result, "kernels", "SDPA cuDNN"),
        _against(result, "flex", "FlexAttention, V columns"), _against(result, "flex", "FlexAttention, second LSE"),
        *(_overhead(result, labels, key, limit) for labels, limit in (("sparse", 3.0), ("dense", 8.0))
          for key in ("forward_ms", "backward_ms")),
        *_row_op(result), _memory(result), *_training(result),
    ]  # fmt: skip


def print_verdicts(result: dict[str, Any]) -> None:
    """The targets as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "measured", "met")
    for verdict in verdicts(result):
        table.add_row(verdict.target, verdict.measured, {True: "yes", False: "no", None: "–"}[verdict.met])
    Console(width=150).print(table)
