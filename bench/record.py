"""The provenance of a number, and its spread."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import abft.provenance

__all__ = ["provenance", "spread"]


def provenance(packages: tuple[str, ...] = ("torch", "triton", "transformers")) -> dict[str, Any]:
    """Return the command, commit, versions, processor, load and date of this run.

    Where the files were copied without their `.git`, `BENCH_COMMIT` and `BENCH_DIRTY` (0 or 1) name the commit.
    """
    spec = sys.modules["__main__"].__spec__  # None in a test or a notebook
    module = "bench" if spec is None else spec.name.removesuffix(".__main__")
    source = abft.provenance.provenance(
        " ".join(["python", "-m", module, *sys.argv[1:]]),
        packages,
        folder=Path(__file__).parent,
        variables=("BENCH_COMMIT", "BENCH_DIRTY"),
    )
    return {
        **source,
        "load_average": [round(load, 2) for load in os.getloadavg()],  # at the start
        "platform": f"{platform.system()} {platform.machine()}",
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
