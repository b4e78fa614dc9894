"""The layout of the packages: imports go one way, names of modules are unique, and nothing imports in a circle."""

import os
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

from import_graph import GRAPH, LAYER_OF, MODULES, ROOT, part_of

# Packages whose modules may share a name with another module.
NAMES_NOT_CHECKED = ("abft_kernels",)


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
    """No package, and no module of the first usage text, imports PyTorch: the command line answers at once."""
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
