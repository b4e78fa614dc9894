"""The oracle: attention mass in plain PyTorch, with the full score matrix, in any dtype on any device.

Every other backend is tested against this file in float64. It differentiates by autograd, so it shares no
derivation with the kernels:

    S = scale · Q Kᵀ, soft-capped to c·tanh(S/c), less slope·|i − j|
    P = softmax([S + mask, sink])          mass_ig = Σ_j P_ij w_jg          out_i = Σ_j Z_ij P_ij V_j

w_jg is [key_groups_j = g] or the key's weight, Z dropout. A row that sees no key has output 0, mass 0, LSE −inf, and
no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abft_kernels.masking import Keywords, Masking
from abft_kernels.philox import dropout_keep

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["mass_attention_reference", "row_mass_reference"]


def _interval(positions: Tensor, present: Tensor, n_k: int, masking: Masking) -> tuple[Tensor, Tensor]:
    """Return first and one-past-last position of the keys that each row `(S, R)` sees; not ascending: none."""
    causal, cu_seqlens, offset = masking.causal, masking.cu_seqlens, masking.key_offset or 0
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long()
        sequence = torch.searchsorted(cu_seqlens, positions.clamp(0).contiguous(), right=True) - 1
        sequence = sequence.clamp(0, len(cu_seqlens) - 2)
        start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
    elif masking.padded:
        start = positions.new_zeros(len(positions)) if masking.seq_starts is None else masking.seq_starts
        ends = masking.seq_ends if masking.seq_lens is None else start + masking.seq_lens
        assert ends is not None
        start, end = (x.long()[:, None].expand_as(positions) for x in (start, ends))
    else:
        start, end = torch.full_like(positions, offset), torch.full_like(positions, offset + n_k)
    first = start if cu_seqlens is not None or masking.padded else torch.zeros_like(start)
    if cu_seqlens is not None or masking.padded:
        present = present & (positions >= start) & (positions < end)
    end = torch.where(present, end, start)
    if causal:
        end = torch.minimum(end, positions + 1)
    if masking.window is not None:
        start = torch.maximum(start, positions - masking.window + 1)
    if masking.chunk is not None:
        number = torch.div(positions - first, masking.chunk, rounding_mode="floor")
        start = torch.maximum(start, first + number * masking.chunk)
        end = torch.minimum(end, first + (number + 1) * masking.chunk)
    return start, end


def _weights(key_groups: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Return w_jg, `(B, N, G)`."""
    if key_groups.is_floating_point():
        return key_groups.to(dtype)
    return (key_groups[..., None] == torch.arange(num_groups, device=key_groups.device)).to(dtype)


def _probabilities(q: Tensor, k: Tensor, positions: Tensor, present: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """Return P `(S, H, R, N)` and LSE `(S, H, R)` of rows at `positions` `(S, R)`."""
    scale = q.shape[-1] ** -0.5 if masking.scale is None else masking.scale
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    keys = torch.arange(k.shape[2], device=q.device) + (masking.key_offset or 0)
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    if masking.alibi_slopes is not None:
        slopes = masking.alibi_slopes.to(scores.dtype).reshape(-1, q.shape[1], 1, 1)
        scores = scores - slopes * (positions[:, None, :, None] - keys).abs()
    start, end = _interval(positions, present, k.shape[2], masking)
    visible = (keys >= start[:, None, :, None]) & (keys < end[:, None, :, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if masking.sinks is not None:
        lse = torch.where(visible.any(-1), torch.logaddexp(lse, masking.sinks.to(lse.dtype)[:, None]), lse)
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]), lse


def _consecutive(q: Tensor, k: Tensor, masking: Masking) -> tuple[Tensor, Tensor, int]:
    """Return positions `(B, N_q)` of consecutive rows, that all are present, and the position of row 0."""
    first = masking.query_offset
    if first is None:
        first = (masking.key_offset or 0) + k.shape[2] - q.shape[2]
    positions = (torch.arange(q.shape[2], device=q.device) + first).expand(q.shape[0], -1)
    return positions, torch.ones_like(positions, dtype=torch.bool), first


def row_mass_reference(
    q: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    return_lse: bool = False,
    **keywords: Unpack[Keywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """Oracle of :func:`abft_kernels.row_mass`: the same arguments and results, O(R·N) memory."""
    masking = Masking(**keywords)
    if row_positions is None:
        positions, present, _ = _consecutive(q, k, masking)
    else:
        positions, present = row_positions.long(), row_positions >= 0
    probabilities, lse = _probabilities(q, k, positions, present, masking)
    mass = probabilities @ _weights(key_groups, num_groups, probabilities.dtype)[:, None]
    return (mass, lse) if return_lse else mass


def mass_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    return_lse: bool = False,
    **keywords: Unpack[Keywords],
) -> tuple[Tensor, ...]:
    """Oracle of :func:`abft_kernels.mass_attention`: the same arguments and results, O(N²) memory.

    In float16 and bfloat16 it rounds where an eager implementation does: scores come out of the product in
    the input dtype, softmax runs in float32, and the probabilities are rounded before they meet V.
    """
    masking = Masking(**keywords)
    positions, present, first = _consecutive(q, k, masking)
    probabilities, lse = _probabilities(q, k, positions, present, masking)
    kept = probabilities
    if dropout_p:
        streams = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[0], q.shape[1], 1, 1)
        rows, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        kept = kept * dropout_keep(dropout_seed, dropout_p, streams, rows[:, None], keys) / (1 - dropout_p)
    out = kept.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if row_positions is not None:
        rows = gather_rows(q, row_positions, first)
        keywords["query_offset"] = None
        mass, lse = row_mass_reference(
            rows, k, key_groups, num_groups, row_positions=row_positions, return_lse=True, **keywords
        )
    else:
        mass = probabilities @ _weights(key_groups, num_groups, probabilities.dtype)[:, None]
        if row_mask is not None:
            mass = mass * row_mask.to(torch.bool)[:, None, :, None]
    return (out, mass, lse) if return_lse else (out, mass)


def gather_rows(q: Tensor, row_positions: Tensor, offset: int) -> Tensor:
    """Return the rows of q `(B, H, N_q, D)` at positions `(S, R)`: `(S, H, R, D)`; negative positions give some row.

    `offset` is the position of row 0. S is B, or any number of packed sequences over a batch of 1.
    """
    index = (row_positions.long() - offset).clamp(0, max(0, q.shape[2] - 1))
    if q.shape[0] != index.shape[0]:  # an expanded q would have an expanded gradient
        return q[0][:, index].transpose(0, 1)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
