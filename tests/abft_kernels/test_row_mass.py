"""The row op, forward and every gradient, against the float64 oracle; and beside an attention."""

import pytest
import torch
from harness import Case, assert_close, check, make_inputs, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from abft_kernels import attention, gather_rows, mass_attention, mass_attention_reference, row_mass

# Rows · heads per KV head over 32 take several tiles, and other kernels for dq and dk; N600 takes several splits.
CASES = [
    "B2-H4:2-R1-N600-D64-G2-bf16-causal-ml",
    "B2-H4:2-R1-N111-D60-G2-fp32-causal-left-m",
    "B1-H8:1-R1-N300-D128-G2-bf16-causal-right-bnhd-ml",
    "B2-H2-R5-N130-D32-G3-fp16-causal-left-sliced-ml",
    "B1-H8:1-R6-N600-D64-G2-bf16-causal-ml",
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


PACKED = {"cu_seqlens": torch.tensor([0, 20, 20, 37, 37], dtype=torch.int32)}  # of 40 tokens: 3 belong to no sequence
LEFT = {"seq_ends": torch.tensor([40, 40]), "seq_starts": torch.tensor([0, 25])}
SHARD = {"query_offset": 30}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("keywords", "positions"),
    [
        (PACKED, [[19], [-1], [30], [-1]]),
        (PACKED, [[19, 19, 3], [-1, -1, -1], [30, -1, 30], [-1, -1, -1]]),
        (LEFT, [[39], [39]]),
        (LEFT, [[5, 39, 5, -1], [39, 24, 25, 39]]),
        (LEFT, [[*range(20, 40), *range(40)], [39] * 60]),
        (SHARD, [[33, 33], [-1, 39]]),
    ],
)
def test_rows_read_where_they_stand(keywords, positions, backend, device):
    """`all_queries` alone and beside an attention against the rows copied out of the queries."""
    torch.manual_seed(0)
    packed, first = "cu_seqlens" in keywords, keywords.get("query_offset", 0)
    batch, n_q = 1 if packed else 2, 40 - first
    shapes = [(batch, n_q, 4, 16), (batch, 40, 2, 16), (batch, 40, 2, 16)]
    q, k, v = (torch.randn(shape, device=device).transpose(1, 2).requires_grad_() for shape in shapes)
    groups, rows = torch.arange(40, device=device).expand(batch, -1) % 3 - 1, torch.tensor(positions, device=device)
    keywords = {name: x.to(device) if torch.is_tensor(x) else x for name, x in keywords.items()}
    given = {"row_positions": rows, "backend": backend, **keywords}
    copied = {**given, "query_offset": None, "key_offset": 0 if first else None, "backend": "torch"}
    expected = row_mass(gather_rows(q, rows, first), k, groups, 2, **copied)
    weight, do = torch.randn_like(expected), torch.randn(batch, 4, n_q, 16, device=device)
    want = torch.autograd.grad((expected * weight).sum(), (q, k))
    mass = row_mass(q, k, groups, 2, all_queries=True, **given)
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(torch.autograd.grad((mass * weight).sum(), (q, k)), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

    out, mass = mass_attention(q, k, v, groups, 2, **given)
    plain = attention(q, k, v, backend="torch", **keywords)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-5)
    got = torch.autograd.grad((mass * weight).sum() + (out * do).sum(), (q, k, v), retain_graph=True)
    alone = torch.autograd.grad((plain * do).sum(), (q, k, v))
    for one, other, more in zip(got, alone, (*want, 0), strict=True):
        torch.testing.assert_close(one, other + more, atol=1e-5, rtol=1e-4)
    for one, other in zip(torch.autograd.grad((mass * weight).sum(), (q, k)), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


class _Launches(TorchDispatchMode):
    """PyTorch operators that would launch a kernel on a GPU."""

    FREE = ("empty", "view", "detach", "as_strided", "expand", "reshape", "alias")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(free in str(func) for free in self.FREE):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("n_k", "launches"), [(60, 2), (600, 4)])
def test_few_launches(n_k, launches, device, monkeypatch):
    """One kernel each way for a single split, two for several; nothing else, whatever integers come in."""
    from abft_kernels.call import Call
    from abft_kernels.triton import rows

    if device.type == "cuda":
        pytest.skip("the number of splits depends on the GPU; the benchmark counts launches there")
    inputs = make_inputs(Case.parse(f"B1-H4:1-R1-N{n_k}-D32-G2-fp32-causal"), device)
    started = []
    for name in ("_row_mass_fwd_kernel", "_row_mass_bwd_kernel", "row_mass_combine_kernel", "row_mass_dq_kernel"):
        kernel = getattr(rows, name)

        class Spy:
            def __init__(self, kernel=kernel, name=name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                def start(*args, **kwargs):
                    started.append(self.name)
                    with _disable_current_modes():  # the interpreter's own copies
                        self.kernel[grid](*args, **kwargs)

                return start

        monkeypatch.setattr(rows, name, Spy())
    q, k = inputs.heads.values()
    call = Call(groups=inputs.groups, num_groups=2, scale=0.2)
    torch.use_deterministic_algorithms(False)  # fills of poisoned memory are no launches of ours
    with _Launches() as torch_launches:
        mass, lse = rows.forward(q, k, inputs.arguments["row_positions"], call)
        rows.backward(mass, None, q, k, inputs.arguments["row_positions"], call, mass, lse, False)
    assert len(started) == launches
    assert torch_launches.names == []
