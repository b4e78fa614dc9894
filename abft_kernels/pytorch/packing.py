"""Packed sequences as a padded batch, where that costs little: one batched product in place of a loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Padded", "padded"]

# A padded batch may hold this many times the packed tokens.
_MOST_PADDING = 2


class Padded(NamedTuple):
    """S sequences of at most L tokens out of N packed ones."""

    tokens: Tensor  # (S, L) int64: the packed token of each place; some token at padding
    valid: Tensor  # (S, L) bool
    lengths: Tensor  # (S,) int32

    def spread(self, x: Tensor) -> Tensor:
        """`(1, H, N, D)` → `(S, H, L, D)`, 0 at padding."""
        x = x[0][:, self.tokens].transpose(0, 1)
        return x.masked_fill(~self.valid[:, None, :, None], 0.0)

    def spread_keys(self, x: Tensor, fill: float) -> Tensor:
        """`(1, N, …)` → `(S, L, …)`."""
        x = x[0][self.tokens]
        return x.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 2)), fill)

    def join(self, x: Tensor, length: int) -> Tensor:
        """`(S, H, L, D)` → `(1, H, N, D)`, 0 at tokens of no sequence; `(S, L, D)` → `(1, N, D)`."""
        x = x.transpose(1, 2) if x.dim() == 4 else x
        whole = x.new_zeros(length, *x.shape[2:])
        whole = whole.index_copy(0, self.tokens[self.valid], x[self.valid])
        return (whole.transpose(0, 1).contiguous() if x.dim() == 4 else whole)[None]


def padded(starts: Tensor, ends: Tensor, length: int) -> Padded | None:
    """Return the padded batch of sequences `starts … ends − 1` of `length` tokens; None if mostly padding, or one."""
    lengths = ends.long() - starts.long()
    longest = int(lengths.amax()) if lengths.numel() else 0
    if lengths.numel() < 2 or longest == 0 or longest * lengths.numel() > _MOST_PADDING * length:
        return None
    places = torch.arange(longest, device=starts.device)
    index = (starts.long()[:, None] + places).clamp(max=length - 1)
    return Padded(index, places < lengths[:, None], lengths.to(torch.int32))
