"""Grids of options: the names of their points, runs that resume, and their map."""

import json
from dataclasses import replace

import numpy as np
import pytest

from abft.experiments.experiment import Experiment
from abft.experiments.grid import changes_of, grid_points, own_options, parse_grid
from abft.experiments.grid_maps import grid_figures
from abft.experiments.methods import METHODS
from abft.experiments.results import Results
from abft.experiments.runs import RunKey, read_run
from abft.training.trainer import ABFTTrainer


def test_values_have_the_types_of_their_options():
    grid = parse_grid(["wrong_penalty=0,0.25", "adaption=PID,none", "head_filter=False", "pseudo_batch_size=8"])
    assert grid == {"wrong_penalty": [0.0, 0.25], "adaption": ["PID", "none"], "head_filter": [False],
                    "pseudo_batch_size": [8]}  # fmt: skip
    assert [type(values[0]) for values in grid.values()] == [float, str, bool, int]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["wrong_penalty"], "NAME=VALUE,VALUE with each option once, got 'wrong_penalty'"),
        (["correct_award=1", "correct_award=2"], "each option once, got 'correct_award=2'"),
        (["k=4,8"], "the grid names 'k', which is no training option"),
        (["adaption=PID,PI"], "the grid gives adaption the value 'PI': .*invalid choice"),
        (["wrong_penalty=0,zero"], "the grid gives wrong_penalty the value 'zero'"),
        (["wrong_penalty=0.5,0.50"], "gives wrong_penalty a value twice"),
    ],
)
def test_grids_that_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(texts)


def test_points_are_named_by_what_they_change():
    own = own_options(METHODS["abft"], {"lora": False})
    assert own["learning_rate"] == 2e-5
    grid = {"wrong_penalty": [0.0, 0.5], "learning_rate": [2e-5, 1e-3], "head_filter": [True, False]}
    points = grid_points(grid, own)
    assert len(points) == len(set(points)) == 7  # all but the plain run
    assert "head_filter=False,learning_rate=0.001,wrong_penalty=0.0" in points
    assert "wrong_penalty=0.0" in points
    for point in points:
        assert ",".join(f"{name}={value}" for name, value in sorted(changes_of(point).items())) == point
    assert changes_of("") == {}
    assert grid_points({"wrong_penalty": [0.0, 0.5]}, own_options(METHODS["a0"], {})) == ["wrong_penalty=0.5"]
    share = METHODS["share"]
    grid = {"wrong_penalty": [0.0, 0.5], "mass_award": [0.0, 0.1]}
    assert grid_points(grid, own_options(share, {}), share.objective.ignores) == ["mass_award=0.0"]


def test_folders_of_points_differ():
    keys = [RunKey("abft", "a", 8, 0, point) for point in ("", "wrong_penalty=0.0", "wrong_penalty=0.25", "lora=True")]
    assert keys[0].folder == "abft-a-n8-seed0"
    assert keys[2].folder == "abft-a-n8-seed0-wrong_penalty=0.25"
    assert len({key.folder for key in keys}) == 4


@pytest.fixture(scope="module")
def grid_options(one_task_options, tmp_path_factory):
    return replace(
        one_task_options,
        output_dir=str(tmp_path_factory.mktemp("grid") / "run"),
        methods=["vanilla", "abft"],
        grid=["wrong_penalty=0,0.5", "adaption=PID,none"],
        num_train_epochs=2,
    )


@pytest.fixture(scope="module")
def grid_folder(grid_options):
    return Experiment(grid_options).run() and Experiment(grid_options).output


def test_every_point_is_a_run(grid_folder):
    results = Results(grid_folder)
    assert [run.key.grid for run in results.runs] == [
        "", "", "wrong_penalty=0.0", "adaption=none,wrong_penalty=0.0", "adaption=none"
    ]  # fmt: skip
    courses = {run.key.grid: [x["wrong_penalty"] for x in run.training["history"]] for run in results.runs[1:]}
    assert courses["adaption=none,wrong_penalty=0.0"] == [0, 0, 0, 0]
    assert courses["adaption=none"] == [0.5, 0.5, 0.5, 0.5]
    assert courses["wrong_penalty=0.0"][0] == 0
    assert courses[""][0] == 0.5
    assert len(results.of("abft", "topics")) == 1  # tables show the plain run alone


def test_grid_resumes_and_grows(grid_folder, grid_options, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in grid_folder.rglob("run.json")}
    original = ABFTTrainer.train
    monkeypatch.setattr(ABFTTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    Experiment(grid_options).run()
    trained = []
    monkeypatch.setattr(ABFTTrainer, "train", lambda self, *a, **k: trained.append(self) or original(self, *a, **k))
    Experiment(replace(grid_options, grid=["wrong_penalty=0.25", "correct_award=2"])).run()
    assert [(t.args.wrong_penalty, t.args.correct_award) for t in trained] == [(0.25, 2.0)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(json.loads((grid_folder / "experiment.json").read_text())["runs"]) == 6


def test_experiments_from_before_grids(grid_folder, grid_options):
    """Keys that were stored without a grid are those of plain runs, and are not added twice."""
    path = grid_folder / "experiment.json"
    content = json.loads(path.read_text())
    for key in content["runs"]:
        if not key["grid"]:
            del key["grid"]
    path.write_text(json.dumps(content))
    Experiment(grid_options).run()
    keys = [RunKey(**key) for key in json.loads(path.read_text())["runs"]]
    assert len(keys) == len(set(keys)) == len(content["runs"])
    assert read_run(grid_folder / "runs" / keys[1].folder).key == keys[1]


def test_bad_grids_are_refused_before_work(grid_options, tmp_path, monkeypatch):
    monkeypatch.setattr("abft.experiments.experiment.load_base", lambda *_, **__: pytest.fail("worked"))
    for changes, message in (
        ({"grid": ["wrong_penalty=-1"]}, "wrong_penalty must not be negative"),
        ({"grid": ["pseudo_batch_size=8,12"]}, "pseudo_batch_size=12 is no multiple"),
        ({"methods": ["vanilla"]}, "a grid needs a method that trains"),
    ):
        with pytest.raises(ValueError, match=message):
            Experiment(replace(grid_options, output_dir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_map_has_the_accuracy_of_each_point(grid_folder):
    results = Results(grid_folder)
    figure, _ = grid_figures(results)["grid"]
    by_key = {run.key.grid: run.tests["topics"]["Normal"]["accuracy"] for run in results.runs if run.training}
    panels = {axis.get_title(): axis.images[0].get_array().filled(np.nan) for axis in figure.axes if axis.images}
    # The grid grew: B = 1 and 2 across; A = 0, 0.25 and 0.5 down.
    pid, none = panels["ABFT, adaption of A: PID"], panels["ABFT, adaption of A: none"]
    assert pid.shape == none.shape == (3, 2)
    assert pid[2, 0] == pytest.approx(100 * by_key[""])
    assert pid[0, 0] == pytest.approx(100 * by_key["wrong_penalty=0.0"])
    assert pid[1, 1] == pytest.approx(100 * by_key["correct_award=2.0,wrong_penalty=0.25"])
    assert none[0, 0] == pytest.approx(100 * by_key["adaption=none,wrong_penalty=0.0"])
    assert np.isnan([pid[1, 0], pid[2, 1], none[1, 0]]).all()
    assert {axis.get_xlabel() for axis in figure.axes if axis.images} == {"B"}
    legend = grid_figures(results)["grid-training"][0].legends[0]
    assert "ABFT, B = 1, A = 0.5, adaption of A: none" in [text.get_text() for text in legend.get_texts()]


def test_no_grid_no_figure(experiment_folder):
    assert grid_figures(Results(experiment_folder)) == {}
