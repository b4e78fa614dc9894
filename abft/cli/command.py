"""A command of the command line, and its options read from dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Command", "sourced", "write_note"]


@dataclass(frozen=True)
class Command:
    """One command: `abft NAME [OPTIONS]`.

    A module of a command imports nothing heavy before `options` or `run` is called, so that the usage text is printed
    at once.

    Args:
        name: as given on the command line.
        help: one line for the usage text.
        run: the command; takes one object of each dataclass of options, then a namespace of the further arguments if
            there are any, and returns the exit status.
        options: returns the dataclasses of options; the first one's docstring describes the command.
        further: positional arguments and switches, with what `ArgumentParser.add_argument` takes for each.
        own_parser: `run` takes the arguments as they are and parses them itself.
    """

    name: str
    help: str
    run: Callable[..., int]
    options: Callable[[], tuple[Any, ...]] = tuple
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own_parser: bool = False

    def __call__(self, arguments: Sequence[str]) -> int:
        """Run the command with these arguments; print help and leave on `--help`."""
        return self.run(arguments) if self.own_parser else self.run(*self.parse(arguments))

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return what `run` takes."""
        types, program = self.options(), f"abft {self.name}"
        if not types:  # without transformers, which may be what is broken
            argparse.ArgumentParser(prog=program).parse_args(list(arguments))
            return ()
        from transformers import HfArgumentParser

        parser = HfArgumentParser(list(types), prog=program, description=types[0].__doc__)
        for name, how in self.further.items():
            parser.add_argument(name, **how)
        return tuple(parser.parse_args_into_dataclasses(list(arguments)))


def sourced(options: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a result file after where it comes from and the command's options."""
    from abft.provenance import provenance

    return {**provenance(), "options": asdict(options), **content}


def write_note(paths: Sequence[str | Path]) -> None:
    """Print which files were written."""
    from rich.console import Console

    Console().print(f"written: {', '.join(map(str, paths))}", highlight=False)
