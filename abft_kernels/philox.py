"""Dropout's random bits in plain PyTorch: Philox-4x32-10, as Triton's `tl.philox` gives them.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter of an element is
(key, row, sample · heads + head, 0) and the key is the seed, so the mask depends on no tile and no backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_keep"]

_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for 32-bit values in int64, whose own product would overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle << 16) | (low & 0xFFFF)) & _MASK


def dropout_keep(seed: int, dropout_p: float, streams: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Bool mask of the probabilities to keep, over the broadcast of int64 `streams`, `rows` and `keys`."""
    c0, c1, c2 = (x.long() for x in torch.broadcast_tensors(keys, rows, streams))
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return (c0 >> 1) >= int(dropout_p * (1 << 31))
