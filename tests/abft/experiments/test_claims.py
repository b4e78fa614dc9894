"""The paper's claims, judged by made-up runs and by the paper's own tables."""

from pathlib import Path

import pytest
from made_experiments import GOOD, made

from abft.experiments.claims import Figures, claims, judge, published_figures
from abft.experiments.paper_tables import AVERAGES, published_averages
from abft.experiments.report_tables import overview_table
from abft.experiments.results import Results


def test_claims_that_hold(tmp_path):
    found = claims(Results(made(tmp_path, GOOD, vanilla=consistent(0.6), abft=consistent(0.8))))
    gain, level, transfer, consistency, parts, order, time_ = found
    assert gain.holds
    assert "+22.5 points" in gain.evidence
    assert level.holds
    assert "-1.0 points" in level.evidence
    assert transfer.holds
    assert "ABFT 56.5 %, E2E 45.0 %, untrained 55.0 %" in transfer.evidence
    assert consistency.holds
    assert "60.0 → 80.0" in consistency.evidence
    assert parts.holds is order.holds is None
    assert time_.holds
    assert "2.50" in time_.evidence


def consistent(share):
    return {test: {"consistency": share, "accuracy_mean": 0.5} for test in ("TempSensitivity", "DemoSensitivity")}


def test_claims_that_do_not_hold(tmp_path):
    bad = {
        "vanilla": {"a": [0.6]}, "abft": {"a": [0.6]}, "e2e": {"a": [0.8]}, "no_pid": {"a": [0.6]},
        "no_pid_no_filter": {"a": [0.6]}, "a0": {"a": [0.7]}, "b0": {"a": [0.3]},
    }  # fmt: skip
    found = claims(Results(made(tmp_path, bad, vanilla=consistent(0.9), abft=consistent(0.8))))
    assert [claim.holds for claim in found[:6]] == [False, False, None, False, False, False]
    assert "no fall: ABFT without PID, ABFT without PID and filter, ABFT with A = 0" in found[4].evidence


def test_ablations_in_order(tmp_path):
    names = ("vanilla", "abft", "no_pid", "no_pid_no_filter", "a0", "b0")
    falling = {name: {"a": [0.8 - 0.05 * i]} for i, name in enumerate(names)} | {"vanilla": {"a": [0.5]}}
    parts, order = claims(Results(made(tmp_path / "1", falling)))[4:6]
    assert parts.holds
    assert order.holds
    level = {name: {"a": [0.8]} for name in names}
    claim = claims(Results(made(tmp_path / "2", level)))[5]
    assert claim.holds is False
    assert "no step contradicts the order" in claim.evidence


def test_plain_numbers_are_judged_by_the_same_criteria():
    """Without predictions there is no interval: differences of means, of one point and of three."""

    def verdicts(**figures):
        return {claim.name: claim.holds for claim in judge(Figures(**figures)) if claim.holds is not None}

    assert verdicts() == {}
    assert verdicts(accuracy={"vanilla": 0.5, "abft": 0.511}) == {"gain": True}
    assert verdicts(accuracy={"vanilla": 0.5, "abft": 0.509}) == {"gain": False}
    assert verdicts(accuracy={"abft": 0.6, "e2e": 0.629}) == {"level": True}
    assert verdicts(accuracy={"abft": 0.6, "e2e": 0.631}) == {"level": False}
    assert verdicts(accuracy={"abft": 0.6, "e2e": 0.6}, prompts=1024) == {}
    assert verdicts(away={"abft": 0.5, "e2e": 0.5}) == {"transfer": False}
    assert verdicts(seconds={"abft": 10, "e2e": 10.4}) == {"time": False}
    falling = dict(zip(("abft", "no_pid", "no_pid_no_filter", "a0", "b0"), (0.8, 0.7, 0.6, 0.5, 0.4), strict=True))
    assert verdicts(accuracy=falling) == {"parts": True, "order": True}
    assert verdicts(accuracy={**falling, "b0": 0.55}) == {"parts": True, "order": False}
    assert verdicts(accuracy={**falling, "no_pid": 0.795}) == {"parts": False, "order": False}


def test_the_papers_own_tables_are_judged():
    """docs/evaluation.md shows these verdicts, the failures included."""
    path = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"
    section = path.read_text().split("<!-- verdicts -->")[1]
    shown = {
        (cells[0], cells[1]): cells[2]
        for line in section.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4 and cells[0].startswith("Table")
    }
    found: dict = {}
    for name, figures in published_figures().items():
        table, model = name.split(", ")
        for claim in judge(figures):
            if claim.holds is not None:
                found.setdefault((table, claim.name), []).append((claim.holds, model))
    rows = {
        key: f"{sum(holds for holds, _ in of)} of {len(of)}"
        + (f" (not {', '.join(model for holds, model in of if not holds)})" if not all(h for h, _ in of) else "")
        for key, of in found.items()
    }
    assert shown == rows


def test_published_averages_are_means_over_the_tasks():
    """Three rows of Table 1, read value by value."""
    rows = {
        ("simplescaling/s1.1-32B", "vanilla"): (94.82, 94.24, 91.11, 50.20, 69.63, 89.65, 68.36, 72.17),
        ("chargoddard/llama3-42b-v0", "abft"): (95.02, 93.85, 94.87, 48.10, 64.70, 90.09, 69.24, 70.85),
        ("nyunai/nyun-c2-llama3-56B", "calibration"): (92.29, 92.77, 69.92, 50.49, 68.75, 65.92, 58.11, 62.70),
    }
    for (model, method), values in rows.items():
        assert AVERAGES[model][method] == pytest.approx(sum(values) / 8, abs=0.006), model
    assert len(AVERAGES) == 9


def test_papers_figures_stand_beside_its_models(tmp_path):
    assert published_averages("meta-llama/Meta-Llama-3-8B") == {"vanilla": 66.60, "calibration": 62.02, "abft": 80.20}
    assert published_averages("models/gpt2-xl")["abft"] == 67.74
    assert published_averages("tiiuae/Falcon3-7B-Base")["vanilla"] == 67.55
    assert published_averages("Llama-3.1-8B") == {}
    results = Results(made(tmp_path, GOOD, model="Qwen/Qwen2.5-32B"))
    table = overview_table([results])
    assert table.columns[-1] == "paper's average"
    assert [row[-1] for row in table.rows] == ["75.29", "79.64", ""]
    assert len(overview_table([results], paper=False).columns) == 4
