"""The launch table as a file: its entries by key, and the module's text with other entries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from abft_kernels.triton.launch_table import TABLE, Entry, Launch

__all__ = ["Entries", "Key", "present", "table_source"]


class Key(NamedTuple):
    """One entry to fill."""

    table: str
    element_size: int
    family: str
    head_tile: int
    groups: int


# Of each key those for little shared memory last.
Entries = dict[Key, list[Entry]]


def present() -> Entries:
    """Return the entries of the present table."""
    found: Entries = {}
    for key, entries in TABLE.items():
        for entry in entries:
            found.setdefault(Key(*key, entry.head_tile, entry.groups), []).append(entry)
    return found


def _launch(launch: Launch) -> str:
    """Return the launch as written in the table; a field that has a default is named, and left out where it has it."""
    defaults = Launch._field_defaults
    words = [str(x) for field, x in launch._asdict().items() if field not in defaults]
    words += [f"{field}={launch._asdict()[field]!r}" for field, x in defaults.items() if getattr(launch, field) != x]
    return f"Launch({', '.join(words)})"


def table_source(module: Path, entries: Entries, families: Iterable[str], kernels: Iterable[str], how: str) -> str:
    """Return the text of `launch_table.py` with these entries; its classes stay as they are."""
    text = module.read_text(encoding="utf-8")
    start, end = text.index("\n\n", text.index('"""')) + 2, text.index('"""', 3)
    table = text.index("TABLE: dict")
    lines = [f"{text[:start]}{how}\n{text[end:table].rstrip()}", "TABLE: dict[tuple[str, int, str], list[Entry]] = {"]
    families = list(families)
    for kernel in kernels:
        for element_size in (2, 4):
            for family in families:
                of_key = sorted(key for key in entries if key[:3] == (kernel, element_size, family))
                if not of_key:
                    lines.append(f'    ("{kernel}", {element_size}, "{family}"): [],')
                    continue
                lines.append(f'    ("{kernel}", {element_size}, "{family}"): [')
                written = [entry for key in of_key for entry in entries[key]]
                for entry, following in zip(written, [*written[1:], None], strict=True):
                    # A launch that serves many groups serves few.
                    same = following and (entry.head_tile, entry.launch) == (following.head_tile, following.launch)
                    if not same:
                        numbers = f"{entry.head_tile}, {entry.groups}, {_launch(entry.launch)}, {entry.shared_memory}"
                        lines.append(f"        Entry({numbers}),")
                lines.append("    ],")
    return "\n".join([*lines, "}", ""])
