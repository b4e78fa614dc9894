"""The `torch` backend: rows of scores recomputed a few at a time, forward and backward, in plain PyTorch.

Works on every device and dtype with every feature, and holds no N × N tensor. Where PyTorch's own attention can
give the output (`abft_kernels.sdpa`), only the masses are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from abft_kernels.merging import sink_gradient
from abft_kernels.philox import dropout_keep
from abft_kernels.spec import Extras, Options
from abft_kernels.unpacking import Padded, padded

# Scores held at once; it only trades time for memory.
_SCORE_ELEMENTS = 1 << 24
_ABSENT = -(1 << 62)  # position of an absent row


class _Piece(NamedTuple):
    """Some rows of some samples, and the keys that they can see; `low … high − 1` are those of each row."""

    batch: slice
    key_batch: slice
    rows: slice
    keys: slice
    low: Tensor  # (b, r)
    high: Tensor  # (b, r)


class _Rows:
    """Scores of a few rows at a time, `(b, H_kv, group, r, keys)`.

    Absent rows and keys outside the sequences are read as 0, so that what stands there, NaN too, has no effect.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        positions: Tensor,
        extras: Extras,
        options: Options,
        along_keys: bool,
    ):
        self.along_keys = along_keys  # packed sequences: queries too, and not a batch of them
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.extras, self.options = q, extras, options
        self.batch, self.heads, self.num_rows, self.head_dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1], k.shape[2]
        self.group = self.heads // self.kv_heads
        self.positions = positions
        self.on_cpu = positions.device.type == "cpu"
        own = None if extras.ends is None or options.packed else self._own_keys()
        self.k = k if own is None else k.masked_fill(own, 0.0)
        self.v = v if own is None or v is None else v.masked_fill(own, 0.0)
        self.weights = None
        if options.num_groups:
            self.weights = self._weights() if own is None else self._weights().masked_fill(own[:, 0], 0.0)

    def _own_keys(self) -> Tensor:
        """`(B, 1, N, 1)` bool: keys that belong to no sequence."""
        keys = torch.arange(self.num_keys, device=self.q.device)
        start, end = self._bounds(slice(None))
        return ((keys < start[:, None]) | (keys >= end[:, None]))[:, None, :, None]

    def _weights(self) -> Tensor:
        """w_jg, `(B, N, G)`."""
        if self.extras.weights is not None:
            return self.extras.weights.detach().to(self.dtype)
        groups = self.extras.groups
        assert groups is not None
        index = torch.arange(self.options.num_groups, device=groups.device, dtype=groups.dtype)
        return (groups[:, :, None] == index).to(self.dtype)

    def _bounds(self, sequences: slice) -> tuple[Tensor, Tensor]:
        count = self.batch if self.extras.ends is None else self.extras.ends.shape[0]
        zeros = torch.zeros(count, dtype=torch.int64, device=self.q.device)
        start = zeros if self.extras.starts is None else self.extras.starts.long()
        end = zeros + self.num_keys if self.extras.ends is None else self.extras.ends.long()
        return start[sequences], end[sequences]

    def _sources(self) -> Iterator[tuple[slice, slice, slice, slice, slice]]:
        """Sequences, samples of q and of k, rows and keys that belong together."""
        everything = slice(0, self.num_rows)
        keys = slice(0, self.num_keys)
        if not self.options.packed:
            yield slice(None), slice(None), slice(None), everything, keys
            return
        starts, ends = (x.tolist() for x in self._bounds(slice(None)))
        for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end <= start:
                continue
            one = slice(s, s + 1)
            if self.along_keys:
                yield one, slice(0, 1), slice(0, 1), slice(start, end), slice(start, end)
            else:
                yield one, one, slice(0, 1), everything, slice(start, end)

    def pieces(self) -> Iterator[_Piece]:
        for sequences, batch, key_batch, rows, keys in self._sources():
            start, end = self._bounds(sequences)
            samples = len(range(self.batch)[batch])
            step = max(1, _SCORE_ELEMENTS // max(1, samples * self.heads * (keys.stop - keys.start)))
            for first in range(rows.start, rows.stop, step):
                chunk = slice(first, min(first + step, rows.stop))
                position = self.positions[batch, chunk].long()
                low, high = start[:, None].expand_as(position), end[:, None].expand_as(position)
                absent = position == _ABSENT
                if self.extras.ends is not None:
                    absent = absent | (position < low) | (position >= high)
                if self.options.causal:
                    high = torch.minimum(high, position + 1)
                if self.options.window:
                    low = torch.maximum(low, position - self.options.window + 1)
                low, high = low.clamp(min=0), high.clamp(max=self.num_keys).masked_fill(absent, 0)
                yield _Piece(batch, key_batch, chunk, self._reach(keys, low, high), low, high)

    def _reach(self, keys: slice, low: Tensor, high: Tensor) -> slice:
        # Only where reading the bounds does not stall a GPU stream.
        if not self.on_cpu or low.numel() == 0:
            return keys
        some = low < high
        first = int(torch.where(some, low, keys.stop).amin())
        last = int(torch.where(some, high, keys.start).amax())
        first = min(max(first, keys.start), keys.stop - 1)
        return slice(first, max(last, first + 1))

    def rows_of(self, x: Tensor, piece: _Piece) -> Tensor:
        """`(B, H, R, …)` → `(b, H_kv, group·r, …)`: the rows of one piece, in the accumulation dtype."""
        x = x[piece.batch, :, piece.rows].to(self.dtype)
        return x.reshape(x.shape[0], self.kv_heads, self.group * x.shape[2], *x.shape[3:])

    def queries(self, piece: _Piece) -> Tensor:
        q = self.q[piece.batch, :, piece.rows].masked_fill((piece.low >= piece.high)[:, None, :, None], 0.0)
        return q.to(self.dtype).reshape(q.shape[0], self.kv_heads, -1, self.head_dim)

    def keys_of(self, x: Tensor, piece: _Piece) -> Tensor:
        return x[piece.key_batch, :, piece.keys].to(self.dtype)

    def scores(self, q: Tensor, k: Tensor, piece: _Piece) -> tuple[Tensor, Tensor | None]:
        """Masked scores `(b, H_kv, group·r, keys)`, and the tanh of the soft cap."""
        scores = (q @ k.transpose(-1, -2)).mul_(self.options.scale)
        capped = None
        if self.options.softcap:
            capped = torch.tanh(scores / self.options.softcap)
            scores = capped * self.options.softcap
        index = torch.arange(piece.keys.start, piece.keys.stop, device=scores.device)
        spread = scores.view(scores.shape[0], self.kv_heads, self.group, -1, scores.shape[-1])
        if self.extras.slopes is not None:
            slopes = self.extras.slopes[piece.batch].to(self.dtype).view(-1, self.kv_heads, self.group, 1, 1)
            position = self.positions[piece.batch, piece.rows].long()
            spread -= slopes * (position[..., None] - index).abs()[:, None, None]
        hidden = (index < piece.low[..., None]) | (index >= piece.high[..., None])
        return spread.masked_fill_(hidden[:, None, None], float("-inf")).view_as(scores), capped

    def lse(self, scores: Tensor) -> Tensor:
        lse = torch.logsumexp(scores, dim=-1)
        if self.extras.sinks is None:
            return lse
        sinks = self.extras.sinks.detach().to(self.dtype).view(1, self.kv_heads, self.group, 1)
        spread = lse.view(lse.shape[0], self.kv_heads, self.group, -1)
        return torch.where(spread > float("-inf"), torch.logaddexp(spread, sinks), spread).view_as(lse)

    def keep(self, piece: _Piece) -> Tensor | None:
        """Dropout's factors `(b, H_kv, group·r, keys)`, or None."""
        p = self.options.dropout_p
        if not p:
            return None
        device = self.q.device
        samples = torch.arange(self.batch, device=device)[piece.batch]
        streams = samples[:, None] * self.heads + torch.arange(self.heads, device=device)
        rows = torch.arange(piece.rows.start, piece.rows.stop, device=device)[:, None]
        keys = torch.arange(piece.keys.start, piece.keys.stop, device=device)
        keep = dropout_keep(self.options.seed, p, streams[:, :, None, None], rows, keys).to(self.dtype) / (1 - p)
        return keep.view(len(samples), self.kv_heads, -1, len(keys))

    def unpack(self, x: Tensor) -> Tensor:
        """`(b, H_kv, group·r, …)` → `(b, H, r, …)`."""
        return x.reshape(x.shape[0], self.heads, x.shape[2] // self.group, *x.shape[3:])


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, extras: Extras, options: Options, along_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(q, k, v, positions, extras, options, along_keys)
    batch, heads, n_q, _ = q.shape
    # Rows in no piece, those behind packed sequences, stay as they are filled here.
    out = q.new_zeros((batch, n_q, heads, 0 if v is None else v.shape[3])).transpose(1, 2)
    mass = q.new_zeros((batch, heads, n_q, options.num_groups), dtype=rows.dtype)
    lse = q.new_full((batch, heads, n_q), float("-inf"), dtype=rows.dtype)
    if k.shape[2] == 0 or batch == 0:
        return out, mass, lse
    for piece in rows.pieces():
        scores, _ = rows.scores(rows.queries(piece), rows.keys_of(rows.k, piece), piece)
        piece_lse = rows.lse(scores)
        finite = piece_lse.masked_fill(piece_lse == float("-inf"), 0.0)
        probabilities = scores.sub_(finite[..., None]).exp_()
        lse[piece.batch, :, piece.rows] = rows.unpack(piece_lse)
        if rows.weights is not None:
            weights = rows.weights[piece.key_batch, piece.keys][:, None]
            mass[piece.batch, :, piece.rows] = rows.unpack(probabilities @ weights)
        if rows.v is not None:
            if (keep := rows.keep(piece)) is not None:
                probabilities = probabilities.mul_(keep)
            values = probabilities @ rows.keys_of(rows.v, piece)
            out[piece.batch, :, piece.rows] = rows.unpack(values).to(out.dtype)
    if extras.row_mask is not None:
        mass = mass.masked_fill_(extras.row_mask[:, None, :, None] == 0, 0.0)
    return out, mass, lse


def _backward(
    do: Tensor | None,
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    extras: Extras,
    out: Tensor | None,
    mass: Tensor,
    lse: Tensor,
    options: Options,
    weights_wanted: bool,
    along_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dS = P·(Z dO·V + Σ_g dmass_g w_g − δ)·(1 − tanh²), δ = Σ dO·O + Σ_g dmass_g mass_g − dlse."""
    rows = _Rows(q, k, v, positions, extras, options, along_keys)
    if rows.weights is None:
        dmass = None
    do = do if v is not None and out is not None else None
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=rows.dtype, device=k.device)
    dv = torch.zeros(v.shape if v is not None and do is not None else (0,), dtype=rows.dtype, device=k.device)
    want_dw = weights_wanted and extras.weights is not None and dmass is not None
    dw = torch.zeros(rows.weights.shape if want_dw and rows.weights is not None else (0,), dtype=rows.dtype,
                     device=k.device)  # fmt: skip
    dsinks = torch.zeros(0, dtype=rows.dtype, device=k.device)
    absent = lse == float("-inf")
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    if dmass is not None:
        unwanted = absent if extras.row_mask is None else absent | (extras.row_mask[:, None] == 0)
        dmass = dmass.masked_fill(unwanted[..., None], 0.0)
        delta = delta + (dmass * mass).sum(-1)
    if do is not None and out is not None:
        do = do.masked_fill(absent[..., None], 0.0)
        delta = delta + (do.to(rows.dtype) * out.to(rows.dtype)).sum(-1)
    delta = delta.masked_fill(absent, 0.0)
    if extras.sinks is not None:
        dsinks = sink_gradient(extras.sinks, lse, delta)
    for piece in rows.pieces() if k.shape[2] and q.shape[0] else ():
        queries, keys = rows.queries(piece), rows.keys_of(rows.k, piece)
        piece_lse = rows.rows_of(lse, piece)
        scores, capped = rows.scores(queries, keys, piece)
        p = scores.sub_(piece_lse.masked_fill(piece_lse == float("-inf"), 0.0)[..., None]).exp_()
        slope = -rows.rows_of(delta, piece)[..., None]
        if dmass is not None and rows.weights is not None:
            piece_dmass = rows.rows_of(dmass, piece)
            slope = slope + piece_dmass @ rows.weights[piece.key_batch, piece.keys].transpose(-1, -2)[:, None]
            if want_dw:
                dw[piece.key_batch, piece.keys] += (p.transpose(-1, -2) @ piece_dmass).sum(1)
        if do is not None and rows.v is not None:
            piece_do, keep = rows.rows_of(do, piece), rows.keep(piece)
            dp = piece_do @ rows.keys_of(rows.v, piece).transpose(-1, -2)
            kept = p
            if keep is not None:
                kept, dp = p * keep, dp.mul_(keep)
            _add(dv, piece, kept.transpose(-1, -2) @ piece_do)
            slope = slope + dp
        ds = p * slope if capped is None else p * slope * (1 - capped.square())
        dq[piece.batch, :, piece.rows] = rows.unpack((ds @ keys) * options.scale).to(dq.dtype)
        _add(dk, piece, (ds.transpose(-1, -2) @ queries) * options.scale)
    return dq, dk.to(k.dtype), dv.to(q.dtype), dw, dsinks


def _add(total: Tensor, piece: _Piece, part: Tensor) -> None:
    total[piece.key_batch, :, piece.keys] += part


def _from_key_0(positions: Tensor, options: Options) -> Tensor:
    positions = positions.long()
    return torch.where(positions < 0, _ABSENT, positions - options.offset)


def _as_batch(
    k: Tensor, positions: Tensor, extras: Extras, options: Options
) -> tuple[Padded, Tensor, Tensor, Extras, Options] | None:
    """Packed sequences as a padded batch of keys, positions counted in it; None where the loop is better."""
    if not options.packed or extras.starts is None or extras.ends is None:
        return None
    batch = padded(extras.starts, extras.ends, k.shape[2])
    if batch is None:
        return None
    inside = (positions >= extras.starts[:, None]) & (positions < extras.ends[:, None])
    positions = torch.where(inside, positions - extras.starts[:, None], _ABSENT)
    extras = extras._replace(
        groups=None if extras.groups is None else batch.spread_keys(extras.groups, -1),
        weights=None if extras.weights is None else batch.spread_keys(extras.weights, 0.0),
        starts=None, ends=batch.lengths,
    )  # fmt: skip
    return batch, batch.spread(k), positions, extras, options._replace(packed=False)


def row_mass_forward(
    q: Tensor, k: Tensor, positions: Tensor, extras: Extras, options: Options
) -> tuple[Tensor, Tensor]:
    """Mass `(S, H, R, G)` and natural-log LSE `(S, H, R)` of the rows, float32 (float64 for float64)."""
    positions = _from_key_0(positions, options)
    if (batch := _as_batch(k, positions, extras, options)) is not None:
        _, k, positions, extras, options = batch
    return _forward(q, k, None, positions, extras, options, False)[1:]


def row_mass_backward(
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    extras: Extras,
    mass: Tensor,
    lse: Tensor,
    options: Options,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq `(S, H, R, D)`, dk `(B, H_kv, N, D)`, dweights and dsinks."""
    positions, length = _from_key_0(positions, options), k.shape[2]
    if (batch := _as_batch(k, positions, extras, options)) is not None:
        _, k, positions, extras, options = batch
    dq, dk, _, dw, dsinks = _backward(
        None, dmass, dlse, q, k, None, positions, extras, None, mass, lse, options, weights_wanted, False
    )
    if batch is not None:
        dk = batch[0].join(dk, length)
        dw = batch[0].join(dw, length) if dw.numel() else dw
    return dq, dk, dw, dsinks


def _all_positions(q: Tensor, options: Options) -> Tensor:
    return (torch.arange(q.shape[2], device=q.device) + options.offset).expand(q.shape[0], -1)


def mass_attention_forward(
    q: Tensor, k: Tensor, v: Tensor | None, extras: Extras, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(B, H, N_q, D_v)` (empty without v), mass and LSE of every row."""
    return _forward(q, k, v, _all_positions(q, options), extras, options, True)


def mass_attention_backward(
    do: Tensor | None,
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    extras: Extras,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    options: Options,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dweights and dsinks; arguments as in `abft_kernels.ops.mass_attention_backward_op`."""
    positions = _all_positions(q, options)
    return _backward(do, dmass, dlse, q, k, v, positions, extras, out, mass, lse, options, weights_wanted, True)
