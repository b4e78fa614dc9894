"""What the mass must satisfy, whatever computes it."""

import pytest
import torch
from harness import Case, make_inputs

from abft_kernels import mass_attention, row_mass

BACKENDS = ["triton", "torch", "reference"]


def _small(device, groups=2):
    case = Case.parse(f"B1-H2:1-N70-D32-G{groups}-fp32-causal")
    inputs = make_inputs(case, device)
    return *inputs.heads.values(), inputs.groups


@pytest.mark.parametrize("backend", BACKENDS)
def test_partition_sums_to_one(backend, device):
    """If every key is in a group the masses sum to 1, and their sum has no gradient."""
    q, k, v, _ = _small(device)
    groups = torch.randint(0, 3, (1, 70), generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    total = mass_attention(q, k, v, groups, 3, backend=backend)[1].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    dq, dk = torch.autograd.grad(total.sum(), (q, k))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5  # rows of 70 terms of size 1 that cancel


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_forms_of_the_mass(backend, device):
    """exp(LSE of the group − LSE), and attention over the indicator as values."""
    q, k, v, groups = _small(device)
    out, mass, lse = mass_attention(q, k, v, groups, 2, return_lse=True, backend=backend)
    indicator = (groups[:, None, :, None] == torch.arange(2, device=device)).float()
    columns = torch.cat([indicator, torch.zeros(1, 1, 70, 30, device=device)], -1)
    by_columns = mass_attention(q, k, columns, groups, 2, backend=backend)[0][..., :2]
    torch.testing.assert_close(mass, by_columns, rtol=1e-5, atol=1e-6)
    scores = (q @ k.transpose(-1, -2)) * 32**-0.5
    scores = scores.masked_fill(torch.ones(70, 70, dtype=torch.bool, device=device).triu(1), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    of_group = scores.masked_fill((groups != 0)[:, None, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(mass[..., 0], (of_group - lse).exp(), rtol=1e-5, atol=1e-6)
    assert out.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_keys_merge(backend, device):
    """lse = logaddexp lse_s, mass = Σ mass_s·exp(lse_s − lse): what split-K and context parallelism rely on."""
    q, k, _, groups = _small(device)
    last = torch.full((1, 3), 69, device=device)
    rows = q[:, :, -3:]

    def mass(keys):
        n = keys.stop - keys.start
        return row_mass(rows, k[:, :, keys], groups[:, keys], 2, row_positions=torch.full_like(last, n - 1),
                        return_lse=True, backend=backend)  # fmt: skip

    whole, whole_lse = mass(slice(0, 70))
    shards = [mass(slice(0, 30)), mass(slice(30, 70))]
    lse = torch.logaddexp(shards[0][1], shards[1][1])
    torch.testing.assert_close(whole_lse, lse, rtol=1e-6, atol=1e-6)
    merged = sum(m * (s - lse).exp()[..., None] for m, s in shards)
    torch.testing.assert_close(whole, merged, rtol=1e-5, atol=1e-6)


def test_rows_are_rows_of_the_fused_op(device):
    q, k, v, groups = _small(device)
    positions = torch.tensor([[3, 69, 40]], device=device)
    for backend in BACKENDS:
        mass = mass_attention(q, k, v, groups, 2, backend=backend)[1]
        rows = row_mass(q[:, :, positions[0]], k, groups, 2, row_positions=positions, backend=backend)
        torch.testing.assert_close(rows, mass[:, :, positions[0]], rtol=1e-5, atol=1e-6)
