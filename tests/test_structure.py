"""The layout of the packages: imports go one way, names of modules are unique, and nothing imports in a circle."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
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
# Packages whose modules may share a name with another module.
NAMES_NOT_CHECKED = ("abft_kernels",)


def module_name(path: Path) -> str:
    """Returns the dotted name of the module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """Returns the modules of these packages that a module imports, in functions and conditions too."""
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
    """Returns the part of the layers that a module belongs to."""
    top, *rest = name.split(".")
    return ".".join([top, *rest[:1]]) if top == "abft" else top


def test_every_module_has_a_layer():
    assert {part_of(name) for name in MODULES} == LAYER_OF.keys()


def test_imports_go_down():
    """A module imports from its own part or from a lower layer, whether at the top of its file or in a function."""
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if part_of(name) != part_of(other) and LAYER_OF[part_of(other)] >= LAYER_OF[part_of(name)]
    ]
    assert not upward


def test_names_of_modules_are_unique():
    files = defaultdict(list)
    for name, path in MODULES.items():
        if path.stem not in ("__init__", "__main__") and name.split(".")[0] not in NAMES_NOT_CHECKED:
            files[path.stem].append(name)
    assert not {stem: names for stem, names in files.items() if len(names) > 1}


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from None


def test_packages_are_light():
    """Packages and what everything shares import no PyTorch, so that the command line answers at once."""
    names = [name for name, path in MODULES.items() if path.name == "__init__.py" and part_of(name) != "abft_kernels"]
    names += ["abft.files", "abft.provenance", "abft.cli.main"]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "matplotlib"}} & sys.modules.keys()
    assert not heavy, (name, heavy)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
