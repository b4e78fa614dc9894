"""`python -m bench --gpu` without a GPU: every suite runs, and results that must not be published are refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import GPU_SUITES
from bench.gpu.correctness import run_kernel_tests
from bench.gpu.goals import exponent, verdicts
from bench.gpu.setting import Setting
from bench.gpu.timing import Budget
from bench.plot import draw
from bench.plot import main as plot
from bench.verify import main as verify
from bench.verify import problems

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Return the file of a dry run: every suite in tiny shapes, kernels interpreted."""
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--gpu", "--dry-run", "--budget", "400", "--out", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert [path.name for path in folder.iterdir()] == ["gpu_dry_run.json"], done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "gpu_dry_run.json"


def _times(milliseconds):
    return {"median": milliseconds, "low": 0.9 * milliseconds, "high": 1.1 * milliseconds}


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
    checks = [{"check": "pytest", "ok": True, "tests": 300}, {"check": "float64", "ok": True, "n": 4096}]
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
            "gpu": {"name": "made up"},
        },
        "suites": {
            "correctness": {"rows": checks},
            "kernels": {"rows": kernels},
            "rows": {"rows": rows},
            "memory": {"rows": memory},
            "training": {"rows": training},
        },
    }


def test_dry_run_runs_every_suite(dry_run):
    suites = json.loads(dry_run.read_text())["suites"]
    assert set(suites) == set(GPU_SUITES)
    assert all(row["ok"] for row in suites["correctness"]["rows"]), suites["correctness"]
    ours = [row for suite in ("kernels", "rows", "memory") for row in suites[suite]["rows"] if "abft" in row["name"]]
    assert len(ours) == 4 * 3 + 1 + 1
    assert not [row for row in ours if "reason" in row]
    steps = [(row["name"], row["prompts"]) for row in suites["training"]["rows"] if "step_ms" in row]
    methods = ["restricted", "full", "reference"]
    batch = [*methods, "evaluation", "evaluation, one by one"]
    assert steps == [*((name, 3) for name in batch), *((name, 1) for name in methods)]


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
        (lambda r: r["suites"]["correctness"]["rows"][0].update(ok=False, failed=["test_x"]), "test_x"),
        (lambda r: r["suites"]["correctness"]["rows"][1].update(ok=False, error={"dq": 1.0}), "float64"),
        (lambda r: r["suites"]["correctness"]["rows"].pop(), "not checked"),
        (lambda r: _without(r, "suites", "correctness"), "not checked"),
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


def test_verdicts(result):
    met = {verdict.target: verdict.met for verdict in verdicts(result)}
    assert met["fused forward, head_dim 128, n ≥ 4k: ≥ 450 TFLOP/s"] is True
    assert met["faster than SDPA cuDNN, forward + backward, at every length"] is None
    assert [m for m in met.values() if m is False] == []
    for row in result["suites"]["kernels"]["rows"]:
        if row["name"] == "abft, dense" and row["n"] == 4096:
            row["backward_ms"]["median"] *= 1.1
    met = {verdict.target: verdict.met for verdict in verdicts(result)}
    assert [target for target, m in met.items() if m is False] == ["cost of the mass, dense labels, backward: ≤ 8 %"]


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


@pytest.mark.parametrize(("alone", "seconds"), [(False, 300), (True, 460)])
def test_kernel_tests_on_a_card(monkeypatch, alone, seconds):
    """The command and its time limit; a run that takes longer says so."""
    called = {}

    def run(command, timeout, **_):
        called.update(command=command, timeout=timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("bench.gpu.correctness.subprocess.run", run)
    row = run_kernel_tests(Setting(torch.device("cuda"), Budget(480), tiny=False, alone=alone), workers=16)
    assert called["timeout"] == pytest.approx(seconds, abs=1)
    assert row["check"] == "pytest"
    assert row["ok"] is False
    assert "not done after" in row["reason"]
    assert {"tests/abft_kernels", "few", "16"} <= set(called["command"])
