"""Masked scores of a few rows at a time, and what else both passes need of their rows and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.philox import dropout_keep
from abft_kernels.pytorch.intervals import ABSENT, Interval, key_interval

__all__ = ["ABSENT", "Piece", "Scores"]

# Scores of one step of rows; it only trades time for memory.
_SCORE_ELEMENTS = 1 << 24
# On a CPU the samples of a step are taken a few at a time, so that their scores stay in the cache.
_CACHED_ELEMENTS = 1 << 18


class Piece(NamedTuple):
    """Some rows of some samples, and the keys that they can see."""

    samples: slice
    key_samples: slice
    rows: slice
    keys: slice
    interval: Interval
    absent: Tensor | None  # (b, r) bool; None: no row is
    hides: bool  # some row does not see all of `keys`


def _part(x: Tensor, samples: slice, rows: slice) -> Tensor:
    """Return `x[samples, :, rows]`, without the cost of slicing where that is all of x."""
    if samples.start == rows.start == 0 and (samples.stop, rows.stop) == (x.shape[0], x.shape[2]):
        return x
    return x[samples, :, rows]


class Scores:
    """Scores of a few rows at a time, `(b, H_kv, group, r, keys)`.

    Absent rows and keys outside the sequences are masked or read as 0: what stands there, NaN too, has no effect.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, call: Call, all_rows: bool):
        self.q, self.call, self.positions = q, call, positions
        self.all_rows = all_rows  # packed sequences: queries too, and not a batch of them
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.batch, self.heads, self.num_rows, self.head_dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1], k.shape[2]
        self.group = self.heads // self.kv_heads
        self.on_cpu = q.device.type == "cpu"
        self._outside = None if call.ends is None or call.packed else self._keys_outside()
        self.k = k if k.is_contiguous() else self.clean(k)  # a contiguous copy helps the product
        self.v = None if v is None else self.clean(v)
        self.weights = self._weights() if call.num_groups else None
        if self._outside is not None and self.weights is not None:
            self.weights = self.weights.masked_fill(self._outside[:, 0], 0.0)

    def clean(self, x: Tensor) -> Tensor:
        """Return k or v with 0 at keys outside the sequences. Scores need no clean k, they are masked themselves."""
        return x if self._outside is None else x.masked_fill(self._outside, 0.0)

    def _keys_outside(self) -> Tensor | None:
        """Return `(B, 1, N, 1)` bool: keys that belong to no sequence; None if there are none."""
        keys = torch.arange(self.num_keys, device=self.q.device)
        start, end = self._bounds()
        assert end is not None
        outside = keys >= end if start is None else (keys < start) | (keys >= end)
        return outside[:, None, :, None] if not self.on_cpu or outside.any() else None

    def _weights(self) -> Tensor:
        """Return w_jg, `(B, N, G)`."""
        if self.call.weights is not None:
            return self.call.weights.detach().to(self.dtype)
        groups = self.call.groups
        assert groups is not None
        index = torch.arange(self.call.num_groups, device=groups.device, dtype=groups.dtype)
        return (groups[:, :, None] == index).to(self.dtype)

    def _bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """Return start and end of each sequence, `(S, 1)` int64; None: the first key, and one after the last."""
        starts, ends = self.call.starts, self.call.ends
        return (
            None if starts is None else starts.long()[:, None],
            None if ends is None else ends.long()[:, None],
        )

    def pieces(self) -> Iterator[Piece]:
        """Yield pieces that cover every row of a sequence once."""
        if not self.batch or not self.num_keys:
            return
        everything, keys = slice(0, self.num_rows), slice(0, self.num_keys)
        start, end = self._bounds()
        if not self.call.packed:
            interval = key_interval(self.positions, self.call, self.num_keys, start, end)
            yield from self._steps(interval, slice(0, self.batch), None, everything, keys)
            return
        assert start is not None
        assert end is not None
        for s, (low, high) in enumerate(zip(start[:, 0].tolist(), end[:, 0].tolist(), strict=True)):
            if high <= low:
                continue
            own, one = slice(low, high), slice(s, s + 1)
            samples, rows = (slice(0, 1), own) if self.all_rows else (one, everything)
            interval = key_interval(self.positions[samples, rows], self.call, self.num_keys, start[one], end[one])
            yield from self._steps(interval, samples, slice(0, 1), rows, own)

    def _steps(
        self, interval: Interval, samples: slice, key_samples: slice | None, rows: slice, keys: slice
    ) -> Iterator[Piece]:
        """Cut the rows and then the samples of one `interval`; `key_samples` None: those of the rows."""
        count = samples.stop - samples.start
        per_row = max(1, self.heads * (keys.stop - keys.start))
        step = max(1, _SCORE_ELEMENTS // max(1, count * per_row))
        for first in range(rows.start, rows.stop, step):
            chunk = slice(first, min(first + step, rows.stop))
            here = slice(chunk.start - rows.start, chunk.stop - rows.start)
            part = interval if chunk == rows else interval.select(slice(None), here)
            reach, absent, hides = part.survey(keys)
            some = max(1, _CACHED_ELEMENTS // (per_row * (chunk.stop - first))) if self.on_cpu else count
            for low in range(0, count, some):
                own = slice(samples.start + low, min(samples.start + low + some, samples.stop))
                mine = part if some >= count else part.select(slice(low, low + some), slice(None))
                yield Piece(own, key_samples or own, chunk, reach, mine, mine.absent() if absent else None, hides)

    def rows_of(self, x: Tensor, piece: Piece) -> Tensor:
        """`(B, H, R, …)` → `(b, H_kv, group·r, …)`: the rows of one piece, in the accumulation dtype."""
        x = _part(x, piece.samples, piece.rows).to(self.dtype)
        return x.reshape(x.shape[0], self.kv_heads, self.group * x.shape[2], *x.shape[3:])

    def queries(self, piece: Piece) -> Tensor:
        q = _part(self.q, piece.samples, piece.rows)
        if piece.absent is not None:
            q = q.masked_fill(piece.absent[:, None, :, None], 0.0)
        return q.to(self.dtype).reshape(q.shape[0], self.kv_heads, -1, self.head_dim)

    def keys_of(self, x: Tensor, piece: Piece) -> Tensor:
        return _part(x, piece.key_samples, piece.keys).to(self.dtype)

    def weights_of(self, piece: Piece) -> Tensor | None:
        return None if self.weights is None else self.weights[piece.key_samples, piece.keys][:, None]

    def scores(self, q: Tensor, k: Tensor, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """Return masked scores `(b, H_kv, group·r, keys)`, and the tanh of the soft cap."""
        scores = (q @ k.transpose(-1, -2)).mul_(self.call.scale)
        capped = None
        if self.call.softcap:
            capped = torch.tanh(scores / self.call.softcap)
            scores = capped * self.call.softcap
        spread = scores.view(scores.shape[0], self.kv_heads, self.group, -1, scores.shape[-1])
        if self.call.slopes is not None:
            slopes = self.call.slopes[piece.samples].to(self.dtype).view(-1, self.kv_heads, self.group, 1, 1)
            position = self.positions[piece.samples, piece.rows]
            index = torch.arange(piece.keys.start, piece.keys.stop, device=scores.device)
            spread -= slopes * (position[..., None] - index).abs()[:, None, None]
        hidden = piece.interval.hidden(piece.keys) if piece.hides else None
        if hidden is not None:
            spread.masked_fill_(hidden[:, None, None], float("-inf"))
        return scores, capped

    def lse(self, scores: Tensor) -> Tensor:
        lse = torch.logsumexp(scores, dim=-1)
        if self.call.sinks is None:
            return lse
        sinks = self.call.sinks.detach().to(self.dtype).view(1, self.kv_heads, self.group, 1)
        spread = lse.view(lse.shape[0], self.kv_heads, self.group, -1)
        return torch.where(spread > float("-inf"), torch.logaddexp(spread, sinks), spread).view_as(lse)

    def keep(self, piece: Piece) -> Tensor | None:
        """Return dropout's factors `(b, H_kv, group·r, keys)`, or None."""
        p = self.call.dropout_p
        if not p:
            return None
        device = self.q.device
        samples = torch.arange(piece.samples.start, piece.samples.stop, device=device)
        streams = samples[:, None] * self.heads + torch.arange(self.heads, device=device)
        rows = torch.arange(piece.rows.start, piece.rows.stop, device=device)[:, None]
        keys = torch.arange(piece.keys.start, piece.keys.stop, device=device)
        keep = dropout_keep(self.call.seed, p, streams[:, :, None, None], rows, keys).to(self.dtype) / (1 - p)
        return keep.view(len(samples), self.kv_heads, -1, len(keys))

    def unpack(self, x: Tensor) -> Tensor:
        """`(b, H_kv, group·r, …)` → `(b, H, r, …)`."""
        return x.reshape(x.shape[0], self.heads, x.shape[2] // self.group, *x.shape[3:])
