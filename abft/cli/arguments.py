"""Dataclasses of options as command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["parse"]


def parse(command: str, arguments: Sequence[str], *types: Any) -> tuple[Any, ...]:
    """The options of `abft COMMAND`, one object of each dataclass; prints help and leaves on `--help`."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(list(types), prog=f"abft {command}", description=types[0].__doc__)
    parsed = parser.parse_args_into_dataclasses(list(arguments))
    return tuple(parsed)
