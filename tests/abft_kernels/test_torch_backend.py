"""What is particular to the `torch` backend: it holds no N × N tensor, and dropout leaves the mass alone."""

import pytest
import torch

from abft_kernels import mass_attention
from abft_kernels.pytorch import scores

N, H, H_KV, D = 2048, 4, 2, 32


@pytest.mark.parametrize(
    ("n_q", "causal", "padding", "strided", "kv_heads"),
    [
        (N, True, "left", False, H_KV),
        (N, True, "right", False, H_KV),
        (N, True, None, False, H_KV),
        (N, True, None, True, H),
        (N, False, "left", False, H_KV),
        (N // 2, True, "left", False, H_KV),
        (64, True, "left", False, H_KV),
        (N // 2, False, None, False, H),
    ],
)
def test_no_square_tensor(n_q, causal, padding, strided, kv_heads, device, monkeypatch, largest_tensor):
    # Rows of scores go a few at a time: fewer than usual, to see that only they could be large.
    monkeypatch.setattr(scores, "_SCORE_ELEMENTS", 1 << 17)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    heads = [torch.randn(1, h, n, D, device=device, dtype=dtype)
             for h, n in ((H, n_q), (kv_heads, N), (kv_heads, N))]  # fmt: skip
    if strided:
        heads = [torch.stack([x, x], -1)[..., 0] for x in heads]
    heads = [x.detach().requires_grad_() for x in heads]
    groups = torch.randint(-1, 2, (1, N), device=device)
    bounds = {}
    if padding:
        bounds["seq_lens"] = torch.tensor([N - 300], device=device)
        if padding == "left":
            bounds["seq_starts"] = torch.tensor([300], device=device)
    with largest_tensor() as largest:
        out, mass = mass_attention(*heads, groups, 2, causal=causal, backend="torch", **bounds)
        (out.sum() + mass.square().sum()).backward()
    # In elements; an N × N tensor of one head would be N·N. `64` rows are masked explicitly: rows × N.
    bound = max(2 * H * N * D, 64 * N)
    assert bound < N * N / 4
    assert largest.numel <= bound, f"{largest.operator} made a tensor of {largest.numel} elements"


def test_dropout_leaves_the_mass(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 32, device=device) for _ in range(3))
    groups = torch.randint(-1, 2, (2, 64), device=device)
    plain = mass_attention(q, k, v, groups, 2, return_lse=True, backend="torch")
    dropped = mass_attention(q, k, v, groups, 2, return_lse=True, backend="torch", dropout_p=0.5)
    assert torch.equal(plain[1], dropped[1])
    assert torch.equal(plain[2], dropped[2])
    assert not torch.allclose(plain[0], dropped[0])
    many = torch.stack([mass_attention(q, k, v, groups, 2, backend="torch", dropout_p=0.5)[0] for _ in range(200)])
    # The mean over 200 draws is within five of its standard errors nearly everywhere.
    error = (many.mean(0) - plain[0]).abs() / (many.std(0) / 200**0.5).clamp(min=1e-6)
    assert (error < 5).float().mean() > 0.99


def test_chunks_do_not_matter(device, monkeypatch):
    q, k, v = (torch.randn(2, 4, 50, 16, device=device, dtype=torch.float64) for _ in range(3))
    groups = torch.randint(-1, 3, (2, 50), device=device)

    def results():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mass = mass_attention(*leaves, groups, 3, backend="torch")[1]
        return [mass, *torch.autograd.grad(mass.square().sum(), leaves[:2])]

    whole = results()
    monkeypatch.setattr(scores, "_SCORE_ELEMENTS", 2 * 4 * 50 * 7)  # 7 rows at a time
    for one, other in zip(whole, results(), strict=True):
        torch.testing.assert_close(one, other)
