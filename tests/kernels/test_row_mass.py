"""The row op, forward and every gradient, against the float64 oracle; and beside an attention."""

import pytest
import torch
from harness import Case, assert_close, check, make_inputs, run

from abft_kernels import mass_attention, mass_attention_reference

# Rows · heads per KV head over 32 take several tiles, and other kernels for dq and dk; N300 takes several splits.
CASES = [
    "B2-H4:2-R1-N300-D64-G2-bf16-causal-ml",
    "B2-H4:2-R1-N111-D60-G2-fp32-causal-left-m",
    "B1-H8:1-R1-N300-D128-G2-bf16-causal-right-bnhd-ml",
    "B2-H2-R5-N130-D32-G3-fp16-causal-left-sliced-ml",
    "B1-H8:1-R6-N300-D64-G2-bf16-causal-ml",
    "B1-H4:1-R20-N130-D128-G2-fp32-causal-left-bnhd-ml",
    "B2-H2-R40-N111-D16-G1-fp32-full-right-ml",
    "B1-H2:1-R20-N63-D256-G8-bf16-causal-m",
    "B1-H1-R2-N63-D256-G2-fp32-causal-ml",
    "B3-H4:2-R3-N128-D80-G2-fp16-full-empty-strided-ml",
    "B2-H2-R4-N130-D96-G2-bf16-causal-left-l",
    "B1-H1-R1-N1-D64-G2-fp32-causal-ml",
    "B1-H2-R9-N63-D64-G8-fp32-full-s0.5-ml",
    "B1-H2-R3-N63-D32-G2-fp32-causal-s-0.4-ml",
    "B2-H2:1-R3-N700-D32-G2-bf16-causal-left-m",
    "B2-H2-R4-N130-D64-G2-bf16-causal-expanded-ml",
]
TORCH_CASES = ["B2-H4:2-R9-N900-D64-G2-fp64-causal-left-ml", "B2-H4:2-R130-N150-D64-G2-fp32-full-right-ml"]


@pytest.mark.parametrize("case", CASES)
def test_triton(case, device):
    check(Case.parse(case), device, "triton")


@pytest.mark.parametrize("case", CASES + TORCH_CASES)
def test_torch(case, device):
    check(Case.parse(case), device, "torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", ["B0-H2-R2-N8", "B2-H2-R2-N8"])
def test_nothing_to_do(shape, backend, device):
    case = Case.parse(shape + "-G2-D16-fp32-ml")
    inputs = make_inputs(case, device)
    if case.batch:  # no key: every row is absent
        inputs.heads["k"], inputs.groups = inputs.heads["k"][:, :, :0], inputs.groups[:, :0]
        inputs.arguments["row_positions"].fill_(-1)
    ours, oracle = run(case, inputs, backend), run(case, inputs, "reference", torch.float64)
    for name, value in oracle.items():
        torch.testing.assert_close(ours[name].double(), value)


@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
@pytest.mark.parametrize("n_q", [63, 40])
def test_rows_of_an_attention(n_q, backend, device):
    """`mass_attention(row_positions=…)`: out as ever, and the masses of the named rows, repeated and absent too."""
    case = Case.parse("B2-H4:2-N63-D32-G2-fp32-causal-left")
    inputs = make_inputs(case, device)
    q, k, v = inputs.heads.values()
    q = q[:, :, 63 - n_q :]
    wanted = torch.tensor([[62, 62, -1, 40], [50, 23, -1, 62]], device=device)
    kwargs = {**inputs.arguments, "row_positions": wanted, "return_lse": True}

    def results(dtype, op, **more):
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (q, k, v)]
        outputs = op(*leaves, inputs.groups, 2, **kwargs, **more)
        torch.manual_seed(0)
        incoming = [torch.randn(o.shape, device=device).to(o.dtype) for o in outputs]
        return [*[o.detach() for o in outputs], *torch.autograd.grad(outputs, leaves, incoming)]

    ours = results(torch.float32, mass_attention, backend=backend)
    base = results(torch.float32, mass_attention_reference)
    oracle = results(torch.float64, mass_attention_reference)
    for name, x, y, z in zip(("out", "mass", "lse", "dq", "dk", "dv"), ours, base, oracle, strict=True):
        assert_close(name, x, y, z, 0.0)
