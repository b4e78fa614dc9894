"""The gradient of a head whose labelled key takes nearly all of the mass: (w − mass) cancels, and must not round."""

import pytest
import torch
from torch import Tensor

from abft_kernels import mass_attention, mass_attention_reference, row_mass, row_mass_reference

N, D = 100, 64


def _saturated(target: float, device: torch.device, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 q `(1, 2, rows, D)`, k `(1, 2, N, D)` and groups, so that key 0 takes `target` of the mass on average."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(2, 1, D, generator=generator)
    q = direction + 0.2 * torch.randn(2, rows, D, generator=generator)
    k = torch.randn(2, N, D, generator=generator)
    low, high = 0.0, 20.0
    for _ in range(40):  # the mass grows with the length of the labelled key
        middle = (low + high) / 2
        k[:, 0] = direction[:, 0] * middle
        weights = torch.softmax((q @ k.transpose(-1, -2)).double() * D**-0.5, -1)
        low, high = (middle, high) if weights[..., 0].mean() < target else (low, middle)
    groups = torch.full((1, N), -1)
    groups[:, 0] = 0
    bf16 = [x[None].to(device, torch.bfloat16) for x in (q, k)]
    return *bf16, groups.to(device)


def _error(ours: Tensor, oracle: Tensor) -> float:
    return ((ours.double() - oracle).norm() / oracle.norm()).item()


def _gradients(op, q, k, groups, dtype=torch.bfloat16, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """Mean mass, dq and dk of the sum of the masses."""
    q, k = (x.to(dtype).requires_grad_() for x in (q.detach(), k.detach()))
    if "row_positions" in kwargs:
        mass = op(q, k, groups, 1, causal=False, **kwargs)
    else:
        mass = op(q, k, torch.zeros_like(k), groups, 1, causal=False, **kwargs)[1]
    return mass.mean(), *torch.autograd.grad(mass.sum(), (q, k))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("target", [0.98, 0.999])
@pytest.mark.parametrize("op", ["fused", "rows"])
def test_gradient_within_one_percent(op, target, backend, device):
    q, k, groups = _saturated(target, device, N if op == "fused" else 7)
    extra = {}
    if op == "rows":
        extra["row_positions"] = torch.full((1, 7), N - 1, device=device)
    ours_op, oracle_op = (mass_attention, mass_attention_reference) if op == "fused" else (row_mass, row_mass_reference)
    mean, dq, dk = _gradients(oracle_op, q, k, groups, torch.float64, **extra)
    assert abs(1 - mean - (1 - target)) < 0.2 * (1 - target), "the inputs do not saturate as meant"
    ours_mean, ours_dq, ours_dk = _gradients(ours_op, q, k, groups, backend=backend, **extra)
    assert abs(ours_mean - mean) < 1e-5
    assert _error(ours_dq, dq) < 0.01
    assert _error(ours_dk, dk) < 0.01


@pytest.mark.parametrize(("target", "at_least"), [(0.98, 0.03), (0.999, 0.3)])
def test_naive_forms_fail(target, at_least, device):
    """The bound above tells the kernels from the two shortcuts: two attentions subtracted, and columns of V."""
    q, k, groups = _saturated(target, device)
    _, dq, _ = _gradients(mass_attention_reference, q, k, groups, torch.float64)
    scale = D**-0.5
    weights = torch.softmax((q.float() @ k.float().transpose(-1, -2)) * scale, -1)
    labelled = (groups == 0).float()[:, None, None]  # [B, 1, 1, N]
    mass = (weights * labelled).sum(-1, keepdim=True)

    def bf16(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    # exp(LSE_g − LSE): each attention hands its own gradient back in bf16.
    of_group = bf16((bf16(mass * weights * labelled / mass) @ k).float() * scale)
    of_all = bf16((bf16(mass * weights) @ k).float() * scale)
    assert _error(of_group - of_all, dq) > at_least
    # Indicator columns of V: the mass is an output in bf16, and D = dO·O is made from it.
    ds = weights * (labelled - bf16(mass).float())
    assert _error(bf16((bf16(ds) @ k).float() * scale), dq) > at_least
