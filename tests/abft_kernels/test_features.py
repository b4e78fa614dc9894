"""Every feature × forward and each gradient, in the fused op, the mass-only op and the row op, on every backend.

`docs/attention-mass.md` holds the table of features; this is its proof. Each case is checked for out, mass, lse and the
gradients of q, k, v, sinks and weights against the float64 oracle.
"""

import pytest
from harness import Case, check

# N130 crosses tiles of every kernel; the second case of a feature combines it with others.
FUSED = {
    "packed": ["B3-H4:2-N130-D64-G2-bf16-causal-packed-oml", "B4-H2-N111-D32-G2-fp32-full-packed-bnhd-oml"],
    "window": ["B2-H4:2-N130-D64-G2-bf16-causal-w20-oml", "B2-H2-N63x130-D32-G2-fp32-causal-w45-left-oml",
               "B3-H2:1-N130-D32-G2-fp32-causal-w17-packed-oml", "B1-H2-N130x63-D32-G2-fp32-causal-w1-oml"],
    "softcap": ["B2-H4:2-N130-D64-G2-bf16-causal-c2.5-oml", "B1-H2:1-N111-D32-G2-fp32-causal-c0.7-s0.5-w40-oml"],
    "sinks": ["B2-H4:2-N130-D64-G2-bf16-causal-sinks-oml", "B2-H2-N63x111-D32-G2-fp32-causal-sinks-w20-left-oml",
              "B2-H2:1-N130x63-D32-G2-fp32-causal-sinks-empty-ml"],
    "alibi": ["B2-H4:2-N130-D64-G2-bf16-causal-alibi-oml", "B2-H2-N111-D32-G2-fp32-full-alibi-right-oml"],
    "value_dim": ["B2-H4:2-N111-D48-V32-G2-bf16-causal-left-oml", "B1-H2-N63-D192-V128-G2-bf16-causal-oml",
                  "B1-H2-N111-D16-V60-G2-fp32-full-bnhd-oml"],
    "head_dim": ["B1-H2:1-N63-D256-G2-bf16-causal-oml", "B1-H1-N35-D512-G2-bf16-causal-oml",
                 "B1-H1-N35-D320-V512-G1-fp16-full-om"],
    "dropout": ["B2-H4:2-N130-D64-G2-bf16-causal-drop-oml", "B2-H2-N63x111-D32-G2-fp32-causal-drop-left-oml",
                "B3-H2:1-N111-D32-G2-fp32-causal-drop-packed-w40-oml"],
    "rows": ["B2-H4:2-N130-D64-G2-bf16-causal-wanted-oml", "B3-H2-N111-D32-G2-fp32-causal-wanted-packed-m"],
    "groups": ["B2-H2:1-N130-D32-G16-fp32-causal-oml", "B1-H2-N111-D64-G11-bf16-full-om"],
    "weights": ["B2-H4:2-N130-D64-G2-bf16-causal-weighted-oml", "B2-H2-N111-D32-G5-fp32-causal-weighted-left-oml",
                "B3-H2:1-N111-D32-G3-fp32-full-weighted-packed-ml"],
    "shards": ["B2-H4:2-N130x63-D32-G2-fp32-causal-shard-oml", "B2-H2-N63x130-D32-G2-bf16-causal-shard-w50-left-oml",
               "B1-H2-N63x63-D32-G2-fp32-full-shard-alibi-oml"],
    "decoding": ["B2-H4:2-N1x300-D64-G2-bf16-causal-left-oml", "B1-H8:2-N3x400-D64-V32-G2-fp32-causal-sinks-w90-oml",
                 "B1-H4:2-N4x260-D32-G2-fp32-full-c3.0-alibi-weighted-oml"],
    "mass_only": ["B2-H4:2-N130-D64-G2-bf16-causal-alone-left-ml", "B3-H2:1-N111-D32-G2-fp32-causal-alone-packed-m",
                  "B1-H2-N63x111-D48-G3-fp32-causal-alone-sinks-c3.0-alibi-weighted-w30-ml"],
    "all": ["B3-H4:2-N111-D48-V32-G3-fp32-causal-packed-w40-c3.0-sinks-alibi-drop-wanted-weighted-oml",
            "B2-H4:2-N63x111-D64-V48-G2-bf16-causal-left-w40-c3.0-sinks-alibi-drop-wanted-oml"],
}  # fmt: skip
ROWS = {
    "packed": ["B3-H4:2-R1-N300-D64-G2-bf16-causal-packed-ml", "B4-H8:1-R7-N150-D32-G2-fp32-causal-packed-ml",
               "B2-H2-R5-N130-D32-G2-fp32-full-packed-bnhd-ml"],
    "window": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-w20-ml", "B2-H8:1-R6-N130-D32-G2-fp32-causal-w45-left-ml"],
    "softcap": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-c2.5-ml", "B1-H2-R2-N111-D32-G2-fp32-causal-c0.7-s0.5-ml"],
    "sinks": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-sinks-ml", "B2-H2-R4-N63-D32-G2-fp32-causal-sinks-left-w9-ml"],
    "alibi": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-alibi-ml", "B2-H2-R5-N63-D32-G2-fp32-full-alibi-right-ml"],
    "head_dim": ["B1-H2:1-R2-N35-D512-G2-bf16-causal-ml", "B1-H1-R2-N35-D320-G2-fp32-causal-ml"],
    "groups": ["B2-H2:1-R3-N300-D32-G16-fp32-causal-ml", "B1-H4:1-R3-N300-D128-G9-bf16-causal-m"],
    "weights": ["B2-H4:2-R3-N300-D64-G2-bf16-causal-weighted-ml", "B2-H8:1-R9-N130-D32-G5-fp32-causal-weighted-left-ml",
                "B3-H2:1-R3-N130-D32-G3-fp32-causal-weighted-packed-ml"],
    "shards": ["B2-H4:2-R6-N130-D32-G2-fp32-causal-shard-ml", "B2-H2-R5-N130-D32-G2-bf16-causal-shard-w50-left-ml",
               "B1-H2-R5-N63-D32-G2-fp32-full-shard-alibi-ml"],
    "all": ["B3-H4:2-R4-N300-D48-G3-fp32-causal-packed-w40-c3.0-sinks-alibi-weighted-ml"],
}  # fmt: skip


def _cases(table: dict[str, list[str]]) -> list:
    return [pytest.param(case, id=f"{feature}:{case}") for feature, cases in table.items() for case in cases]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", _cases(FUSED))
def test_fused(case, backend, device):
    check(Case.parse(case), device, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", _cases(ROWS))
def test_rows(case, backend, device):
    check(Case.parse(case), device, backend)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 63, 65])
def test_windows_that_end_at_a_border_of_tiles(window, device):
    """Blocks of keys and rows begin and end by the window: each kernel's bounds, one off at a time."""
    check(Case.parse(f"N130-D16-G2-fp32-causal-oml-w{window}"), device, "triton")
