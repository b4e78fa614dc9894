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
        return None if self.high is None else self.high <= (0 if self.low is None else self.low)

    def survey(self, keys: slice) -> tuple[slice, bool, bool]:
        """Return the part of `keys`, not empty, that some row sees, and whether some row is absent, or sees less.

        Reading bounds would stall the stream of a GPU: there all keys, True and True stand for unknown.
        """
        if self.high is None:
            return keys, False, False
        if self.high.device.type != "cpu" or self.high.numel() == 0:
            return keys, True, True
        if self.low is None:
            least, most = (int(x) for x in self.high.aminmax())
            reach = slice(keys.start, max(most, keys.start + 1))
            return reach, least <= 0, least < reach.stop
        some = self.low < self.high
        first = int(torch.where(some, self.low, keys.stop).amin())
        last = int(torch.where(some, self.high, keys.start).amax())
        first = min(max(first, keys.start), keys.stop - 1)
        return slice(first, max(last, first + 1)), not bool(some.all()), True


def key_interval(positions: Tensor, call: Call, n_k: int, start: Tensor | None, end: Tensor | None) -> Interval:
    """Return the interval of each row at `positions` `(b, r)`, counted from key 0; before key 0 may mean absent.

    Its sequence holds keys `start … end − 1`, `(b, 1)`; None: the first key, and one after the last.
    """
    if end is None:
        # Under the causal mask an absent row has no key before it.
        high = (positions + 1).clamp_(0, n_k) if call.causal else torch.where(positions == ABSENT, 0, n_k)
    else:
        high = torch.minimum(end, positions + 1) if call.causal else end
        outside = (positions < (0 if start is None else start)) | (positions >= end)
        # Bounds of a shard's sequences reach beyond its keys.
        high = high.clamp(max=n_k).masked_fill(outside, 0)
    low = start
    if call.reach.window:
        first = positions - (call.reach.window - 1)
        low = first if low is None else torch.maximum(low, first)
    if call.reach.chunk:
        first = positions - (positions if start is None else positions - start) % call.reach.chunk
        low = first if low is None else torch.maximum(low, first)
    return Interval(None if low is None else low.clamp(min=0).expand_as(positions), high)
