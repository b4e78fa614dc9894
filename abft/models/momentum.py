"""Momentum attention (Dai et al., arXiv 2212.10559, section 5): attention plus an exponential sum of earlier values.

If attention over demonstrations is gradient descent, then an average over its steps is a sum over values:
`MoAttn(q_t) = Attn(q_t) + m_t`, `m_t = Σ_{i<t} η^{t−i} v_i`. Let `m_t(s)` be the last s terms. Then
`m_t(1) = η v_{t−1}` and `m_t(2s) = m_t(s) + η^s m_{t−s}(s)`: log₂ N steps over the values, and no N × N tensor.
A sliding window bounds the attention, not this sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_momentum", "check_momentum", "momentum_values"]


def check_momentum(eta: float) -> None:
    """Raises a ValueError unless η lies between 0 and 1."""
    if not 0 < eta < 1:
        raise ValueError(f"momentum must lie between 0 and 1, got {eta}; leave it out (None) for plain attention")


def momentum_values(
    value: Tensor,
    eta: float,
    *,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The sums `Σ_{i<t} η^{t−i} v_i` over the earlier tokens of t's own sequence, for every t.

    Args:
        value: `(B, H, N, D)`, floating point.
        eta: η, between 0 and 1.
        seq_lens: `(B,)` tokens of each sample; None for all N. Padding gives nothing and gets 0.
        seq_starts: `(B,)` first token of each sample; None for 0.
        cu_seqlens: `(S + 1,)` bounds of packed sequences, in a batch of one.

    Returns:
        `(B, H, N, D)`, float32 (float64 for float64 values), with gradient to `value`.

    Raises:
        ValueError: η is not between 0 and 1.
    """
    check_momentum(eta)
    dtype = torch.promote_types(value.dtype, torch.float32)
    length = value.shape[2]
    positions = torch.arange(length, device=value.device)
    padding = starts = None
    if seq_lens is not None:
        first = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
        outside = (positions < first[:, None]) | (positions >= (first + seq_lens)[:, None])
        padding = outside[:, None, :, None]
        value = value.masked_fill(padding, 0.0)
    if cu_seqlens is not None:
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, positions.to(cu_seqlens.dtype), right=True) - 1]

    def shifted(terms: Tensor, steps: int, factor: float) -> Tensor:
        terms = terms[:, :, :-steps] * factor
        if starts is not None:
            of_another = positions[:-steps] < starts[steps:]
            terms = terms.masked_fill(of_another[:, None], 0.0)
        return torch.nn.functional.pad(terms, (0, 0, steps, 0))

    total = shifted(value.to(dtype), 1, eta)
    steps, factor = 1, eta
    while steps < length and factor >= torch.finfo(dtype).tiny:  # smaller ones add nothing
        total = total + shifted(total, steps, factor)
        steps, factor = 2 * steps, factor * factor
    return total if padding is None else total.masked_fill(padding, 0.0)


def add_momentum(
    out: Tensor,
    value: Tensor,
    eta: float,
    *,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention output plus momentum, each query head with the values of its own key-value head.

    Args:
        out: `(B, H_q, R, D)`, of the last R of N tokens.
        value: `(B, H_kv, N, D)`, H_q a multiple of H_kv.
        eta, seq_lens, seq_starts, cu_seqlens: as for :func:`momentum_values`.

    Returns:
        `(B, H_q, R, D)` in the dtype of `out`.

    Raises:
        ValueError: as there.
    """
    sums = momentum_values(value, eta, seq_lens=seq_lens, seq_starts=seq_starts, cu_seqlens=cu_seqlens)
    sums = sums[:, :, value.shape[2] - out.shape[2] :]
    return (out.unflatten(1, (value.shape[1], -1)) + sums[:, :, None]).flatten(1, 2).to(out.dtype)
