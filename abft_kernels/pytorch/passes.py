"""Forward and backward pass in plain PyTorch: rows of scores are recomputed a few at a time.

Works on every device and dtype with every feature, and holds no N × N tensor. Where PyTorch's own attention can
give the output (`abft_kernels.pytorch.sdpa`), only the masses are computed here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft_kernels.call import Call, Gradients
from abft_kernels.merging import sink_gradient
from abft_kernels.pytorch.packing import Padded, padded
from abft_kernels.pytorch.scores import ABSENT, Scores
from abft_kernels.reference import gather_rows

__all__ = ["backward", "forward", "row_backward", "row_forward"]


def forward(q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return output `(B, H, N_q, D_v)` (empty without v), mass and LSE of every row."""
    batch, heads, n_q, _ = q.shape
    out = q.new_zeros((batch, n_q, heads, 0 if v is None else v.shape[3])).transpose(1, 2)
    return out, *_forward(Scores(q, k, v, _all_positions(q, call), call, True), out)


def row_forward(q: Tensor, k: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return mass `(S, H, R, G)` and natural-log LSE `(S, H, R)` of the rows, float32 (float64 for float64)."""
    q, positions, call = _rows_alone(q, positions, call)
    positions = _from_key_0(positions, call)
    if (batch := _as_batch(k, positions, call)) is not None:
        _, k, positions, call = batch
    return _forward(Scores(q, k, None, positions, call, False), None)


def backward(
    do: Tensor | None,
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    call: Call,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    weights_wanted: bool,
) -> Gradients:
    """Return the gradients; those that nothing asked for are empty."""
    rows = Scores(q, k, v, _all_positions(q, call), call, True)
    return _backward(rows, (do if v is not None else None, dmass, dlse), (out, mass, lse), weights_wanted)


def row_backward(
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    call: Call,
    mass: Tensor,
    lse: Tensor,
    weights_wanted: bool,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq in q's shape, dk `(B, H_kv, N, D)`, dweights and dsinks; the last two are empty if not wanted. With
    `into`, a dq and a dk, they are added to these in place."""
    queries, given, length = q, call, k.shape[2]
    q, chosen, call = _rows_alone(q, positions, call)
    positions = _from_key_0(chosen, call)
    if (batch := _as_batch(k, positions, call)) is not None:
        _, k, positions, call = batch
    rows = Scores(q, k, None, positions, call, False)
    dq, dk, _, dw, dsinks = _backward(rows, (None, dmass, dlse), (None, mass, lse), weights_wanted)
    if batch is not None:
        dk = batch[0].join(dk, length)
        dw = batch[0].join(dw, length) if dw.numel() else dw
    if into is not None:
        dk = into[1].add_(dk)
    if given.whole:
        dq = _put_rows(dq, chosen, given, into[0] if into is not None else queries.new_zeros(queries.shape))
    return dq, dk, dw, dsinks


def _rows_alone(q: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor, Call]:
    """Return the rows' queries `(S, H, R, D)`, their positions, negative without a query, and the call for them."""
    if not call.whole:
        return q, positions, call
    first = call.key_offset + call.row_offset
    positions = positions.long()
    here = (positions >= first) & (positions < first + q.shape[2])
    slopes = None if call.slopes is None else call.slopes.expand(positions.shape[0], -1)
    rows = q.new_zeros(positions.shape[0], q.shape[1], positions.shape[1], q.shape[3])
    if q.shape[2]:
        rows = gather_rows(q, positions, first)
    return rows, positions.masked_fill(~here, -1), call._replace(slopes=slopes, whole=False)


def _put_rows(rows: Tensor, positions: Tensor, call: Call, into: Tensor) -> Tensor:
    """Add rows `(S, H, R, D)` at `positions` to `into` `(B, H, N_q, D)`, in place."""
    index = positions - (call.key_offset + call.row_offset)
    rows = rows.masked_fill((positions < 0)[:, None, :, None], 0.0)
    if call.packed:
        into[0].index_add_(1, index.clamp(min=0).flatten(), rows.transpose(0, 1).flatten(1, 2))
        return into
    index = index.clamp(min=0)[:, None, :, None].expand(rows.shape)
    return into.scatter_add_(2, index, rows) if into.numel() else into


def _all_positions(q: Tensor, call: Call) -> Tensor:
    first = call.row_offset
    return torch.arange(first, first + q.shape[2], device=q.device).expand(q.shape[0], -1)


def _from_key_0(positions: Tensor, call: Call) -> Tensor:
    positions = positions.long()
    if not call.key_offset and (call.causal or call.ends is not None):
        return positions  # a row before key 0 sees no key in any case
    return torch.where(positions < 0, ABSENT, positions - call.key_offset)


def _as_batch(k: Tensor, positions: Tensor, call: Call) -> tuple[Padded, Tensor, Tensor, Call] | None:
    """Return packed sequences as a padded batch of keys, positions counted in it; None where the loop is better."""
    if not call.packed or call.starts is None or call.ends is None:
        return None
    batch = padded(call.starts, call.ends, k.shape[2])
    if batch is None:
        return None
    inside = (positions >= call.starts[:, None]) & (positions < call.ends[:, None])
    positions = torch.where(inside, positions - call.starts[:, None], ABSENT)
    call = call._replace(
        groups=None if call.groups is None else batch.spread_keys(call.groups, -1),
        weights=None if call.weights is None else batch.spread_keys(call.weights, 0.0),
        starts=None,
        ends=batch.lengths,
        packed=False,
    )
    return batch, batch.spread(k), positions, call


def _forward(rows: Scores, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mass and LSE; fill `out`, where values are given."""
    call, shape = rows.call, rows.q.shape[:3]
    # Rows in no piece, those after packed sequences, stay as they are filled here.
    mass = Total((*shape, call.num_groups), rows.dtype, rows.q.device)
    lse = Total(shape, rows.dtype, rows.q.device, float("-inf"))
    for piece in rows.pieces():
        place = (piece.samples, slice(None), piece.rows)
        scores, _ = rows.scores(rows.queries(piece), rows.keys_of(rows.k, piece), piece)
        piece_lse = rows.lse(scores)
        probabilities = _probabilities(scores, piece_lse)
        lse.put(place, rows.unpack(piece_lse))
        if (weights := rows.weights_of(piece)) is not None:
            mass.put(place, rows.unpack(probabilities @ weights))
        if out is not None and rows.v is not None:
            if (keep := rows.keep(piece)) is not None:
                probabilities = probabilities.mul_(keep)
            out[place] = rows.unpack(probabilities @ rows.keys_of(rows.v, piece)).to(out.dtype)
    if call.row_mask is not None:
        mass.value().masked_fill_(call.row_mask[:, None, :, None] == 0, 0.0)
    return mass.value(), lse.value()


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(scores − lse), 0 in rows without a key; overwrites `scores`."""
    return scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()


def _backward(
    rows: Scores,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor, Tensor],
    weights_wanted: bool,
) -> Gradients:
    """dS = P·(Z dO·V + Σ_g dmass_g w_g − δ)·(1 − tanh²), δ = Σ dO·O + Σ_g dmass_g mass_g − dlse."""
    call, lse = rows.call, results[2]
    do, dmass, delta = _row_terms(rows, incoming, results)
    device = lse.device
    dq, dk = Total(rows.q.shape, rows.q.dtype, device), Total(rows.k.shape, rows.dtype, device)
    dv = Total((0,) if do is None or rows.v is None else rows.v.shape, rows.dtype, device)
    want_dw = weights_wanted and call.weights is not None and dmass is not None
    dw = Total(call.weights.shape if want_dw and call.weights is not None else (0,), rows.dtype, device)
    k = rows.clean(rows.k)
    for piece in rows.pieces():
        queries, keys = rows.queries(piece), rows.keys_of(k, piece)
        of_keys = (piece.key_samples, slice(None), piece.keys)
        scores, capped = rows.scores(queries, keys, piece)
        p = _probabilities(scores, rows.rows_of(lse, piece))
        slope = rows.rows_of(delta, piece)[..., None]
        if dmass is not None and (weights := rows.weights_of(piece)) is not None:
            piece_dmass = rows.rows_of(dmass, piece)
            slope = (piece_dmass @ weights.transpose(-1, -2)).sub_(slope)
            if want_dw:
                dw.add((piece.key_samples, piece.keys), (p.transpose(-1, -2) @ piece_dmass).sum(1))
        else:
            slope = slope.neg()
        if do is not None and rows.v is not None:
            piece_do, keep = rows.rows_of(do, piece), rows.keep(piece)
            dp = piece_do @ rows.keys_of(rows.v, piece).transpose(-1, -2)
            kept = p
            if keep is not None:
                kept, dp = p * keep, dp.mul_(keep)
            dv.add(of_keys, kept.transpose(-1, -2) @ piece_do)
            slope = dp.add_(slope)
        ds = p.mul_(slope) if capped is None else p.mul_(slope).mul_(1 - capped.square())
        part = rows.unpack((ds @ keys).mul_(call.scale)).to(rows.q.dtype)
        dq.put((piece.samples, slice(None), piece.rows), part)
        part = (ds.transpose(-1, -2) @ queries).mul_(call.scale)
        dk.add(of_keys, part)
    dsinks = lse.new_zeros(0) if call.sinks is None else sink_gradient(call.sinks, lse, delta)
    return Gradients(dq.value(), dk.value().to(rows.k.dtype), dv.value().to(rows.q.dtype), dw.value(), dsinks)


def _row_terms(
    rows: Scores,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor, Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return dO and dmass with 0 in rows that do not count (None: absent), and δ `(B, H, R)`."""
    (do, dmass, dlse), (out, mass, lse) = incoming, results
    absent = lse == float("-inf")
    delta = None if dlse is None else -dlse
    if dmass is not None and rows.weights is not None:
        unwanted = absent if rows.call.row_mask is None else absent | (rows.call.row_mask[:, None] == 0)
        dmass = dmass.masked_fill(unwanted[..., None], 0.0)
        delta = _plus(delta, (dmass * mass).sum(-1))
    else:
        dmass = None
    if do is not None and out is not None:
        do = do.masked_fill(absent[..., None], 0.0)
        delta = _plus(delta, (do.to(rows.dtype) * out.to(rows.dtype)).sum(-1))
    return do, dmass, torch.zeros_like(lse) if delta is None else delta.masked_fill_(absent, 0.0)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


class Total:
    """A tensor made of the parts that pieces give; a part that is all of it is that tensor, without a copy."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: float = 0.0):
        self._shape, self._new = shape, (fill, dtype, device)
        self._value: Tensor | None = None

    def put(self, place: tuple[slice, ...], part: Tensor) -> None:
        if self._value is None and part.shape == self._shape:
            self._value = part.contiguous()
        else:
            self.value()[place] = part

    def add(self, place: tuple[slice, ...], part: Tensor) -> None:
        if self._value is None and part.shape == self._shape:
            self._value = part.contiguous()
        else:
            self.value()[place] += part

    def value(self) -> Tensor:
        if self._value is None:
            fill, dtype, device = self._new
            self._value = torch.full(self._shape, fill, dtype=dtype, device=device)
        return self._value
