"""The last lines of a run: for each suite its rows, what was left out and why, its time, and its key figures."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["print_summary", "summary"]

Row = dict[str, Any]


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "reason" not in row]


def _most(rows: list[Row], key: str, unit: str, title: str) -> list[str]:
    """Return the largest value of a key among our rows, and where it was."""
    points = [(row[key], row["n"]) for row in rows if row.get("name", "").startswith("abft") and key in row]
    return [f"{title} {max(points)[0]:.4g} {unit} at {max(points)[1]:,}"] if points else []


def _figures(suite: str, rows: list[Row]) -> list[str]:
    """Return the key figures of a suite's measured rows."""
    if suite == "prewarm":
        return [f"longest {max(row['seconds'] for row in rows):.0f} s"] if rows else []
    if suite == "correctness":
        exact = [row["ok"] for row in rows if row["check"] == "float64"]
        shards = Counter(row["status"] for row in rows if row["check"] == "tests")
        counts = [f"{count} shards {status}" for status, count in shards.items()]
        return [f"float64 {sum(exact)} of {len(exact)}", *counts]
    if suite == "kernels":
        return _most(rows, "forward_tflops", "TFLOP/s", "forward") + _most(
            rows, "backward_tflops", "TFLOP/s", "backward"
        )
    if suite == "rows":
        return _most(rows, "forward_gb_per_s", "GB/s", "forward")
    if suite == "memory":
        sizes = [(row["n"], row["both_bytes"]) for row in rows if row["name"] == "abft" and row["both_bytes"]]
        return [f"abft {max(sizes)[1] / 2**20:.0f} MiB at {max(sizes)[0]:,}"] if sizes else []
    if suite == "training":
        ours = [(row["n"], row["name"], row["model"]) for row in rows if row["name"] in ("full", "restricted")]
        return [f"longest {max(ours)[0]:,} tokens ({max(ours)[2]}, {max(ours)[1]})"] if ours else []
    if suite == "flex":
        speeds = [(row["forward_tflops"], row["n"]) for row in rows if "forward_tflops" in row]
        return [f"forward {max(speeds)[0]:.4g} TFLOP/s at {max(speeds)[1]:,}"] if speeds else []
    if suite == "precision":
        ours = [row for row in rows if row["form"].startswith("abft")]
        return [f"largest error {max(row['error']['median'] for row in ours):.2%}"] if ours else []
    return [f"{row['check']} {'clean' if row.get('ok') else 'found something'}" for row in rows]


def summary(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return of each suite: name, seconds of its budget, rows measured, rows left out and why, and key figures."""
    lines = []
    for name, suite in result["suites"].items():
        rows = _measured(suite["rows"])
        reasons = Counter(row["reason"].split(":")[0] for row in suite["rows"] if "reason" in row)
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))
        seconds = f"{suite['seconds']:.0f} of {suite['budget']:.0f}"
        lines.append((name, seconds, str(len(rows)), left_out or "none", "; ".join(_figures(name, rows))))
    return lines


def print_summary(result: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("suite", "seconds", "rows", "left out", "key figures")
    for line in summary(result):
        table.add_row(*line)
    Console(width=150).print(table)
