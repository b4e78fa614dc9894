"""The public names of `abft`: one list, imported on first use, known to type checkers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import abft
import abft_kernels


def test_public_names():
    assert sorted(abft.__all__) == sorted(dir(abft)) == sorted(set(abft.__all__))
    assert {"ABFTTrainer", "attention_mass", "enable", "evaluate"} <= set(abft.__all__)
    assert abft.__version__ == abft_kernels.__version__
    with pytest.raises(AttributeError, match="nothing"):
        _ = abft.nothing


def test_each_name_is_that_of_its_module():
    stub = Path(abft.__file__).with_suffix(".pyi")
    for node in ast.parse(stub.read_text()).body:
        assert isinstance(node, ast.ImportFrom)
        module = importlib.import_module(f"abft.{node.module}")
        for alias in node.names:
            assert alias.asname == alias.name, "type checkers take `import x as x` alone for public"
            assert getattr(abft, alias.name) is getattr(module, alias.name)


def test_importing_is_light():
    code = "import sys, abft; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
