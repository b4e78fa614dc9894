"""Run folders: the results of one run as data, with their provenance."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft.files import write_json

__all__ = ["FORMAT_VERSION", "Run", "RunKey", "check_writable", "read_analysis", "read_experiment", "read_run"]

FORMAT_VERSION = 1
RUN, EXPERIMENT, ANALYSIS = "run.json", "experiment.json", "analysis.json"


@dataclass(frozen=True)
class RunKey:
    """The key of a run within its experiment.

    Args:
        method: name in `METHODS`.
        task: the task of its training; without training, of its test.
        num_prompts: training prompts, 0 without training.
        seed: of training and its prompts.
        grid: the options that this run changes, as text (see `abft.experiments.grid`); empty for a plain run.
    """

    method: str
    task: str
    num_prompts: int = 0
    seed: int = 0
    grid: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder, valid on any file system."""
        task = "".join(c if c.isalnum() else "-" for c in self.task)
        trained = f"-n{self.num_prompts}-seed{self.seed}" if self.num_prompts else ""
        return f"{self.method}-{task}{trained}" + (f"-{self.grid}" if self.grid else "")


@dataclass
class Run:
    """One `run.json`.

    Args:
        key: which run it is.
        settings: everything that its results depend on; a folder made with other settings is refused.
        tests: task → test → results (see `TaskSuite.run`).
        training: seconds, peak memory, history; None without training.
        provenance: versions, commit, hardware, date, command.
    """

    key: RunKey
    settings: dict[str, Any]
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `folder/run.json` whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **vars(self), "key": vars(self.key)}
        write_json(folder / RUN, content)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file of this format version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete the folder to make it anew") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; use the release that wrote "
            "it, or delete it"
        )
    return content


def read_run(folder: str | os.PathLike[str]) -> Run | None:
    """Read `folder/run.json`; return None if there is none.

    Raises:
        ValueError: it is of another version, or not JSON.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        return None
    content = _read(path)
    content.pop("format_version")
    return Run(**{**content, "key": RunKey(**content["key"])})


def read_experiment(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Run]]:
    """Read an experiment's settings and its finished runs, in their order.

    Raises:
        FileNotFoundError: `abft experiment` did not write the folder.
        ValueError: it is of another version.
    """
    path = Path(folder) / EXPERIMENT
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder that `abft experiment` wrote")
    content = _read(path)
    keys = [RunKey(**key) for key in content["runs"]]
    content["runs"] = [vars(key) for key in keys]  # fields that a key was stored without have their default
    runs = (read_run(Path(folder) / "runs" / key.folder) for key in keys)
    return content, [run for run in runs if run is not None]


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and return its path.

    Raises:
        ValueError: the folder cannot be made or written to, or is a file.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {path} ({error.strerror}); choose another folder") from error
    return path


def read_analysis(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the results of `abft analyze` from an experiment's folder; return None if there are none.

    Raises:
        ValueError: it is of another version.
    """
    path = Path(folder) / ANALYSIS
    return _read(path) if path.is_file() else None
