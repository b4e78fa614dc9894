"""Check that a result may be published: `python -m bench.verify bench/results/gpu.json`.

Dry runs, results of a changed tree, and figures without clock, spread or provenance are refused. So is a file without
the proof, made on the same GPU, that the kernels are right. The rule:

1. A failed shard of the kernel tests, or a result that differs from float64, refuses the whole file: a shard fails by
   one failed test, even if its time ended afterwards, or by a crash.
2. Fewer than a third of the shards passed, or no comparison with float64: the whole file is refused.
3. A shard that its time cut off, or that was not run, is listed, and refuses the figures that stand on it alone: the
   suites that `bench.gpu.shards` names for it. Those whose kernels every shard has passed stay.

Shards of features that no suite times name no suite: without them the figures stand, and the list says what the run
has not tested.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu.shards import SHARDS
from bench.result_file import read_result, result_parser

__all__ = ["accepted", "problems", "refused", "untested"]

_PROVENANCE = ("command", "commit", "dirty", "versions", "date", "gpu")
_LEAST_PASSED = 1 / 3


def problems(result: dict[str, Any], allow_dirty: bool = False) -> list[str]:
    """Return the reasons not to publish the result at all; empty if it may be published, in part at least."""
    if result.get("kind") != "gpu":
        return ["not a result of `python -m bench --gpu`"]
    found = _source_problems(result, allow_dirty) + _correctness_problems(result)
    for name, suite in result.get("suites", {}).items():
        for row in suite.get("rows", []):
            found += [
                f"{name}: {row.get('name')} at {row.get('n')} has {key} without its {lacks}"
                for key, value in row.items()
                if key.endswith("_ms") and (lacks := _lacks(value))
            ]
    return found


def _lacks(value: Any) -> str:
    """Return what a time lacks: spread or clock; empty if it has both."""
    if not (isinstance(value, dict) and {"median", "low", "high"} <= value.keys()):
        return "spread"
    return "" if value.get("clock") in ("graph", "events", "wall") else "clock"


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


def _shards(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of the shards by name."""
    rows = result.get("suites", {}).get("correctness", {}).get("rows", [])
    return {row["shard"]: row for row in rows if row.get("check") == "tests"}


def _correctness_problems(result: dict[str, Any]) -> list[str]:
    """Return the problems of the checks that were made on the card."""
    found = []
    suites, shards = result.get("suites", {}), _shards(result)
    exact = [row for row in suites.get("correctness", {}).get("rows", []) if row.get("check") == "float64"]
    if not exact:
        found.append("correctness was not checked on the card: the comparison with float64 is missing")
    for row in exact:
        if row.get("ok") is not True:
            why = row.get("reason") or row.get("error")
            found.append(f"correctness: float64 at head_dim {row.get('head_dim')} failed: {why}")
    for name, row in shards.items():
        if row["status"] == "failed":
            found.append(f"correctness: shard {name} failed: {row.get('failed') or row.get('output', '')[-300:]}")
    passed = sum(shards.get(shard.name, {}).get("status") == "passed" for shard in SHARDS)
    if passed < _LEAST_PASSED * len(SHARDS):
        found.append(f"correctness was not checked enough on the card: {passed} of {len(SHARDS)} shards passed")
    for row in suites.get("sanitizer", {}).get("rows", []):
        if row.get("ok") is False:
            found.append(f"compute-sanitizer {row['check']} found something: {row.get('tail', '')[-300:]}")
    return found


def untested(result: dict[str, Any]) -> dict[str, str]:
    """Return the shards that neither passed nor failed, and why."""
    shards = _shards(result)
    return {
        shard.name: str(row.get("reason") or row.get("status", "not in the file"))
        for shard in SHARDS
        if (row := shards.get(shard.name, {})).get("status") not in ("passed", "failed")
    }


def refused(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return the suites of the file that must not be published, with the untested shards that they stand on."""
    missing = untested(result)
    suites = {
        name: [shard.name for shard in SHARDS if name in shard.covers and shard.name in missing]
        for name in result.get("suites", {})
    }
    return {name: shards for name, shards in suites.items() if shards}


def accepted(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result without the suites that must not be published."""
    without = refused(result)
    return {**result, "suites": {name: suite for name, suite in result["suites"].items() if name not in without}}


def main(arguments: list[str] | None = None) -> int:
    """Print the reasons not to publish the result, whole or in part; return 1 if it may not be published at all."""
    options, result = read_result(result_parser("bench.verify", __doc__), arguments)
    found = problems(result, options.allow_dirty)
    print(*found, sep="\n", end="\n" if found else "")
    without: dict[str, list[str]] = {}
    if not found:
        without = refused(result)
        for name, why in untested(result).items():
            print(f"not tested: shard {name}: {why}")
        for name, shards in without.items():
            print(f"suite {name}: refused, it stands on {', '.join(shards)}")
    verdict = f"may be published without {', '.join(without)}" if without else "may be published"
    print(f"{options.result}: {'refused' if found else verdict}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
