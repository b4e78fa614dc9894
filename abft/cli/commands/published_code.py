"""`abft prototype`: the options of the method's published code; see `abft.cli.prototype`."""

from __future__ import annotations

from collections.abc import Sequence

from abft.cli.command import Command

__all__ = ["COMMAND"]


def run(arguments: Sequence[str]) -> int:
    """Parse the published code's options and run the experiment that they stand for."""
    from abft.cli.prototype import prototype

    return prototype(arguments)


COMMAND = Command("prototype", "take the options of the method's published code, unchanged", run, own_parser=True)
