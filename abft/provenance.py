"""The provenance of a number: command, commit, versions, hardware, date."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["installed", "peak_memory", "processor", "provenance", "reset_peak_memory", "resident_peak", "versions"]

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "datasets",
             "bitsandbytes", "flash-attn")  # fmt: skip


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints in the folder; None if that is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages; one that is missing is "not installed"."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of those that bear on its results, and the GPU."""
    import torch  # the rest of this module does without it

    from abft_kernels import __version__

    present = {name: version for name, version in installed(_PACKAGES).items() if version != "not installed"}
    found = {"abft": __version__, **present}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda or "unknown"
    return found


def _commit(folder: Path, variables: tuple[str, str] | None) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout and whether its files were changed since."""
    in_site_packages = "site-packages" in folder.parts  # a repository around it is not this project's
    commit = None if in_site_packages else _git(folder, "rev-parse", "HEAD")
    if commit is not None:
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    if variables is None:
        return None, None
    name, dirty = (os.environ.get(variable) for variable in variables)
    return name, {"0": False, "1": True}.get(dirty or "")


def provenance(
    command: str | Sequence[str] | None = None,
    packages: Sequence[str] | None = None,
    *,
    folder: Path = Path(__file__).parent,
    variables: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Return where a result comes from that this process computes now, as plain data.

    Args:
        command: the command that was given; None for `abft` and its arguments.
        packages: packages whose versions are recorded; None for those of :func:`versions`.
        folder: a folder of the program.
        variables: environment variables with the commit, and with 0 or 1 for changed files, which are read where the
            folder is no git checkout.
    """
    commit, dirty = _commit(folder, variables)
    return {
        "command": ["abft", *sys.argv[1:]] if command is None else command,
        "commit": commit,
        "dirty": dirty,
        "versions": versions() if packages is None else installed(packages),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def resident_peak() -> int:
    """Return the most bytes of memory that this process has had since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def peak_memory() -> int:
    """Return the peak in bytes: of the GPU since :func:`reset_peak_memory`, without one of this process."""
    import torch  # the command line imports this module without it

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak()


def reset_peak_memory() -> None:
    """Start the peak of the GPU anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
