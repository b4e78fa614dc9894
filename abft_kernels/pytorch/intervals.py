"""The keys that a row may see: one interval for each row, computed here and nowhere else in this backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abft_kernels.call import Call

__all__ = ["ABSENT", "Interval", "key_interval"]

ABSENT = -(1 << 62)  # position of an absent row


class Interval(NamedTuple):
    """Each row sees keys `low … high − 1`; an absent row has `low ≥ high`."""

    low: Tensor | None  # (b, r) int64; None: every row sees from the first key on
    high: Tensor | None  # (b, r) int64; None: every row sees all keys

    def select(self, samples: slice, rows: slice) -> Interval:
        return Interval(*(None if x is None else x[samples, rows] for x in self))

    def hidden(self, keys: slice) -> Tensor | None:
        """Return a bool mask `(b, r, keys)` of the keys to hide; None: no key."""
        if self.high is None:
            return None
        index = torch.arange(keys.start, keys.stop, device=self.high.device)
        after = index >= self.high[..., None]
        return after if self.low is None else after | (index < self.low[..., None])

    def absent(self) -> Tensor | None:
        """Return a bool mask `(b, r)` of the rows that see no key; None: every row sees one."""
        if self.high is None:
            return None
        empty = self.high <= (0 if self.low is None else self.low)
        # Reading a value stalls the stream of a GPU.
        return empty if empty.device.type != "cpu" or empty.any() else None

    def reach(self, keys: slice) -> slice:
        """Return the part of `keys`, not empty, that some row sees; `keys` itself where reading bounds costs much."""
        if self.high is None or self.high.device.type != "cpu" or self.high.numel() == 0:
            return keys
        if self.low is None:
            return slice(keys.start, max(int(self.high.amax()), keys.start + 1))
        some = self.low < self.high
        first = int(torch.where(some, self.low, keys.stop).amin())
        last = int(torch.where(some, self.high, keys.start).amax())
        first = min(max(first, keys.start), keys.stop - 1)
        return slice(first, max(last, first + 1))


def key_interval(positions: Tensor, call: Call, n_k: int, start: Tensor | None, end: Tensor | int) -> Interval:
    """Return the interval of each row at `positions` `(b, r)`, `ABSENT` or counted from key 0.

    Its sequence holds keys `start … end − 1`, `(b, 1)` or one number; `start` None: no key before is in question.
    """
    low, high = start, torch.as_tensor(end, device=positions.device)
    if call.causal:
        high = torch.minimum(high, positions + 1)
    if call.window:
        first = positions - (call.window - 1)
        low = first if low is None else torch.maximum(low, first)
    outside = positions == ABSENT
    if call.ends is not None:
        outside = outside | (positions >= end)
        outside = outside | (positions < (0 if start is None else start))
    # Bounds of a shard's sequences reach beyond its keys.
    high = high.clamp(max=n_k).masked_fill(outside, 0)
    return Interval(None if low is None else low.clamp(min=0).expand_as(positions), high)
