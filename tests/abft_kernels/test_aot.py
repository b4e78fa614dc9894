"""The kernels compiled with no GPU, for all GPUs that the launch table serves: no register spills, shared memory within
that of the GPU and of the table's entry, and matrix instructions.

A sample here, in parts for the workers of pytest-xdist; `make nightly` compiles all that calls can launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PARTS = 8
_OF_CASE = ("operator", "kernel", "target", "dtype", "head_dim", "groups", "form")


def _without_interpreter():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def listed_spills():
    """Return the bytes that each compilation is known to spill."""
    table = json.loads((RESULTS / "aot_gate.json").read_text())
    return {tuple(row[field] for field in _OF_CASE): row["stack"] for row in table["spills"]}


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_a_sample_compiles_well(part, tmp_path, listed_spills):
    path = tmp_path / "aot.json"
    command = [sys.executable, "-m", "bench.compile.aot", "--sample", "--part", f"{part}/{PARTS}", "--jobs", "1"]
    done = subprocess.run(
        [*command, "--json", str(path)],
        cwd=ROOT,
        env=_without_interpreter(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    for row in json.loads(path.read_text())["rows"]:
        case = tuple(row[field] for field in _OF_CASE)
        assert "error" not in row, row
        assert row["stack"] <= listed_spills.get(case, 0), row
        assert row["shared"] <= row["limit"], row
        assert row["reserved"] is None or row["shared"] <= row["reserved"], row
        if "mass_attn" in row["kernel"] and "preprocess" not in row["kernel"] and row["dtype"] != "fp32":
            assert row["matrix"] > 0, row


def test_the_sample_meets_every_target_kernel_and_form():
    code = """
from bench.compile.gate import gate_cases, sample
from bench.compile.launches import TARGETS
cases = sample(TARGETS)
every = gate_cases(["sm_90"], [64], ["bf16"])
# All but those that put splits together: a form of one split has none.
kernels = {(case.operator, case.kernel) for case in every if case.kernel.startswith("_")}
assert {(case.operator, case.kernel, case.target) for case in cases} >= {(*k, t) for k in kernels for t in TARGETS}
assert {(c.operator, c.kernel, c.form) for c in cases} >= {
    (c.operator, c.kernel, c.form) for c in every if c.kernel.startswith(("_mass_attn_fwd", "_mass_attn_bwd_", "_row"))
}
assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
assert {case.groups for case in cases} == {2, 16}
print(len(cases))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_without_interpreter(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 180  # about 2 seconds each


def test_the_committed_gate_has_no_problem():
    """The whole gate, as last run: what spills is listed with its bytes, and nothing spills in a main loop."""
    table = json.loads((RESULTS / "aot_gate.json").read_text())
    rows, listed = table["rows"], {tuple(row[field] for field in _OF_CASE) for row in table["spills"]}
    assert {row["target"] for row in rows} >= {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100"}
    for row in rows:
        case = tuple(row[field] for field in _OF_CASE)
        assert "error" not in row, row
        assert row["shared"] <= row["limit"], row
        assert row["loop_spills"] == 0 or case in listed, row
        assert (row["stack"] > 0 or row["spills"] > 0) == (case in listed), row


def test_warpgroup_instructions_on_hopper():
    """On sm_90, with the two groups of ABFT, all fused kernels to head_dim 128 take warpgroup instructions (wgmma)."""
    rows = json.loads((RESULTS / "aot_gate.json").read_text())["rows"]
    fused = [
        row
        for row in rows
        if row["target"] == "sm_90"
        and row["dtype"] == "bf16"
        and row["groups"] == 2
        and row["form"] == "full"
        and row["kernel"] in ("_mass_attn_fwd_kernel", "_mass_attn_bwd_kv_kernel", "_mass_attn_bwd_q_kernel")
    ]
    assert {row["head_dim"] for row in fused} >= {64, 128}
    assert all(row["warpgroup"] > 0 for row in fused), fused


def test_mass_costs_few_instructions():
    """The committed table of main-loop instructions: what a block without labels runs more than without the mass.

    A bound on instructions and no claim about time.
    """
    table = json.loads((RESULTS / "aot_instructions.json").read_text())["rows"]
    assert {(row["target"], row["head_dim"]) for row in table} >= {("sm_90", 64), ("sm_90", 128)}
    for row in table:
        more = row["on"]["instructions"] - row["on"]["skipped"] - row["off"]["instructions"]
        assert row["on"]["matrix"] == row["off"]["matrix"], row
        assert more <= 0.2 * row["off"]["instructions"], row
        assert row["registers"] > 0, row
        assert row["blocks"] > 0, row
