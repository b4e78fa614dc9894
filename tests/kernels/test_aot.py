"""The launch table, compiled ahead of time with no GPU: no register spills, and the matrix instructions of the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # bf16 alone, and each entry with its largest number of groups: `python -m bench.aot` does the rest.
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--brief", "--dtype", "bf16", "--json", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())["rows"]


def test_every_entry_compiles(rows):
    assert {row["arch"] for row in rows} == {80, 90}
    assert {row["table"] for row in rows} == {"forward", "backward_kv", "backward_q", "rows", "other"}
    assert not [row for row in rows if "error" in row]


def test_no_spills(rows):
    assert not [row for row in rows if row["spills"] or row["stack"]]


def test_shared_memory_fits(rows):
    """99 KiB for the entries of sm_80, which sm_86 and sm_89 run as well; 227 KiB on sm_90."""
    limit = {80: 99 << 10, 90: 227 << 10}
    assert not [row for row in rows if row["shared"] > limit[row["arch"]]]


def test_tensor_cores(rows):
    """Warpgroup matrix instructions on sm_90 in the fused kernels, matrix instructions in the rest."""
    for row in rows:
        if row["table"] == "other":
            continue
        if row["arch"] == 90 and row["table"] != "rows":
            assert row["hgmma"] > 0, row
        else:
            assert row["hmma"] + row["hgmma"] > 0, row
