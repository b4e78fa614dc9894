"""Recipes of the paper's tables and figures: checked options, shared runs, one report."""

from dataclasses import fields, replace

import pytest

from abft.cli.main import main
from abft.evaluation.suites import check_tests
from abft.experiments.analyze import PARTS
from abft.experiments.experiment import ExperimentOptions
from abft.experiments.figures import all_figures
from abft.experiments.grid import parse_grid
from abft.experiments.methods import resolve_methods
from abft.experiments.recipes import RECIPES, find_recipes, options_of, recipe_table
from abft.experiments.report_tables import experiment_tables
from abft.experiments.results import Results

GIVEN = ExperimentOptions(model="demo", output_dir="runs", data="demo", k=8)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_its_options_are_those_of_an_experiment(recipe):
    assert recipe.options.keys() <= {option.name for option in fields(ExperimentOptions)}
    resolve_methods(recipe.options.get("methods", ["paper"]))
    check_tests(recipe.options.get("tests", ["Normal"]))
    parse_grid(recipe.options.get("grid", []))
    assert set(recipe.parts) <= set(PARTS)
    assert recipe.shows
    assert recipe.needs


def test_what_it_shows_is_in_the_report(experiment_folder):
    """Tables and figures of an experiment with every test; a grid and several sizes have tests of their own."""
    results = Results(experiment_folder)
    tables = {table.name.removeprefix(f"{results.folder.name}-") for table in experiment_tables(results)}
    there = {*tables, *all_figures(results), *PARTS, "grid", "data-efficiency"}
    for recipe in RECIPES.values():
        assert set(recipe.shows) <= there, recipe.name


def test_what_the_user_gives_wins():
    assert options_of(RECIPES["fig3"], GIVEN).num_prompts == [32, 64, 128, 256, 512]
    given = replace(GIVEN, num_prompts=[16], limit=4)
    found = options_of(RECIPES["fig3"], given)
    assert (found.num_prompts, found.limit, found.k) == ([16], 4, 8)
    assert found.tests == ["Normal", "ZeroShot"]


def test_names():
    assert [recipe.name for recipe in find_recipes(["fig7", "table1", "fig7"])] == ["fig7", "table1"]
    assert len(find_recipes(["all"])) == len(RECIPES)
    with pytest.raises(ValueError, match="no recipe 'table9'; known are table1"):
        find_recipes(["table1", "table9"])


def test_list_needs_no_model(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--list"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert recipe_table().row_count == len(RECIPES)


def test_bad_recipe_touches_nothing(tmp_path, capsys):
    command = [
        "reproduce",
        "table1",
        "fig77",
        "--model",
        "demo",
        "--data",
        "demo",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "no recipe 'fig77'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_recipes_share_their_runs(tmp_path, capsys):
    size = "--num_prompts 16 --limit 2 --num_train_epochs 1 --learning_rate 5e-4 --pseudo_batch_size 16 --batch_size 8"
    command = ["reproduce", "fig4", "fig10", "appendix_b", "--model", "demo", "--data", "demo", "--tasks", "topics"]
    command += ["--quiet", "True", "--output_dir", str(tmp_path), *size.split()]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 3
    report = (tmp_path / "report.md").read_text()
    assert "fig10 → robustness" in out
    assert "unseen" in report.lower()
    pictures = [path.stem for path in (tmp_path / "figures").glob("*.png")]
    for name in ("label-attention", "distance"):
        assert any(picture.endswith(name) for picture in pictures), pictures
    assert main(command) == 0  # everything is there: nothing is trained
