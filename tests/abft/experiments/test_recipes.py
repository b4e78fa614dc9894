"""Recipes of the paper's tables and figures: checked options, shared runs, one report."""

from dataclasses import fields, replace

import pytest

from abft.cli.main import main
from abft.evaluation.suites import check_tests
from abft.experiments.analyze import PARTS, AnalyzeOptions, analyze
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.experiments.figures import all_figures
from abft.experiments.grid import parse_grid
from abft.experiments.methods import resolve_methods
from abft.experiments.recipes import RECIPES, find_recipes, options_of, recipe_table
from abft.experiments.report_tables import experiment_tables
from abft.experiments.results import Results
from abft.experiments.runs import RunKey, read_analysis

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


def test_metaicl_trains_on_the_other_tasks(one_task_options, tmp_path):
    """Its run, the plane through it (Fig. 9), and a refusal of weights that other tasks trained."""
    options = replace(
        one_task_options, output_dir=str(tmp_path), tasks=["topics", "moods"], train_tasks=["topics"], limit=2,
        methods=["vanilla", "abft", "metaicl"], generalization=True,
    )  # fmt: skip
    experiment = Experiment(options)
    runs = {run.key.method: run for run in experiment.run()}
    assert runs["abft"].training["tasks"] == ["topics"]
    assert runs["metaicl"].training["tasks"] == ["moods"]
    assert (set(runs["abft"].tests), set(runs["metaicl"].tests)) == ({"topics", "moods"}, {"topics"})
    assert runs["metaicl"].training["trained_parameters"] > 4 * runs["abft"].training["trained_parameters"]
    card = (tmp_path / "runs" / runs["metaicl"].key.folder / "weights" / "README.md").read_text()
    assert "All parameters of `demo`, trained with MetaICL on 16" in card
    assert "of the other tasks than topics" in card

    found = analyze(AnalyzeOptions(experiment=str(tmp_path), parts=["connectivity_metaicl"], prompts=4, quiet=True))
    plane = found["connectivity_metaicl"]
    assert plane["methods"] == ["metaicl", "abft"]
    assert len(plane["accuracy"]) == len(plane["factors"]) == 9
    assert "connectivity_metaicl" in all_figures(Results(tmp_path), read_analysis(tmp_path))

    with pytest.raises(ValueError, match="was trained on moods, now it would be on moods, more topics; choose"):
        Experiment(replace(options, tasks=["topics", "moods", "more topics"]))
    with pytest.raises(ValueError, match="metaicl trains on the other tasks; name two tasks or more"):
        Experiment(replace(options, tasks=["topics"]))


def test_metaicl_takes_as_many_prompts_of_each_task(one_task_options, tmp_path):
    options = replace(
        one_task_options, output_dir=str(tmp_path), tasks=["topics", "moods", "more topics"], methods=["metaicl"],
        num_prompts=[5],
    )  # fmt: skip
    experiment = Experiment(options)
    prompts = experiment._training_prompts(RunKey("metaicl", "topics", 5, 0))
    of_task = {name: set(experiment._drawn(name, 5, 0)) for name in experiment.data}
    assert [sum(prompt in of_task[name] for prompt in prompts) for name in of_task] == [0, 3, 2]
