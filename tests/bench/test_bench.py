"""The command line of the benchmarks, and the provenance in results."""

import json
import os
import subprocess
import sys
from pathlib import Path

from abft.files import write_json
from bench.record import provenance, spread

ROOT = Path(__file__).parents[2]


def test_list_of_cases():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "memory",
        "training",
        "evaluation",
        "precision",
        "aot",
        "--gpu",
    ]


def test_results_say_where_they_come_from(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"provenance": provenance(), "value": spread([3.0, 1.0, 2.0])})
    written = json.loads(path.read_text())
    assert written["value"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert {"command", "commit", "dirty", "versions", "cpus", "date"} <= written["provenance"].keys()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
