"""`python -m bench --gpu` without a GPU: every suite runs, and results that must not be published are refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.budget import SUITES
from bench.gpu.goals import exponent, verdicts
from bench.gpu.model_steps import eager_step_bytes, model_config, plan_keys
from bench.gpu.plans import Plans
from bench.gpu.published import PUBLISHED, card_of, published_for
from bench.gpu.shards import SHARDS
from bench.gpu.summary import summary
from bench.plot import draw
from bench.plot import main as plot
from bench.verify import accepted, problems, refused, untested
from bench.verify import main as verify

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Return the file of a dry run: every suite in tiny shapes, kernels interpreted."""
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--gpu", "--dry-run", "--budget", "4000", "--out", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert [path.name for path in folder.iterdir()] == ["gpu_dry_run.json"], done.stdout[-2000:] + done.stderr[-2000:]
    table = done.stdout[done.stdout.index("key figures") :]
    assert [name for name in ("prewarm", *SUITES) if name not in table] == []
    return folder / "gpu_dry_run.json"


def _times(milliseconds):
    spread = {"median": milliseconds, "low": 0.9 * milliseconds, "high": 1.1 * milliseconds}
    return {**spread, "clock": "graph", "host_ms": {"median": 0.05, "low": 0.04, "high": 0.06}}


@pytest.fixture
def result():
    """Return a made-up result that may be published."""
    kernels, rows, memory = [], [], []
    for n in (1024, 4096, 16384):
        for name, factor in (("abft, no mass", 1.0), ("abft, sparse", 1.02), ("abft, dense", 1.05), ("SDPA flash", 2)):
            for head_dim in (64, 128):
                kernels.append(
                    {
                        "name": name,
                        "n": n,
                        "head_dim": head_dim,
                        "heads": 40,
                        "kv_heads": 8,
                        "forward_ms": _times(factor),
                        "backward_ms": _times(2.5 * factor),
                        "forward_tflops": 500 / factor,
                        "backward_tflops": 400 / factor,
                    }
                )
        memory.append({"name": "abft", "n": n, "forward_bytes": 10 * n, "both_bytes": 64 * n})
    for n in (1024, 32768, 131072):
        rows.append(
            {
                "name": "abft",
                "n": n,
                "both_ms": _times(1.0),
                "forward_ms": _times(0.3),
                "launches": 2,
                "forward_gb_per_s": 2700.0,
                "graph_equals_eager": True,
            }
        )
        rows.append({"name": "PyTorch", "n": n, "both_ms": _times(4.0), "forward_ms": _times(1.0)})
    training = [
        {
            "model": model,
            "name": name,
            "prompts": 32 if n == 200 else 1,
            "n": n,
            "step_ms": _times(1.0),
            "prompts_per_second": 10.0 if name == "reference" else 150.0,
            "peak_bytes": 100,
            "planned_bytes": 105,
        }
        for model in ("7B bf16", "32B NF4")
        for name in ("reference", "full", "restricted")
        for n in ((200, 2048) if name == "reference" else (200, 2048, 131072))
    ]
    training += [
        {"model": "7B bf16", "name": name, "prompts": 32, "n": 200, "step_ms": _times(1.0), "prompts_per_second": rate}
        for name, rate in (("evaluation", 500.0), ("evaluation, one by one", 20.0))
    ]
    checks = [{"check": "float64", "ok": True, "n": 4096, "head_dim": 128}]
    checks += [
        {"check": "tests", "shard": shard.name, "covers": list(shard.covers), "status": "passed", "passed": 5}
        for shard in SHARDS
    ]
    return {
        "kind": "gpu",
        "dry_run": False,
        "complete": True,
        "ceilings": {"copy_gb_per_s": 3000.0},
        "provenance": {
            "command": "c",
            "commit": "0123456789",
            "dirty": False,
            "date": "2026-01-01T00:00:00",
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
            "gpu": {"name": "NVIDIA GB200"},
        },
        "suites": {
            name: {"seconds": 1.0, "budget": 2.0, "rows": of_suite}
            for name, of_suite in (
                ("correctness", checks),
                ("kernels", kernels),
                ("rows", rows),
                ("memory", memory),
                ("training", training),
            )
        },
    }


def test_dry_run_runs_every_suite(dry_run):
    suites = json.loads(dry_run.read_text())["suites"]
    assert tuple(suites) == ("prewarm", *SUITES)
    checks = suites["correctness"]["rows"]
    assert all(row.get("ok", row.get("status") == "passed") for row in checks), checks
    ours = [row for suite in ("kernels", "rows", "memory") for row in suites[suite]["rows"] if "abft" in row["name"]]
    assert len(ours) == 4 * 3 + 1 + 1
    assert not [row for row in ours if "reason" in row]
    steps = [(row["name"], row["prompts"]) for row in suites["training"]["rows"] if "step_ms" in row]
    methods = ["restricted", "full", "reference"]
    batch = [*methods, "evaluation", "evaluation, one by one"]
    assert steps == [*((name, 3) for name in batch), *((name, 1) for name in methods)]
    flex = [row["name"] for row in suites["flex"]["rows"] if "forward_ms" in row]
    assert flex == ["FlexAttention, V columns", "FlexAttention, second LSE"]


def test_dry_run_compiles_beforehand_in_other_processes(dry_run):
    rows = json.loads(dry_run.read_text())["suites"]["prewarm"]["rows"]
    assert {row["name"].split()[0] for row in rows} == {"flex", "fused", "rows", "compiled", "training", "precision"}
    assert any("reason" not in row for row in rows)


def test_every_time_has_its_clock_and_the_time_of_the_host(dry_run):
    suites = json.loads(dry_run.read_text())["suites"]
    times = [
        value for suite in suites.values() for row in suite["rows"] for key, value in row.items() if key.endswith("_ms")
    ]
    assert len(times) > 30
    assert all(time["clock"] == "wall" for time in times)
    assert all({"median", "low", "high"} <= time["host_ms"].keys() for time in times)


def test_dry_run_is_no_result(dry_run, capsys):
    assert verify([str(dry_run)]) == 1
    assert plot([str(dry_run)]) == 1
    assert "dry run" in capsys.readouterr().out


def _without(result, *path):
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]


def test_verify_accepts(result, tmp_path):
    assert problems(result) == []
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result))
    assert verify([str(path)]) == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r["suites"]["correctness"]["rows"][1].update(status="failed", failed=["test_x"]), "test_x"),
        (lambda r: r["suites"]["correctness"]["rows"][-1].update(status="failed", output="Fatal"), "Fatal"),
        (lambda r: r["suites"]["correctness"]["rows"][0].update(ok=False, error={"dq": 1.0}), "float64"),
        (lambda r: r["suites"]["correctness"]["rows"].pop(0), "not checked"),
        (lambda r: _without(r, "suites", "correctness"), "not checked"),
        (lambda r: _without(r, "suites", "kernels", "rows", 0, "forward_ms", "clock"), "without its clock"),
        (lambda r: _without(r, "suites", "kernels", "rows", 0, "forward_ms", "low"), "without its spread"),
        (lambda r: _without(r, "provenance", "commit"), "commit"),
        (lambda r: r["provenance"].update(dirty=True), "changes"),
        (lambda r: r["provenance"]["gpu"].update(name=None), "no GPU"),
        (lambda r: r.update(complete=False), "cut off"),
        (lambda r: r["suites"].update(sanitizer={"rows": [{"check": "racecheck", "ok": False}]}), "racecheck"),
        (lambda r: r.update(kind="other"), "not a result"),
    ],
)
def test_verify_refuses(result, spoil, said):
    spoiled = copy.deepcopy(result)
    spoil(spoiled)
    assert any(said in problem for problem in problems(spoiled))


def _end(result, status, *names):
    """Give shards a status."""
    for row in result["suites"]["correctness"]["rows"]:
        if row.get("shard") in names:
            row.update(status=status, reason=status)


def test_a_shard_that_timed_out_refuses_what_stands_on_it_alone(result, tmp_path, capsys):
    core = next(shard.name for shard in SHARDS if "kernels" in shard.covers)
    feature = next(shard.name for shard in SHARDS if not shard.covers)
    _end(result, "timeout", core, feature)
    assert problems(result) == []
    assert set(untested(result)) == {core, feature}
    assert refused(result) == {name: [core] for name in ("kernels", "memory", "training")}
    assert set(accepted(result)["suites"]) == {"correctness", "rows"}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result))
    assert verify([str(path)]) == 0
    said = capsys.readouterr().out
    assert f"not tested: shard {feature}: timeout" in said
    assert f"suite kernels: refused, it stands on {core}" in said
    assert "may be published without kernels, memory, training" in said
    assert plot([str(path), "--out", str(tmp_path)]) == 0
    assert [made.name for made in tmp_path.glob("*.png")] == ["gpu-rows.png"]


def test_a_shard_that_is_not_in_the_file_was_not_run(result):
    covering = [shard.name for shard in SHARDS if "rows" in shard.covers]
    rows = result["suites"]["correctness"]["rows"]
    rows[:] = [row for row in rows if row.get("shard") != covering[0]]
    assert problems(result) == []
    assert refused(result) == {"rows": [covering[0]], "training": [covering[0]]}


def test_a_third_of_the_shards_must_have_passed(result):
    covering = [shard.name for shard in SHARDS if shard.covers]
    others = [shard.name for shard in SHARDS if not shard.covers]
    enough = -(-len(SHARDS) // 3)
    _end(result, "timeout", *others[max(0, enough - len(covering)) :])
    assert problems(result) == []
    assert refused(result) == {}
    _end(result, "not run", *covering[: 1 + max(0, len(covering) - enough)])
    assert any("shards passed" in problem for problem in problems(result))


def test_a_failed_shard_refuses_the_file_though_it_covers_no_suite(result):
    _end(result, "failed", SHARDS[-1].name)
    assert not SHARDS[-1].covers
    assert any(SHARDS[-1].name in problem for problem in problems(result))


def test_verdicts(result):
    met = {verdict.target: verdict.met for verdict in verdicts(result)}
    assert met["fused forward, head_dim 128, n ≥ 4k: ≥ 450 TFLOP/s"] is True
    assert met["faster than SDPA cuDNN, forward + backward, at every length"] is None
    published = {target for target in met if "as published for" in target}
    assert {met[target] for target in published} == {False}
    assert [target for target in published if "backward" in target and "(backward, deterministic)" not in target] == []
    assert [target for target, m in met.items() if m is False and target not in published] == []
    for row in result["suites"]["kernels"]["rows"]:
        if row["name"] == "abft, dense" and row["n"] == 4096:
            row["backward_ms"]["median"] *= 1.1
    met = {verdict.target: verdict.met for verdict in verdicts(result)}
    unmet = [target for target, m in met.items() if m is False and target not in published]
    assert unmet == ["cost of the mass, dense labels, backward: ≤ 8 %"]


def test_pictures(result, tmp_path):
    made = draw(result, tmp_path)
    assert {path.name for path in made} == {
        "gpu-attention-64.png",
        "gpu-attention-128.png",
        "gpu-rows.png",
        "gpu-memory.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_exponent():
    assert exponent([(n, 3.0 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)


def test_picture_of_the_training_step(tmp_path):
    """The committed data can be drawn."""
    assert plot([str(ROOT / "bench" / "results" / "cpu_training.json"), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-training.png"]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_published_figures_go_by_the_card(name, card, result):
    assert card_of(name) == card
    assert {column.card for column in published_for(name)} == ({card} if card else set())
    result["provenance"]["gpu"]["name"] = name
    said = [verdict for verdict in verdicts(result) if "published" in verdict.target]
    if card is None:
        assert [verdict.measured for verdict in said] == [f"no published figure for this card: {name}"]
    else:
        assert len(said) == len(published_for(name))


def test_each_published_backward_column_says_whether_it_is_deterministic():
    assert all("deterministic" in column.column for column in PUBLISHED if column.way == "backward")


def test_the_summary_counts_rows_and_reasons(result):
    result["suites"]["kernels"]["rows"] += [{"name": "eager", "n": 32768, "reason": "out of time: 9.0 s predicted"}]
    lines = {line[0]: line[1:] for line in summary(result)}
    assert lines["kernels"] == (
        "1 of 2",
        "24",
        "1 out of time",
        "forward 500 TFLOP/s at 16,384; backward 400 TFLOP/s at 16,384",
    )
    assert lines["correctness"][3] == f"float64 1 of 1; {len(SHARDS)} shards passed"


def test_a_step_of_the_published_shape_is_predicted():
    """Every layer keeps its probabilities: at 8k tokens they exceed any card."""
    config = model_config("7B bf16")
    assert 15e9 < eager_step_bytes(config, 2048, 2) < 25e9
    assert eager_step_bytes(config, 8192, 2) > 200e9


def _count(model, method, tokens, checkpointed):
    if tokens < 0:
        raise ValueError("no plan")
    return float(tokens)


def test_plans_are_made_beside_the_timing():
    assert len(plan_keys()) == len(set(plan_keys())) == 2 * 5 * 2
    keys = [("a", "full", 10, True), ("a", "full", -1, True)]
    plans = Plans(keys, workers=1, count=_count)
    try:
        for plan in plans._plans.values():
            plan.exception(timeout=120)
        assert plans(*keys[0]) == 10.0
        assert plans(*keys[1]) is None
        assert plans("b", "full", 10, True) is None
    finally:
        plans.stop()
