"""Reports: tables with the right numbers in them, claims judged by them, and a page that a browser shows whole."""

import json
import math
import re
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_experiments import GOOD, made
from matplotlib.figure import Figure

from abft.cli.main import main
from abft.experiments.analyses.analysis_registry import ANALYSES, stored_parts
from abft.experiments.analyses.connectivity import ConnectivityOptions
from abft.experiments.analyses.definition import Analysis
from abft.experiments.analyses.icl_as_tuning import ImplicitOptions
from abft.experiments.analyses.induction import InductionOptions
from abft.experiments.analyses.last_row import LastRowOptions
from abft.experiments.analyses.momentum_attention import MomentumOptions
from abft.experiments.analyze import ON_DEMAND, PARTS, AnalyzeOptions, analyze
from abft.experiments.comparison import compare_runs
from abft.experiments.report import write_report
from abft.experiments.report_tables import experiment_tables, overview_table
from abft.experiments.results import Results
from abft.experiments.runs import RunKey
from abft.experiments.tables import Table, points, with_error

FIGURES = {"accuracy", "label-attention", "training", "generalization", "label-errors", "distance", "connectivity",
           "last_row", "induction", "implicit"}  # fmt: skip


ANALYSIS_OF = {row.name: row for row in ANALYSES}
OF_ANALYSES = (
    ConnectivityOptions(plane_lowest=0, plane_highest=1, plane_steps=2),
    InductionOptions(tokens=64),
    MomentumOptions(etas=[0.1]),
    ImplicitOptions(
        fine_tuning_tasks=["all"],
        fine_tuning_demonstrations=6,
        fine_tuning_seeds=[0, 1],
        fine_tuning_rates=[0.003, 0.03],
        fine_tuning_validation=8,
        random_draws=2,
    ),
)


@pytest.fixture(scope="module")
def analysed(experiment_folder, tmp_path_factory) -> Path:
    """A copy of the experiment with an analysis."""
    folder = tmp_path_factory.mktemp("analysed") / "small"
    shutil.copytree(experiment_folder, folder)
    analyze(AnalyzeOptions(experiment=str(folder), prompts=12, quiet=True), *OF_ANALYSES)
    return folder


@pytest.fixture(scope="module")
def report(analysed) -> Path:
    write_report([analysed], analysed / "report.html")
    return analysed / "report.html"


def test_overview_has_means_errors_and_the_best(tmp_path):
    table = overview_table([Results(made(tmp_path, GOOD))])
    assert list(table.columns) == ["", "a", "b", "average"]
    assert table.rows[0] == ["demo, vanilla", "50.0", "60.0", "55.0"]
    assert table.rows[1] == ["demo, ABFT", "75.0 ± 5.0", "80.0 ± 0.0", "77.5 ± 2.5"]
    assert table.rows[2] == ["demo, E2E", "75.0 ± 1.0", "82.0 ± 0.0", "78.5 ± 0.5"]
    assert table.bold == {(1, 1), (2, 1), (2, 2), (2, 3)}


def test_robustness_table(tmp_path):
    half, sure = math.log(4) / 2, 0.0
    bias = {
        "contextual": {"distribution": [0.25] * 4, "entropy": half},
        "domain": {"distribution": [0.25] * 4, "entropy": sure},
    }
    tests = {"GLER": {"gler": 0.4}, "Unseen": {"accuracy": 0.125}, "ZeroShot": {"accuracy": 0.25}, "Bias": bias}
    tables = experiment_tables(Results(made(tmp_path, GOOD, abft=tests)))
    (table,) = (table for table in tables if table.name.endswith("robustness"))
    assert table.rows == [["ABFT", "40.0 ± 0.0", "12.5 ± 0.0", "25.0 ± 0.0", "50.0 ± 0.0", "0.0 ± 0.0"]]


def test_time_of_resumed_training_is_not_counted(tmp_path):
    folder = made(tmp_path, GOOD)
    path = folder / "runs" / RunKey("abft", "a", 512, 0).folder / "run.json"
    content = json.loads(path.read_text())
    content["training"] |= {"resumed": True, "seconds": 1000.0}
    path.write_text(json.dumps(content))
    assert Results(folder).seconds("abft") == (10, 0)
    assert Results(folder).seconds("abft", checkpoints=True) == (11, 0)


def test_time_with_checkpoints_of_earlier_runs_stands_apart(tmp_path):
    """Runs from before checkpoints were timed tell the whole time alone."""
    folder = made(tmp_path, GOOD)
    for path in folder.glob("runs/e2e-*/run.json"):
        content = json.loads(path.read_text())
        del content["training"]["checkpoint_seconds"], content["training"]["trained_parameters"]
        path.write_text(json.dumps(content))
    results = Results(folder)
    assert results.seconds("e2e") == (None, None)
    assert results.seconds("e2e", checkpoints=True) == (25, 0)
    assert results.trained_parameters("e2e") is None


def test_heads_table(tmp_path):
    tests = {"heads": {"induction_heads": 2.25}}
    tables = experiment_tables(Results(made(tmp_path, GOOD, abft=tests)))
    (table,) = (table for table in tables if table.name.endswith("heads"))
    assert table.rows == [["ABFT", "2.2", "2.2"]]


def test_transfer_table(tmp_path):
    tables = {table.name.split("-")[-1]: table for table in experiment_tables(Results(made(tmp_path, GOOD)))}
    rows = {row[0]: row[1:] for row in tables["transfer"].rows}
    assert rows["vanilla"] == ["", "", "", "", "", "55.0", "55.0"]
    assert rows["ABFT"] == ["1,000", "10.0 ± 0.0", "11.0 ± 0.0", "1.00", "1.00", "77.5 ± 2.5", "56.5 ± 0.5"]
    assert rows["E2E"] == ["12,345", "25.0 ± 0.0", "26.0 ± 0.0", "2.50", "1.00", "78.5 ± 0.5", "45.0 ± 0.0"]
    against = {row[0]: row[1:] for row in tables["vanilla"].rows}
    assert re.match(r"\+25\.0 \[\+1\d\.\d, \+3\d\.\d\]\*", against["a"][0])


def test_table_formats():
    table = Table("t", "50 % of a_b", ["", "x_1"], [["a & b", "1.0 ± 0.5"], ["c", "−2"]], {(0, 1)})
    assert "| a & b | **1.0 ± 0.5** |" in table.markdown()
    latex = table.latex()
    assert r"a \& b & \textbf{1.0 $\pm$ 0.5} \\" in latex
    assert r"\caption{50 \% of a\_b}" in latex
    assert r"c & $-$2 \\" in latex
    assert with_error(None, None) == ""
    assert with_error(0.12345, 0.01) == "12.3 ± 1.0"
    assert points(-0.031) == "−3.1"


# --- the files ------------------------------------------------------------------------------------------------


def test_lost_heads_are_named(tmp_path):
    folder = made(tmp_path, {"vanilla": {"a": [0.5]}, "abft": {"a": [0.7, 0.8]}, "e2e": {"a": [0.7, 0.8]}})
    for seed, counts in enumerate(([8.0, 5.0, 3.9], [8.0, 2.0, 4.1])):
        path = folder / "runs" / f"abft-a-n512-seed{seed}" / "run.json"
        content = json.loads(path.read_text())
        content["training"]["history"] = [
            {"step": step, "loss": 1.0, "learning_rate": 2e-5, "induction_heads": count}
            for step, count in enumerate(counts, 1)
        ]
        path.write_text(json.dumps(content))
    assert Results(folder).head_losses() == {"abft-a-n512-seed0": (8.0, 3.9)}
    write_report([folder], folder / "report.html")
    assert "in: abft-a-n512-seed0 (8.0 → 3.9)" in (folder / "report.md").read_text()


def test_report_stands_alone(report):
    html = report.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert set(re.findall(r'<figure id="([\w-]+)"', html)) == FIGURES
    assert "{{" not in html
    accuracy = 100 * Results(report.parent).summary("abft", "topics", lambda result: result["accuracy"])[0]
    for path in (report, report.with_suffix(".md"), report.with_suffix(".tex"), report.with_suffix(".json")):
        assert f"{accuracy:.1f}" in path.read_text()


def test_report_is_the_same_every_time(report, analysed, tmp_path):
    write_report([analysed], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == report.read_text()


def test_names_are_escaped(tmp_path):
    folder = made(tmp_path, {"vanilla": {"<script>alert(1)</script>": [0.5]}})
    write_report([folder], tmp_path / "r.html")
    assert "<script>" not in (tmp_path / "r.html").read_text()


def test_report_of_unfinished_and_of_several(tmp_path):
    first, second = made(tmp_path / "1", GOOD), made(tmp_path / "2", GOOD, model="gpt2-xl")
    shutil.rmtree(second / "runs" / "e2e-a-n512-seed0")
    pictures = tmp_path / "pictures"
    command = ["report", str(first), str(second), "--output", str(tmp_path / "both.html"), "--figures", str(pictures)]
    assert main(command) == 0
    assert {path.name for path in pictures.iterdir()} >= {"1-accuracy.png", "2-accuracy.png", "1-generalization.png"}
    data = json.loads((tmp_path / "both.json").read_text())
    assert [experiment["model"] for experiment in data["experiments"]] == ["demo", "gpt2-xl"]
    assert data["tables"][0]["rows"][1][1] == "75.0 ± 5.0"
    html = (tmp_path / "both.html").read_text()
    assert "1 of 10 runs are not finished yet" in html
    assert "gpt2-xl, ABFT" in html
    assert "67.74" in html


def test_report_refuses(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert "give a folder that `abft experiment` wrote" in capsys.readouterr().err
    assert main(["report", str(made(tmp_path / "1", GOOD)), "--output", str(tmp_path / "r.pdf")]) == 2
    assert "must end in .html" in capsys.readouterr().err
    assert not list(tmp_path.glob("r.*"))


def test_compare(tmp_path, capsys):
    folder = made(tmp_path, GOOD)
    runs = [str(folder / "runs" / name) for name in ("vanilla-a", "abft-a-n512-seed1")]
    assert main(["compare", *runs]) == 0
    assert "+30.0" in capsys.readouterr().out
    table = compare_runs(*runs)
    assert table.rows[0][:4] == ["a", "50.0", "80.0", "+30.0"]
    with pytest.raises(ValueError, match="no task in common"):
        compare_runs(runs[0], folder / "runs" / "vanilla-b")
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        compare_runs(runs[0], tmp_path)
    path = folder / "runs" / "abft-a-n512-seed1" / "run.json"
    content = json.loads(path.read_text())
    normal = content["tests"]["a"]["Normal"]
    normal["labels"] = [1, *normal["labels"][1:]]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="task a: the runs were tested on different queries"):
        compare_runs(*runs)
    content["settings"]["k"] = 8
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="k is 4 and 8"):
        compare_runs(*runs)


def test_analysis(analysed, monkeypatch):
    content = json.loads((analysed / "analysis.json").read_text())
    assert set(content["parts"]) == set(PARTS) - set(ON_DEMAND)
    distance = content["parts"]["distance"]
    assert set(distance) == {"abft", "e2e"}
    # A layer after the last induction head does not change with ABFT.
    assert all(0 <= value < 1 for shifts in distance.values() for value in shifts["relative"])
    assert all(max(shifts[part]) > 1e-4 for shifts in distance.values() for part in ("relative", "q", "k"))
    connectivity = content["parts"]["connectivity"]
    # The ends of the line are corners of the plane.
    assert connectivity["line"]["accuracy"][0] == connectivity["accuracy"][1][0]
    assert connectivity["line"]["accuracy"][-1] == connectivity["accuracy"][0][1]
    vanilla = json.loads((analysed / "runs" / "vanilla-topics" / "run.json").read_text())["tests"]["topics"]["Normal"]
    assert connectivity["accuracy"][0][0] == vanilla["accuracy"]
    options = AnalyzeOptions(experiment=str(analysed), prompts=12, quiet=True)
    monkeypatch.setattr("abft.experiments.analyze.load_base", lambda *_, **__: pytest.fail("done again"))
    assert analyze(options, *OF_ANALYSES) == content["parts"]


def test_analysis_keeps_what_is_not_asked_for(analysed, tmp_path):
    copy = tmp_path / "small"
    shutil.copytree(analysed, copy)
    before = json.loads((copy / "analysis.json").read_text())
    analyze(
        AnalyzeOptions(experiment=str(copy), parts=["momentum"], prompts=6, quiet=True), MomentumOptions(etas=[0.2])
    )
    after = json.loads((copy / "analysis.json").read_text())
    assert after["parts"]["momentum"]["n"] == 6
    assert [gain["eta"] for gain in after["parts"]["momentum"]["gains"]] == [0.2]
    assert {**after["parts"], "momentum": None} == {**before["parts"], "momentum": None}
    assert after["options"]["connectivity"]["prompts"] == 12


def test_last_rows_are_of_the_prompts_asked_for(analysed, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(analysed, folder)
    options = AnalyzeOptions(experiment=str(folder), parts=["last_row"], quiet=True)
    found = analyze(options, LastRowOptions(row_prompts=[2, 5], row_heads=["1.3", "0.0"]))["last_row"]
    assert [prompt["number"] for prompt in found["prompts"]] == [2, 5]
    mean = json.loads((analysed / "analysis.json").read_text())["parts"]["last_row"]
    assert mean["heads"] == []
    for prompt in (*found["prompts"], *mean["prompts"]):
        assert set(prompt["rows"]) == {"vanilla", "abft", "e2e"}
        for rows in map(np.array, prompt["rows"].values()):
            assert rows.shape == (2 if prompt in found["prompts"] else 4, len(prompt["tokens"]))
            np.testing.assert_allclose(rows.sum(1), 1, atol=1e-3)
        assert {prompt["tokens"][position] for position in prompt["correct"]} <= {prompt["gold"]}
        assert prompt["gold"] not in {prompt["tokens"][position] for position in prompt["wrong"]}
        assert len(prompt["correct"]) + len(prompt["wrong"]) == 4
    assert found["prompts"][0]["rows"]["vanilla"] != found["prompts"][0]["rows"]["abft"]
    figure, caption = ANALYSIS_OF["last_row"].figure(found)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == 2 * 3
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["1.3", "0.0"]
    assert len(panels[2].get_xticklabels()) == len(found["prompts"][0]["tokens"])
    assert "by head" in caption


def test_implicit_sets_tasks_and_forms_in_one_table(analysed):
    content = json.loads((analysed / "analysis.json").read_text())
    found = content["parts"]["implicit"]["tasks"]
    assert list(found) == ["topics", "moods"]
    for of_task in found.values():
        draw, forms = of_task["demonstrations"], of_task["forms"]
        assert [tried["value"] for tried in draw["tried"]] == [0, 1]
        best = max(tried["accuracy"] for tried in draw["tried"])
        assert best in [tried["accuracy"] for tried in draw["tried"] if tried["value"] == draw["value"]]
        assert set(forms) == {"all", "label"}
        assert forms["all"]["accuracy"]["icl"] == forms["label"]["accuracy"]["icl"]
        assert forms["all"]["losses"] != forms["label"]["losses"]
        assert all(
            values["demonstrations"] == 6 and values["rate"]["value"] in (0.003, 0.03) for values in forms.values()
        )
    (table,) = (t for t in experiment_tables(Results(analysed), content) if t.name.endswith("implicit"))
    assert [row[0] for row in table.rows] == [
        "topics, all tokens", "topics, label alone", "moods, all tokens", "moods, label alone"
    ]  # fmt: skip
    values = found["moods"]["forms"]["label"]
    assert table.rows[3][4] == f"{100 * values['accuracy']['icl']:.1f}"
    assert table.rows[3][7] == f"{values['sim_aou_mean']:.2f} ({values['sim_aou_random_mean']:.2f})"
    assert table.rows[3][12].endswith("(0.50)")  # three of six examples


def test_results_of_other_options_are_not_shown(analysed, tmp_path):
    """An analysis stored before one of its options existed is left out until it is made anew."""
    content = json.loads((analysed / "analysis.json").read_text())
    del content["options"]["implicit"]["random_draws"]
    names = {row.name for row, _ in stored_parts(content)}
    assert names == set(PARTS) - {"implicit", *ON_DEMAND}
    assert stored_parts(None) == []


def test_analysis_refuses(analysed, tmp_path, capsys, monkeypatch):
    arguments = ["analyze", "--experiment", str(analysed)]
    assert main([*arguments, "--parts", "depth"]) == 2
    assert "unknown part 'depth'" in capsys.readouterr().err
    assert main([*arguments, "--task", "weather"]) == 2
    assert "no task 'weather'" in capsys.readouterr().err
    assert main([*arguments, "--seed", "7"]) == 2
    assert "keeps no weights of task 'topics', seed 7" in capsys.readouterr().err
    assert main(["analyze", "--experiment", str(tmp_path)]) == 2
    monkeypatch.setattr("abft.experiments.analyze.load_base", lambda *_, **__: pytest.fail("loaded"))
    plane = ["--plane_lowest", "1", "--plane_highest", "0.5"]
    assert main([*arguments, "--parts", "connectivity", *plane]) == 2
    assert "plane_lowest must be below plane_highest" in capsys.readouterr().err
    for wrong, message in (
        (["--fine_tuning_tasks", "weather"], "no task 'weather'; it has topics, moods, or say all"),
        (["--random_draws", "0"], "random_draws must be 1 or more, got 0"),
        (["--fine_tuning_rates", "0.1", "0"], "fine_tuning_rates must be above 0"),
    ):
        assert main([*arguments, "--parts", "implicit", *wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["--row_prompts", "12"], "row_prompts must lie from 0 to 11, got 12"),
        (["--row_heads", "3"], "row_heads must be LAYER.HEAD, such as 3.1, got '3'"),
        (["--row_heads", "4.0"], "row_heads names 4.0, but the model has 4 layers of 4 heads"),
    ):
        assert main([*arguments, "--parts", "last_row", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_analysis_is_one_row(analysed, tmp_path, monkeypatch):
    """A row more in the catalog is computed, written, drawn and set in a table."""
    folder = tmp_path / "small"
    shutil.copytree(analysed, folder)
    row = Analysis(
        "layers",
        lambda subject, options: {"count": subject.model.config.num_hidden_layers},
        figure=lambda found: (Figure(), f"{found['count']} layers drawn"),
        table=lambda results, found: Table("layers", "Layers.", ["", "layers"], [["model", str(found["count"])]]),
    )
    monkeypatch.setattr("abft.experiments.analyses.analysis_registry.ANALYSES", (*ANALYSES, row))
    analyze(AnalyzeOptions(experiment=str(folder), parts=["layers"], quiet=True))
    assert json.loads((folder / "analysis.json").read_text())["options"]["layers"] == {"task": "topics", "seed": 0}
    write_report([folder], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert '<table id="layers">' in html
    assert re.search(r"\d+ layers drawn", html), re.findall(r"<figure id=.{40}", html)


def test_needs_of_analyses_are_checked(analysed, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(analysed, folder)
    (folder / "analysis.json").unlink()
    shutil.rmtree(folder / "runs" / RunKey("e2e", "topics", 32, 0).folder / "weights")
    with pytest.raises(ValueError, match="connectivity needs the weights of the methods e2e and abft"):
        analyze(AnalyzeOptions(experiment=str(folder), quiet=True))
    assert not (folder / "analysis.json").exists()


# --- in a browser ------------------------------------------------------------------------------------------------

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    if _CHROMIUM is None or _DRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                     "--disable-background-networking", "--disable-component-update",
                     "--disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER, log_output=subprocess.DEVNULL))
    driver.set_window_size(1100, 900)
    yield driver
    driver.quit()


def test_in_a_browser(browser, report):
    browser.get(report.as_uri())
    deadline = time.monotonic() + 20
    while browser.execute_script("return document.readyState") != "complete" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert browser.get_log("browser") == []
    assert browser.title == "Attention Behavior Fine-Tuning: demo"
    images = browser.execute_script(
        "return [...document.images].map(i => [i.closest('figure').id, i.complete, i.naturalWidth, i.width, i.height])"
    )
    assert {name for name, *_ in images} == FIGURES
    assert all(
        complete and natural > 100 and width > 100 and height > 80 for _, complete, natural, width, height in images
    )
    # Nothing lies over anything else, and nothing is wider than the page.
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, .wide, .claims li, figure')].map(e => {"
        "const b = e.getBoundingClientRect(); return [e.tagName + e.id, b.top, b.bottom, b.left, b.right]})"
    )
    boxes.sort(key=lambda box: box[1])
    for (_, _, bottom, *_), (name, top, _, left, right) in pairwise(boxes):
        assert top >= bottom - 1, name
        assert left >= 0, name
        assert right <= 1100, name
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    tables = browser.execute_script(
        "return [...document.querySelectorAll('td')].every(c => c.scrollWidth <= c.clientWidth)"
    )
    assert tables
