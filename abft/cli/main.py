"""The command line: `abft COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from abft.cli.commands import COMMANDS

__all__ = ["main", "usage"]


def usage() -> str:
    """Return the usage text, with one line per command."""
    lines = "\n".join(f"  {command.name:<12}{command.help}" for command in COMMANDS)
    return f"""usage: abft COMMAND [OPTIONS]

{lines}

  abft COMMAND --help    options of a command
  abft --version"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for a failed check, 2 for bad input, 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"abft {metadata.version('abft')}")
        return 0
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        print(f"abft: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return command(rest)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"abft {name}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch is not imported for the commands that need none
            raise
        print(f"abft {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"abft {name}: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
