"""The oracle: attention mass in plain PyTorch, with the full score matrix, in any dtype on any device.

Every other backend is tested against this file in float64. It differentiates by autograd, so it shares no
derivation with the kernels:

    S = scale · Q Kᵀ          P = softmax(S + mask)          mass_ig = Σ_j P_ij [key_groups_j = g]

A row that sees no key has output 0, mass 0, LSE −inf, and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mass_attention_reference", "row_mass_reference"]


def row_positions_of(n_q: int, n_k: int, causal: bool, device: torch.device) -> Tensor:
    """Key position of each query row when the last query is aligned with the last key, `(n_q,)` int64.

    Without a causal mask a position only says that the row is present, so negative ones are lifted to 0.
    """
    positions = torch.arange(n_q, device=device) + (n_k - n_q)
    return positions if causal else positions.clamp(min=0)


def _visible(positions: Tensor, n_k: int, causal: bool, starts: Tensor | None, ends: Tensor | None) -> Tensor:
    """`(B, 1, R, N)` bool: may row r of sample b look at key j?"""
    keys = torch.arange(n_k, device=positions.device)
    rows = positions[:, None, :, None]
    start = 0 if starts is None else starts[:, None, None, None]
    end = n_k if ends is None else ends[:, None, None, None]
    visible = (keys >= start) & (keys < end) & (rows >= start) & (rows < end)
    return visible & (keys <= rows) if causal else visible


def _probabilities(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    causal: bool,
    scale: float | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts, ends = None, None
    if seq_lens is not None:
        starts = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
        ends = starts + seq_lens
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~_visible(positions, k.shape[2], causal, starts, ends), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return probabilities, lse


def _mass(probabilities: Tensor, key_groups: Tensor, num_groups: int) -> Tensor:
    groups = torch.arange(num_groups, device=key_groups.device)
    indicator = (key_groups[..., None] == groups).to(probabilities.dtype)  # [B, N, G]
    return probabilities @ indicator[:, None]


def row_mass_reference(
    q: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor,
    causal: bool = True,
    scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Oracle of :func:`abft_kernels.row_mass`: the same arguments and results, O(R·N) memory."""
    probabilities, lse = _probabilities(q, k, row_positions, causal, scale, seq_lens, seq_starts)
    mass = _mass(probabilities, key_groups, num_groups)
    return (mass, lse) if return_lse else mass


def mass_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    row_positions: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Oracle of :func:`abft_kernels.mass_attention`: the same arguments and results, O(N²) memory.

    In float16 and bfloat16 it rounds where an eager implementation does: scores come out of the product in
    the input dtype, softmax runs in float32, and the probabilities are rounded before they meet V.
    """
    positions = row_positions_of(q.shape[2], k.shape[2], causal, q.device).expand(q.shape[0], -1)
    probabilities, lse = _probabilities(q, k, positions, causal, scale, seq_lens, seq_starts)
    out = probabilities.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    mass = _mass(probabilities, key_groups, num_groups)
    if row_positions is not None:
        rows = gather_rows(q, row_positions, k.shape[2])
        mass, lse = row_mass_reference(
            rows, k, key_groups, num_groups, row_positions=row_positions, causal=causal, scale=scale,
            seq_lens=seq_lens, seq_starts=seq_starts, return_lse=True,
        )  # fmt: skip
    return (out, mass, lse) if return_lse else (out, mass)


def gather_rows(q: Tensor, row_positions: Tensor, n_k: int) -> Tensor:
    """Rows of q `(B, H, N_q, D)` at key positions `(B, R)`: `(B, H, R, D)`. Negative positions give row 0.

    Positions count the `n_k` keys; the last query is aligned with the last key.
    """
    index = (row_positions.long() - (n_k - q.shape[2])).clamp(min=0)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
