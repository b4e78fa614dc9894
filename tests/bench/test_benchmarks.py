"""Timings on a CPU, for ratios within one run: `pytest tests/bench/test_benchmarks.py --benchmark-enable`.

Disabled, as in the test command, each runs once and its result is checked.
"""

import pytest
import torch

import abft_kernels
from bench.gpu.competitors import recomputed_row

TOKENS = (512, 2048)


@pytest.fixture
def inputs(request):
    n = request.param
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, 1, 64, generator=generator, requires_grad=True)
    k = torch.randn(1, 2, n, 64, generator=generator, requires_grad=True)
    groups = torch.full((1, n), -1)
    groups[0, n // 10 :: n // 10] = torch.arange(groups[0, n // 10 :: n // 10].numel()) % 2
    return q, k, groups


@pytest.mark.parametrize("inputs", TOKENS, indirect=True, ids=lambda n: f"n{n}")
@pytest.mark.parametrize("way", ["abft", "recomputed"])
def test_row(benchmark, inputs, way):
    """Mass of the last row, forward and backward: `row_mass` in PyTorch against the plain recomputation."""
    q, k, groups = inputs
    last = torch.tensor([[k.shape[2] - 1]])

    def mass():
        if way == "abft":
            return abft_kernels.row_mass(q, k, groups, 2, row_positions=last, backend="torch")
        return recomputed_row(q, k, groups, 2)

    def both():
        result = mass()
        return result, torch.autograd.grad(result.sum(), [q, k])

    result, gradients = benchmark(both)
    expected = recomputed_row(q, k, groups, 2)
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), [q, k]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", ["all", "last"])
def test_attention_with_masses(benchmark, rows):
    """Attention and masses in PyTorch: dense supervision against one row."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 512, 64, generator=generator) for heads in (8, 2, 2))
    groups = (torch.arange(512) % 4 - 2).clamp(min=-1)[None]
    chosen = {} if rows == "all" else {"row_positions": torch.tensor([[511]])}
    out, mass = benchmark(lambda: abft_kernels.mass_attention(q, k, v, groups, 2, backend="torch", **chosen))
    assert out.shape == q.shape
    expected = abft_kernels.mass_attention(q, k, v, groups, 2, backend="reference")[1]
    torch.testing.assert_close(mass, expected if rows == "all" else expected[:, :, -1:])
