"""The fused op, forward and every gradient, against the float64 oracle."""

import pytest
import torch
from harness import Case, check, make_inputs, run

# Pairwise over the features; N111 and N130 cross a tile of every kernel, N63 and N1 fit in one.
CASES = [
    "B2-H4:2-N111-D64-G2-bf16-causal-oml",
    "B1-H2-N128-D64-G1-fp32-causal-om",
    "B2-H2:1-N130-D32-G3-fp16-causal-left-bnhd-oml",
    "B2-H4:2-N111x63-D60-G2-bf16-causal-left-oml",
    "B2-H2-N63x111-D60-G2-fp32-causal-right-sliced-oml",
    "B1-H4:1-N63x130-D96-G8-bf16-full-Om",
    "B1-H2-N130x63-D80-G2-fp16-full-bnhd-oml",
    "B3-H2:1-N111-D16-G2-fp32-causal-empty-strided-oml",
    "B2-H2-N130-D128-G2-bf16-full-right-ml",
    "B1-H2:1-N130-D128-G2-bf16-causal-sliced-o",
    "B2-H1-N111-D256-G1-bf16-causal-left-om",
    "B1-H1-N63-D256-G2-fp16-full-oml",
    "B1-H2:1-N63-D128-G8-fp32-causal-bnhd-oml",
    "B2-H2-N1-D64-G2-fp32-causal-oml",
    "B3-H2:1-N1x130-D64-G2-bf16-causal-left-oml",
    "B1-H2-N128x1-D32-G2-fp16-causal-oml",
    "B1-H8:1-N63-D32-G2-bf16-causal-m",
    "B2-H2-N111-D64-G2-fp32-causal-right-l",
    "B1-H2-N63-D64-G2-fp32-causal-s0.5-O",
    "B1-H2-N63-D32-G2-fp32-causal-s-0.4-oml",
    "B1-H2-N63-D32-G2-fp32-causal-s0.0-oml",
    "B2-H2:1-N63-D64-G3-fp16-full-empty-s0.02-mo",
    "B2-H2-N63-D64-G2-bf16-causal-left-expanded-oml",
]
# PyTorch is fast enough for more lengths: chunks, and queries that are masked explicitly or squared with padding.
TORCH_CASES = [
    "B2-H4:2-N300-D64-G2-fp32-causal-left-oml",
    "B2-H4:2-N150x300-D32-G2-fp32-causal-left-oml",
    "B2-H4:2-N150x300-D32-G2-bf16-causal-right-bnhd-oml",
    "B2-H4:1-N200x300-D32-G3-fp16-causal-sliced-oml",
    "B2-H4:2-N300x150-D32-G2-fp32-causal-left-strided-oml",
    "B1-H2-N63-D256-G2-fp32-causal-oml",
    "B2-H4:2-N200-D64-G2-fp64-full-left-oml",
    "B2-H4:2-N200-D64-G8-fp64-causal-empty-oml",
]


@pytest.mark.parametrize("case", CASES)
def test_triton(case, device):
    check(Case.parse(case), device, "triton")


@pytest.mark.parametrize("case", CASES + TORCH_CASES)
def test_torch(case, device):
    check(Case.parse(case), device, "torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", ["B0-H2-N8-G2", "B1-H2-N0x8-G2", "B2-H2:1-N8x0-G2", "B2-H2-N8x0-G1-full"])
def test_nothing_to_do(shape, backend, device):
    case = Case.parse(shape + "-D16-fp32-oml")
    inputs = make_inputs(Case.parse(shape.replace("x0", "x8") + "-D16-fp32-oml"), device)
    if case.n_k == 0:
        inputs.heads["k"], inputs.heads["v"] = (inputs.heads[n][:, :, :0] for n in ("k", "v"))
        inputs.groups = inputs.groups[:, :0]
    ours, oracle = run(case, inputs, backend), run(case, inputs, "reference", torch.float64)
    for name, value in oracle.items():
        torch.testing.assert_close(ours[name].double(), value)
