"""The contributor's documents agree with the repository: recipes, hooks, architecture."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from import_graph import LAYER_OF, architecture

ROOT = Path(__file__).resolve().parents[1]


def recipes() -> list[list[str]]:
    """Return the cells of each recipe."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- recipes") : text.index("<!-- end of recipes")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]


def files(cell: str) -> list[str]:
    """Return the paths in a cell; other code in it is not a path."""
    return [code for code in re.findall(r"`([^`]+)`", cell) if re.fullmatch(r"[\w./-]+\.(py|md)", code)]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe[0])
def test_files_of_a_recipe_exist(recipe):
    assert len(recipe) == 3
    assert files(recipe[1])
    assert len(files(recipe[2])) == 1
    assert not [path for cell in recipe for path in files(cell) if not (ROOT / path).exists()]


def test_hooks_run_the_commands_of_make_lint():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert commands is not None
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in commands[1].splitlines()]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["entry"] for repository in hooks for hook in repository["hooks"]] == lint


def test_drawing_is_of_these_imports():
    sys.path.insert(0, str(ROOT / "docs"))
    from draw_architecture import drawn

    assert drawn() == architecture(), "run python docs/draw_architecture.py"


def test_architecture_names_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = [part.replace(".", "/") for part in LAYER_OF if part != "abft"]
    assert not [path for path in paths if f"`{path}`" not in text and f"`{path}.py`" not in text]


def test_lower_bounds_are_what_the_oldest_run_installs():
    """`make test-oldest` installs the bounds of Triton and the Hugging Face packages, `make test` that of torch."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project[project.index("dependencies = [") : project.index("[project.optional-dependencies]")]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', dependencies))
    pins = dict(re.findall(r"([\w-]+)==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("torch", "triton", "transformers", "peft", "accelerate"):
        assert f"{pins[name]}.".startswith(f"{bounds[name]}."), (name, pins[name], bounds[name])
        title = {"torch": "PyTorch", "triton": "Triton"}.get(name, name)
        assert f"{title} ≥ {bounds[name]}" in readme
