"""Where a number comes from: command, commit, versions, hardware, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["git", "processor", "provenance", "versions"]

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets",
             "bitsandbytes", "flash-attn")  # fmt: skip


def git(*arguments: str, folder: Path) -> str | None:
    """What git prints in the folder; None where that is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, str]:
    """Installed versions of this package and of those that bear on its results."""
    import torch  # the rest of this module does without it

    from abft_kernels import __version__

    found = {"abft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda or "unknown"
    return found


def provenance() -> dict[str, Any]:
    """Of a result that is made now by this process; plain data."""
    package = Path(__file__).parent
    installed = "site-packages" in package.parts  # then a repository around it is not this project's
    commit = None if installed else git("rev-parse", "HEAD", folder=package)
    changed = None if commit is None else bool(git("status", "--porcelain", "-uno", folder=package))
    return {
        "command": ["abft", *sys.argv[1:]],
        "commit": commit,
        "dirty": changed,
        "versions": versions(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
