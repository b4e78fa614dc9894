"""Says whether a result may be published: `python -m bench.verify bench/results/gpu.json`.

A speed is refused unless, in the same file, the kernel tests and the comparison with float64 were green on the same
GPU; and so are dry runs, results of a changed tree, and figures without spread or provenance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["problems"]

_PROVENANCE = ("command", "commit", "dirty", "versions", "date", "gpu")


def problems(result: dict[str, Any], allow_dirty: bool = False) -> list[str]:
    """Everything that keeps the result from being published; empty if it may be."""
    if result.get("kind") != "gpu":
        return ["not a result of `python -m bench --gpu`"]
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
    checks = result.get("suites", {}).get("correctness", {}).get("rows", [])
    if not {row.get("check") for row in checks} >= {"pytest", "float64"}:
        found.append(
            "correctness was not checked on the card: the kernel tests and the comparison with float64 are missing"
        )
    for row in checks:
        if row.get("ok") is not True:
            what = row.get("failed") or row.get("reason") or row.get("error")
            found.append(f"correctness: {row.get('check')} {row.get('n', '')} failed: {what}")
    for name, suite in result.get("suites", {}).items():
        for row in suite.get("rows", []):
            for key, value in row.items():
                if key.endswith("_ms") and (
                    not isinstance(value, dict) or not {"median", "low", "high"} <= value.keys()
                ):
                    found.append(f"{name}: {row.get('name')} at {row.get('n')} has {key} without its spread")
    for row in result.get("suites", {}).get("sanitizer", {}).get("rows", []):
        if row.get("ok") is False:
            found.append(f"compute-sanitizer {row['check']} found something: {row.get('tail', '')[-300:]}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--allow-dirty", action="store_true", help="accept a tree with uncommitted changes")
    options = parser.parse_args(arguments)
    if not options.result.is_file():
        parser.error(f"no file {options.result}")
    found = problems(json.loads(options.result.read_text()), options.allow_dirty)
    for line in found:
        print(line)
    print(f"{options.result}: {'refused' if found else 'may be published'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
