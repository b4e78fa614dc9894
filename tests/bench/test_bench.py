"""The memory claim at a length that a test can afford, and the command line of the benchmarks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory import collect, in_process_of_its_own
from bench.provenance import provenance, spread, write_json

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_memory_is_a_fraction_of_eager():
    """Twice the tokens in less than half of eager attention's memory; at 8,192 tokens each it is a twentieth."""
    eager, abft = (in_process_of_its_own("memory", *what)["bytes"] for what in (("eager", 2048), ("abft", 4096)))
    assert 0 < abft < eager / 2


def test_memory_rows(monkeypatch):
    """The rows, ratios and exponents of made-up measurements."""

    def made_up(module, method, length):
        return {"bytes": length**2 if method == "eager" else 8 * length, "seconds": length / 1000}

    monkeypatch.setattr("bench.memory.in_process_of_its_own", made_up)
    found = collect((64, 128, 256), repeats=2, log=lambda line: None)
    assert len(found["rows"]) == 9
    assert found["ratios"][-1]["memory_abft_to_eager"] == 8 / 256
    assert found["time_exponent"]["abft"] == pytest.approx(1.0)


def test_list_of_cases():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "memory", "training", "evaluation", "precision", "aot", "--gpu",
    ]  # fmt: skip


def test_results_say_where_they_come_from(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"provenance": provenance(), "value": spread([3.0, 1.0, 2.0])})
    written = json.loads(path.read_text())
    assert written["value"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert {"command", "commit", "dirty", "versions", "cpus", "date"} <= written["provenance"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
