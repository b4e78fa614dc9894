"""The modules of the packages, what each imports, and the layers that imports must respect.

`test_structure.py` checks the layers; `docs/draw_architecture.py` draws them.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("abft", "abft_kernels", "bench")
# From the bottom to the top: a part may import from itself and from the layers below its own, not from its neighbours.
LAYERS = (
    ("abft_kernels",),
    ("abft.files", "abft.provenance", "abft.losses", "abft.prompts", "abft.version"),
    ("abft.models",),
    ("abft.evaluation",),
    ("abft.training", "abft.analysis", "abft.plots"),
    ("abft.demo",),
    ("abft.experiments",),
    ("abft",),  # `abft/__init__.py` alone, which offers names of the layers below
    ("abft.cli", "bench"),
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


def module_name(path: Path) -> str:
    """Return the dotted name of the module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """Return the modules of these packages that a module imports, in functions and conditions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {inner_name if inner_name in MODULES else source for inner_name in inner}
    return found & MODULES.keys()


GRAPH = {name: imported(name, path) for name, path in MODULES.items()}


def part_of(name: str) -> str:
    """Return the part of the layers that a module belongs to."""
    top, *rest = name.split(".")
    return ".".join([top, *rest[:1]]) if top == "abft" else top


def architecture() -> dict[str, list[list[str | int]]]:
    """Return the parts with their numbers of modules, and the imports between parts with their numbers."""
    modules = Counter(part_of(name) for name in MODULES)
    imports = Counter(
        (part_of(name), part_of(other))
        for name, others in GRAPH.items()
        for other in others
        if part_of(name) != part_of(other)
    )
    return {
        "modules": [[part, modules[part]] for layer in LAYERS for part in layer],
        "imports": sorted([above, below, count] for (above, below), count in imports.items()),
    }
