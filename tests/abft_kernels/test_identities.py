"""What the mass must satisfy, whatever computes it."""

import itertools

import pytest
import torch
from harness import Case, make_inputs

from abft_kernels import mass_attention, merge_masses, row_mass
from abft_kernels.philox import dropout_keep

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
@pytest.mark.parametrize("op", ["fused", "rows"])
def test_shards_of_the_keys_merge(op, backend, device):
    """Three shards, merged, are the whole: results and every gradient; what split-K and context parallelism rely on."""
    q, k, v, groups = _small(device)
    features = {"window": 50, "alibi_slopes": torch.tensor([0.1, 0.02], device=device), "causal": True,
                "seq_lens": torch.tensor([66], device=device), "return_lse": True, "backend": backend}  # fmt: skip
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    positions = torch.tensor([[65, 3, -1, 40]], device=device)

    def results(keys, shard):
        q, k, v = leaves[0], leaves[1][:, :, keys], leaves[2][:, :, keys]
        if op == "fused":
            return mass_attention(q, k, v, groups[:, keys], 2, **features, **shard)
        shard.pop("query_offset", None)
        return row_mass(q[:, :, :4], k, groups[:, keys], 2, row_positions=positions, **features, **shard)

    shards = [results(slice(a, b), {"key_offset": a, "query_offset": 0}) for a, b in ((0, 30), (30, 37), (37, 70))]
    if op == "fused":
        mass, lse, out = merge_masses([s[1] for s in shards], [s[2] for s in shards], [s[0] for s in shards])
        merged = (out, mass, lse)
    else:
        merged = merge_masses([s[0] for s in shards], [s[1] for s in shards])
    whole = results(slice(0, 70), {})
    torch.manual_seed(0)
    incoming = [torch.randn_like(x) for x in whole]
    for one, other in zip(whole, merged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    present = [torch.where(x.isfinite(), x, 0) for x in whole], [torch.where(x.isfinite(), x, 0) for x in merged]
    gradients = [torch.autograd.grad(x, leaves, incoming, allow_unused=True) for x in present]
    for one, other in zip(*gradients, strict=True):
        if one is None:
            assert other is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_samples(backend, device):
    """Packed or one by one: the same results and gradients."""
    q, k, v, groups = _small(device)
    bounds = [0, 13, 13, 45, 70]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    packed = mass_attention(*leaves, groups, 2, cu_seqlens=torch.tensor(bounds, device=device), return_lse=True,
                            backend=backend)  # fmt: skip
    alone = [
        mass_attention(*(x[:, :, a:b] for x in leaves), groups[:, a:b], 2, return_lse=True, backend=backend)
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    joined = [torch.cat(parts, dim=2) for parts in zip(*alone, strict=True)]
    torch.manual_seed(0)
    incoming = [torch.randn_like(x) for x in packed]
    for one, other in zip(packed, joined, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(x, leaves, incoming) for x in (packed, joined)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indicator_weights_are_groups(backend, device):
    q, k, v, groups = _small(device)
    weights = (groups[..., None] == torch.arange(2, device=device)).float()
    for op, arguments in ((mass_attention, (q, k, v)), (row_mass, (q, k))):
        by_group = op(*arguments, groups, 2, backend=backend, return_lse=True)
        by_weight = op(*arguments, weights, 2, backend=backend, return_lse=True)
        for one, other in zip(by_group, by_weight, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dropout_by_seed(backend, device):
    """The same seed is the same mask on every backend, another one is not; mass and LSE know nothing of it."""
    q, k, v, groups = _small(device)

    def results(**dropout):
        return mass_attention(q, k, v, groups, 2, return_lse=True, backend=backend, **dropout)

    plain, once, twice, other = (
        results(),
        *(results(dropout_p=0.5, dropout_seed=seed) for seed in (1, 1, 1 << 61)),
    )
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))
    assert not torch.allclose(once[0], other[0])
    torch.testing.assert_close(once[1:], plain[1:], rtol=1e-6, atol=1e-6)
    kept = dropout_keep(1, 0.5, torch.tensor(0), torch.arange(300)[:, None], torch.arange(300))
    assert abs(kept.float().mean() - 0.5) < 0.01
    means = torch.stack([results(dropout_p=0.5, dropout_seed=seed)[0] for seed in range(40)]).mean(0)
    assert (means - plain[0]).abs().mean() < 0.25 * plain[0].abs().mean()


def test_rows_are_rows_of_the_fused_op(device):
    q, k, v, groups = _small(device)
    positions = torch.tensor([[3, 69, 40]], device=device)
    for backend in BACKENDS:
        mass = mass_attention(q, k, v, groups, 2, backend=backend)[1]
        rows = row_mass(q[:, :, positions[0]], k, groups, 2, row_positions=positions, backend=backend)
        torch.testing.assert_close(rows, mass[:, :, positions[0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", ["window", "chunk"])
@pytest.mark.parametrize("keys", [150, 2**30 - 1, 2**31 - 1, 2**40])
def test_a_limit_over_all_keys_is_none(keys, limit, backend, device):
    """Whole and in a shard, forward and backward: no sum with the limit overflows 32 bits."""
    *heads, groups = _small(device)
    for shard in ({}, {"key_offset": 40, "query_offset": 75}):
        results = []
        for options in ({}, {limit: keys}):
            leaves = [x.detach().clone().requires_grad_() for x in heads]
            out, mass = mass_attention(*leaves, groups, 2, backend=backend, **options, **shard)
            row = row_mass(leaves[0][:, :, -1:], leaves[1], groups, 2, backend=backend,
                           row_positions=torch.tensor([[69]], device=device), **options)  # fmt: skip
            loss = out.square().sum() + mass.square().sum() + row.square().sum()
            results.append([out, mass, row, *torch.autograd.grad(loss, leaves)])
        for plain, limited in zip(*results, strict=True):
            torch.testing.assert_close(plain, limited, rtol=1e-6, atol=1e-6)
            assert plain.abs().max() > 0
