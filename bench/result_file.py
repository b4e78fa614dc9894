"""The file of a result: how a case writes it, and how the commands that take one read it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abft.files import write_json
from bench.record import provenance

__all__ = ["read_result", "result_parser", "write_result"]


def write_result(
    path: Path,
    collect: Callable[[], dict[str, Any]],
    packages: tuple[str, ...] = ("torch", "triton", "transformers"),
) -> Path:
    """Run `collect`, write its data with the provenance taken before it, and return the path."""
    source = provenance(packages)
    write_json(path, {"provenance": source, **collect()})
    return path


def result_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command that takes a result; the first line of `description` is its help."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(description or "").split("\n")[0])
    parser.add_argument("result", type=Path, help="file of a result")
    parser.add_argument("--allow-dirty", action="store_true", help="accept a tree with uncommitted changes")
    return parser


def read_result(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options and the data of the file that they name; a missing file ends the command."""
    options = parser.parse_args(arguments)
    if not options.result.is_file():
        parser.error(f"no file {options.result}; `python -m bench` writes results")
    return options, json.loads(options.result.read_text(encoding="utf-8"))
