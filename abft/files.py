"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_figure", "whole", "write_json", "write_text"]


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path of the same name; afterwards move the file or folder written there to `path`.

    If the block raises, nothing is moved and nothing is left. The folder of `path` is made if absent.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150, tight: bool = True) -> None:
    """Write a figure whole or not at all, in the format of the suffix.

    Args:
        figure: what to write.
        path: the file.
        dpi: pixels per inch.
        tight: crop the figure to what is drawn, or extend it; otherwise it keeps its size.
    """
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight" if tight else None)
