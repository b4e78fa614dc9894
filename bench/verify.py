"""Check that a result may be published: `python -m bench.verify bench/results/gpu.json`.

A speed is refused unless the kernel tests and the comparison with float64 passed on the same GPU, in the same file.
Dry runs, results of a changed tree, and figures without spread or provenance are refused too.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.result_file import read_result, result_parser

__all__ = ["problems"]

_PROVENANCE = ("command", "commit", "dirty", "versions", "date", "gpu")


def problems(result: dict[str, Any], allow_dirty: bool = False) -> list[str]:
    """Return the reasons not to publish the result; empty if it may be published."""
    if result.get("kind") != "gpu":
        return ["not a result of `python -m bench --gpu`"]
    found = _source_problems(result, allow_dirty) + _correctness_problems(result)
    for name, suite in result.get("suites", {}).items():
        for row in suite.get("rows", []):
            found += [
                f"{name}: {row.get('name')} at {row.get('n')} has {key} without its spread"
                for key, value in row.items()
                if key.endswith("_ms") and not (isinstance(value, dict) and {"median", "low", "high"} <= value.keys())
            ]
    return found


def _source_problems(result: dict[str, Any], allow_dirty: bool) -> list[str]:
    """Return the problems of where the result comes from."""
    found = []
    if result.get("dry_run") is not False:
        found.append("a dry run on a CPU: it measures nothing")
    source = result.get("provenance", {})
    found += [f"provenance lacks {name}" for name in _PROVENANCE if source.get(name) is None]
    if source.get("dirty") and not allow_dirty:
        found.append("the tree had changes beyond its commit; commit them and run again, or --allow-dirty")
    if not source.get("gpu", {}).get("name"):
        found.append("no GPU named")
    if not result.get("complete"):
        found.append("the run was cut off, or had --only")
    return found


def _correctness_problems(result: dict[str, Any]) -> list[str]:
    """Return the problems of the checks that were made on the card."""
    found = []
    checks = result.get("suites", {}).get("correctness", {}).get("rows", [])
    if not {row.get("check") for row in checks} >= {"pytest", "float64"}:
        found.append(
            "correctness was not checked on the card: the kernel tests and the comparison with float64 are missing"
        )
    for row in checks:
        if row.get("ok") is not True:
            what = row.get("failed") or row.get("reason") or row.get("error")
            found.append(f"correctness: {row.get('check')} {row.get('n', '')} failed: {what}")
    for row in result.get("suites", {}).get("sanitizer", {}).get("rows", []):
        if row.get("ok") is False:
            found.append(f"compute-sanitizer {row['check']} found something: {row.get('tail', '')[-300:]}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the reasons not to publish the result; return 1 if there are any."""
    options, result = read_result(result_parser("bench.verify", __doc__), arguments)
    found = problems(result, options.allow_dirty)
    for line in found:
        print(line)
    print(f"{options.result}: {'refused' if found else 'may be published'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
