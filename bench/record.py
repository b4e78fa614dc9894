"""Where a number comes from, and its spread."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from abft.provenance import git, processor

__all__ = ["provenance", "spread"]


def provenance(packages: tuple[str, ...] = ("torch", "triton", "transformers")) -> dict[str, Any]:
    """Command, commit, versions, processor and date of this run.

    Where the files were copied without their `.git`, `BENCH_COMMIT` and `BENCH_DIRTY` (0 or 1) say what they are.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    here = Path(__file__).parent
    status = git("status", "--porcelain", "--untracked-files=no", folder=here)
    return {
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD", folder=here) or os.environ.get("BENCH_COMMIT"),
        "dirty": bool(status) if status is not None else {"0": False, "1": True}.get(os.environ.get("BENCH_DIRTY", "")),
        "versions": versions,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],  # at the start
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
