"""Momentum attention (Dai et al., arXiv 2212.10559, section 5): attention plus an exponential sum of earlier values.

If attention over demonstrations is gradient descent, then an average over its steps is a sum over values:
`MoAttn(q_t) = Attn(q_t) + m_t`, `m_t = Σ_{i<t} η^{t−i} v_i`. Let `m_t(s)` be the last s terms. Then
`m_t(1) = η v_{t−1}` and `m_t(2s) = m_t(s) + η^s m_{t−s}(s)`: log₂ N steps over the values, and no N × N tensor.
A sliding window bounds the attention, not this sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft.models.bounds import Bounds

__all__ = ["add_momentum", "check_momentum", "momentum_values"]

_WHOLE = Bounds()


def check_momentum(eta: float) -> None:
    """Raise a ValueError unless η lies between 0 and 1."""
    if not 0 < eta < 1:
        raise ValueError(f"momentum must lie between 0 and 1, got {eta}; leave it out (None) for plain attention")


def momentum_values(value: Tensor, eta: float, bounds: Bounds = _WHOLE) -> Tensor:
    """Return the sums `Σ_{i<t} η^{t−i} v_i` over the earlier tokens of t's own sequence, for every t.

    Args:
        value: `(B, H, N, D)`, floating point.
        eta: η, between 0 and 1.
        bounds: where the sequences are. Padding adds nothing and gets 0; a window does not bound the sum.

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
    if (tokens := bounds.tokens(length)) is not None:
        padding = ~tokens[:, None, :, None]
        value = value.masked_fill(padding, 0.0)
    if bounds.cu_seqlens is not None:
        sequence = torch.searchsorted(bounds.cu_seqlens, positions.to(bounds.cu_seqlens.dtype), right=True) - 1
        starts = bounds.cu_seqlens[sequence]

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


def add_momentum(out: Tensor, value: Tensor, eta: float, bounds: Bounds = _WHOLE) -> Tensor:
    """Return attention output plus momentum, each query head with the values of its own key-value head.

    Args:
        out: `(B, H_q, R, D)`, of the last R of N tokens.
        value: `(B, H_kv, N, D)`, H_q a multiple of H_kv.
        eta, bounds: as for :func:`momentum_values`.

    Returns:
        `(B, H_q, R, D)` in the dtype of `out`.

    Raises:
        ValueError: as there.
    """
    sums = momentum_values(value, eta, bounds)[:, :, value.shape[2] - out.shape[2] :]
    return (out.unflatten(1, (value.shape[1], -1)) + sums[:, :, None]).flatten(1, 2).to(out.dtype)
