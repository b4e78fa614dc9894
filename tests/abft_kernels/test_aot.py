"""The launch table, compiled ahead of time with no GPU: no register spills, and the matrix instructions of the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abft_kernels.triton.launch import Launch, launch_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Each entry with its largest number of groups; `python -m bench.compile.aot --variants` does the rest.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.compile.aot",
            "--brief",
            "--arch",
            "80,90,100",
            "--groups",
            "2,16",
            "--json",
            str(path),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())["rows"]


def test_every_entry_compiles(rows):
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["table"] for row in rows} == {"forward", "backward_kv", "backward_q", "rows", "other"}
    assert not [row for row in rows if "error" in row]


def test_no_spills(rows):
    assert not [row for row in rows if row["spills"] or row["stack"]]


def test_shared_memory_fits(rows):
    """99 KiB for the entries of sm_80, which sm_86 and sm_89 run as well; 227 KiB on sm_90 and sm_100."""
    limit = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
    assert not [row for row in rows if row["shared"] > limit[row["arch"]]]


def test_tensor_cores(rows):
    """In 16 bits: matrix instructions everywhere; on sm_90, for the two groups of ABFT, warpgroup ones (wgmma) in all
    fused kernels to head_dim 128, and but for dK and dV to 256: their accumulators of 64 keys would spill."""
    for row in rows:
        if row["table"] == "other" or row["dtype"] != "bf16":
            continue
        launch, width = Launch(*row["launch"]), row["head_dim"]
        serves_two = launch_config(row["table"], width, 2, 2, torch.device("cpu")) == launch
        widest = {"forward": 256, "backward_q": 256, "backward_kv": 128, "rows": 0}[row["table"]]
        if row["arch"] == 90 and serves_two and width <= widest:
            assert row["hgmma"] > 0, row
        else:
            assert row["hmma"] + row["hgmma"] + row["utcmma"] > 0, row


def test_mass_costs_few_instructions():
    """The committed table of main-loop instructions: what a block without labels runs more than without the mass.

    A bound on instructions and no claim about time.
    """
    table = json.loads((ROOT / "bench" / "results" / "aot_instructions.json").read_text())["rows"]
    assert {(row["arch"], row["head_dim"]) for row in table} >= {(90, 64), (90, 128)}
    for row in table:
        more = row["on"]["instructions"] - row["on"]["skipped"] - row["off"]["instructions"]
        assert row["on"]["matrix"] == row["off"]["matrix"], row
        assert more <= 0.2 * row["off"]["instructions"], row
