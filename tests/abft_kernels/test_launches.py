"""Launches of the public functions, forward and backward, as on a GPU."""

import pytest
import torch
from launches import Launches, counted

from abft_kernels import mass_attention, row_mass

LAYOUTS = {
    "packed": {"cu_seqlens": torch.tensor([0, 30, 60]).int()},
    "left": {"seq_ends": torch.tensor([60, 60]).int(), "seq_starts": torch.tensor([0, 9]).int()},
    "none": {},
}
ATTENTION = ("_mass_attn_fwd_kernel", "mass_attn_bwd_preprocess_kernel", "_mass_attn_bwd_kv_kernel",
             "_mass_attn_bwd_q_kernel")  # fmt: skip
PYTORCH = ("aten._scaled_dot_product_flash_attention_for_cpu.default",
           "aten._scaled_dot_product_flash_attention_for_cpu_backward.default")  # fmt: skip
ROWS = ("_row_mass_fwd_kernel", "_row_mass_bwd_kernel")
DQ = ("row_mass_dq_kernel",)


@pytest.fixture
def launches(device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("counts in Triton's interpreter")
    return Launches(monkeypatch)


def _inputs(layout, rows, device):
    packed = layout == "packed"
    q, k, v = (torch.randn(1 if packed else 2, 1, 60, 16, device=device, requires_grad=True) for _ in range(3))
    positions = torch.tensor([[29], [59]] if packed else [[59], [59]], device=device).expand(-1, rows).contiguous()
    groups = torch.zeros(k.shape[0], 60, dtype=torch.int8, device=device)
    return (q, k, v), groups, positions


@pytest.mark.parametrize(
    ("layout", "rows", "names"),
    [
        ("packed", 1, (*ATTENTION, *ROWS)),
        ("packed", 2, (*ATTENTION, *ROWS, *DQ)),
        ("left", 1, (*ATTENTION, *ROWS)),
        ("none", 1, (*PYTORCH, *ROWS, *DQ, "aten.add.Tensor", "aten.add.Tensor")),
    ],
)
def test_attention_with_rows(layout, rows, names, device, launches):
    heads, groups, positions = _inputs(layout, rows, device)

    def step():
        out, mass = mass_attention(*heads, groups, 2, row_positions=positions, **LAYOUTS[layout])
        torch.autograd.grad((out, mass), heads, (torch.ones_like(out), torch.ones_like(mass)))

    found = counted(launches, step)
    assert sorted(found.elements()) == sorted([*names, "aten.ones_like.default", "aten.ones_like.default"])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", ["packed", "left"])
def test_rows_of_all_queries(layout, rows, device, launches):
    (q, k, _), groups, positions = _inputs(layout, rows, device)

    def step():
        mass = row_mass(q, k, groups, 2, row_positions=positions, all_queries=True, **LAYOUTS[layout])
        torch.autograd.grad(mass, (q, k), torch.ones_like(mass))

    assert sorted(counted(launches, step).elements()) == sorted([*ROWS, *DQ, "aten.ones_like.default"])
