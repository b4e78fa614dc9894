"""The layout of the packages: imports go one way, names of modules are unique, and nothing imports in a circle."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

from import_graph import GRAPH, LAYER_OF, MODULES, ROOT, part_of

import abft
import abft_kernels

MOST_PARAMETERS = {"kernel": 30, "block": 18, "function": 12}
# transformers calls it with arguments of its own, and `model(...)` with the package's keywords.
FIXED_BY_AN_INTERFACE = {"abft.models.attention._attention_forward"}


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
        if path.stem not in ("__init__", "__main__"):
            files[path.stem].append(name)
    assert not {stem: names for stem, names in files.items() if len(names) > 1}


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from None


def _kind(function: ast.FunctionDef) -> str:
    if not any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return "function"
    return "kernel" if function.name.endswith("_kernel") else "block"


def test_signatures_are_short():
    """Only public functions and constructors of options take more than 12 parameters; kernels take structs."""
    public = {*abft.__all__, *abft_kernels.__all__}
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or f"{name}.{node.name}" in FIXED_BY_AN_INTERFACE:
                continue
            kind, arguments = _kind(node), node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            if count > MOST_PARAMETERS[kind] and not (kind == "function" and node.name in public):
                long.append(f"{name}.{node.name}, a {kind}: {count}")
    assert not long


def test_files_read_in_one_sitting():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > 500}


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
