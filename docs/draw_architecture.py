"""Draw the imports between the parts of the packages: `python docs/draw_architecture.py`.

The graph is that of `tests/import_graph.py`. The picture holds its own data as its description, so that
`tests/test_contributing.py` can compare it with the code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from import_graph import GRAPH, LAYER_OF, LAYERS, MODULES, architecture, part_of  # noqa: E402

PICTURE = ROOT / "docs" / "figures" / "architecture.svg"
_WIDTH, _HEIGHT = 2.3, 0.62
Point = tuple[float, float]
_COLOURS = {"abft_kernels": "#CFE8F7", "bench": "#E8E8E8"}  # of boxes outside of `abft`


def _subfolders(part: str) -> list[str]:
    """Return the names of the packages inside a part."""
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py" and part_of(name) == part]
    return sorted(name.removeprefix(f"{part}.") for name in packages if name != part)


def _places() -> dict[str, Point]:
    """Return the centre of each part's box: a row for each layer, the lowest layer at the bottom.

    A part that has its layer for itself stands a little to the left or to the right, so that arrows pass beside it.
    """
    return {
        part: (
            3.0 * (column - (len(parts) - 1) / 2) + (len(parts) == 1) * (1.3 if layer % 2 or not layer else -1.3),
            1.35 * layer,
        )
        for layer, parts in enumerate(LAYERS)
        for column, part in enumerate(parts)
    }


def _label_place(start: Point, end: Point, taken: list[Point]) -> Point:
    """Return the first place on the arrow that is on no box and on no other number."""
    for share in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9):
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        on_box = any(
            abs(x - bx) < _WIDTH / 2 + 0.1 and abs(y - by) < _HEIGHT / 2 + 0.1 for bx, by in _places().values()
        )
        if not on_box and all(abs(x - tx) + abs(y - ty) > 0.3 for tx, ty in taken):
            return x, y
    return start


def _direct() -> set[tuple[str, str]]:
    """Return the imports between parts that no longer path of imports implies."""
    below: dict[str, set[str]] = {part: set() for part in LAYER_OF}
    for name, others in GRAPH.items():
        below[part_of(name)] |= {part_of(other) for other in others} - {part_of(name)}

    def reached(part: str) -> set[str]:
        return below[part].union(*(reached(other) for other in below[part]))

    return {
        (part, other)
        for part, others in below.items()
        for other in others
        if not any(other in reached(between) for between in others)
    }


def draw() -> Figure:
    """Return the drawing: direct imports dark, with counts; imports that a path of others implies light."""
    data, places, direct = architecture(), _places(), _direct()
    figure = Figure(figsize=(11, 11.5), layout="constrained")
    axes = figure.subplots()
    taken: list[Point] = []
    for above, below, count in data["imports"]:
        (x0, y0), (x1, y1) = places[above], places[below]
        strong = (above, below) in direct
        start, end = (x0 + 0.12 * (x1 - x0), y0 - _HEIGHT / 2), (x1 + 0.12 * (x0 - x1), y1 + _HEIGHT / 2)
        style: dict[str, Any] = (
            {"color": "#222222", "linewidth": 1.3} if strong else {"color": "#C4C4C4", "linewidth": 0.8}
        )
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, zorder=1 + strong, **style))
        if strong:
            taken.append(_label_place(start, end, taken))
            frame = {"fc": "white", "ec": "none", "pad": 1}
            axes.annotate(count, taken[-1], ha="center", va="center", fontsize=9, zorder=3, bbox=frame)
    for part, modules in data["modules"]:
        x, y = places[part]
        box = FancyBboxPatch(
            (x - _WIDTH / 2, y - _HEIGHT / 2),
            _WIDTH,
            _HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.1",
            zorder=4,
            facecolor=_COLOURS.get(part, "#FBEFD5"),
            edgecolor="#222222",
        )
        axes.add_patch(box)
        inner = _subfolders(part)
        note = f"{modules} module{'s' if modules > 1 else ''}" + (
            f": {', '.join(inner)}" if inner and part != "abft" else ""
        )
        axes.annotate(
            part.replace(".", "/"), (x, y + 0.1), ha="center", va="center", fontsize=11, weight="bold", zorder=5
        )
        axes.annotate(note, (x, y - 0.16), ha="center", va="center", fontsize=8, zorder=5)
    axes.autoscale_view()
    axes.axis("off")
    return figure


def drawn(path: Path = PICTURE) -> Any:
    """Return the data that a committed picture was drawn from."""
    text = path.read_text(encoding="utf-8")
    start = text.index("<dc:description>") + len("<dc:description>")
    return json.loads(text[start : text.index("</dc:description>")])


def main() -> None:
    """Write the picture."""
    matplotlib.rcParams.update({"svg.hashsalt": "abft", "svg.fonttype": "none"})
    metadata = {"Date": None, "Description": json.dumps(architecture())}
    draw().savefig(PICTURE, metadata=metadata)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
