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
from abft_kernels.pytorch.scores import ABSENT, Piece, Scores

__all__ = ["backward", "forward", "row_backward", "row_forward"]


def forward(q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return output `(B, H, N_q, D_v)` (empty without v), mass and LSE of every row."""
    return _forward(Scores(q, k, v, _all_positions(q, call), call, True), q, v)


def row_forward(q: Tensor, k: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return mass `(S, H, R, G)` and natural-log LSE `(S, H, R)` of the rows, float32 (float64 for float64)."""
    positions = _from_key_0(positions, call)
    if (batch := _as_batch(k, positions, call)) is not None:
        _, k, positions, call = batch
    return _forward(Scores(q, k, None, positions, call, False), q, None)[1:]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq `(S, H, R, D)`, dk `(B, H_kv, N, D)`, dweights and dsinks; the last two are empty if not wanted."""
    positions, length = _from_key_0(positions, call), k.shape[2]
    if (batch := _as_batch(k, positions, call)) is not None:
        _, k, positions, call = batch
    rows = Scores(q, k, None, positions, call, False)
    dq, dk, _, dw, dsinks = _backward(rows, (None, dmass, dlse), (None, mass, lse), weights_wanted)
    if batch is not None:
        dk = batch[0].join(dk, length)
        dw = batch[0].join(dw, length) if dw.numel() else dw
    return dq, dk, dw, dsinks


def _all_positions(q: Tensor, call: Call) -> Tensor:
    first = call.row_offset
    return torch.arange(first, first + q.shape[2], device=q.device).expand(q.shape[0], -1)


def _from_key_0(positions: Tensor, call: Call) -> Tensor:
    positions = positions.long()
    return torch.where(positions < 0, ABSENT, positions - call.key_offset if call.key_offset else positions)


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


def _forward(rows: Scores, q: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n_q, _ = q.shape
    call = rows.call
    # Rows in no piece, those after packed sequences, stay as they are filled here.
    out = q.new_zeros((batch, n_q, heads, 0 if v is None else v.shape[3])).transpose(1, 2)
    mass = q.new_zeros((batch, heads, n_q, call.num_groups), dtype=rows.dtype)
    lse = q.new_full((batch, heads, n_q), float("-inf"), dtype=rows.dtype)
    if rows.num_keys == 0 or batch == 0:
        return out, mass, lse
    for piece in rows.pieces():
        scores, _ = rows.scores(rows.queries(piece), rows.keys_of(rows.k, piece), piece)
        piece_lse = rows.lse(scores)
        probabilities = _probabilities(scores, piece_lse)
        lse[piece.samples, :, piece.rows] = rows.unpack(piece_lse)
        if (weights := rows.weights_of(piece)) is not None:
            mass[piece.samples, :, piece.rows] = rows.unpack(probabilities @ weights)
        if rows.v is not None:
            if (keep := rows.keep(piece)) is not None:
                probabilities = probabilities.mul_(keep)
            out[piece.samples, :, piece.rows] = rows.unpack(probabilities @ rows.keys_of(rows.v, piece)).to(out.dtype)
    if call.row_mask is not None:
        mass = mass.masked_fill_(call.row_mask[:, None, :, None] == 0, 0.0)
    return out, mass, lse


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
    dq = torch.zeros_like(rows.q, memory_format=torch.contiguous_format)
    dk, dv, dw = (_Total(x, rows.dtype) for x in (rows.k, rows.v if do is not None else None, rows.weights))
    want_dw = weights_wanted and call.weights is not None and dmass is not None
    for piece in rows.pieces() if rows.num_keys and rows.batch else ():
        queries, keys = rows.queries(piece), rows.keys_of(rows.k, piece)
        scores, capped = rows.scores(queries, keys, piece)
        p = _probabilities(scores, rows.rows_of(lse, piece))
        slope = rows.rows_of(delta, piece)[..., None].neg()
        if dmass is not None and (weights := rows.weights_of(piece)) is not None:
            piece_dmass = rows.rows_of(dmass, piece)
            slope = (piece_dmass @ weights.transpose(-1, -2)).add_(slope)
            if want_dw:
                dw.add(piece, (piece.key_samples, piece.keys), (p.transpose(-1, -2) @ piece_dmass).sum(1))
        if do is not None and rows.v is not None:
            piece_do, keep = rows.rows_of(do, piece), rows.keep(piece)
            dp = piece_do @ rows.keys_of(rows.v, piece).transpose(-1, -2)
            kept = p
            if keep is not None:
                kept, dp = p * keep, dp.mul_(keep)
            dv.add(piece, (piece.key_samples, slice(None), piece.keys), kept.transpose(-1, -2) @ piece_do)
            slope = dp.add_(slope)
        ds = p.mul_(slope) if capped is None else p.mul_(slope).mul_(1 - capped.square())
        dq[piece.samples, :, piece.rows] = rows.unpack((ds @ keys).mul_(call.scale)).to(dq.dtype)
        part = (ds.transpose(-1, -2) @ queries).mul_(call.scale)
        dk.add(piece, (piece.key_samples, slice(None), piece.keys), part)
    nothing = torch.zeros(0, dtype=rows.dtype, device=lse.device)
    return Gradients(
        dq=dq,
        dk=dk.value().to(rows.k.dtype),
        dv=nothing if do is None else dv.value().to(rows.q.dtype),
        dweights=dw.value() if want_dw else nothing,
        dsinks=nothing if call.sinks is None else sink_gradient(call.sinks, lse, delta),
    )


def _row_terms(
    rows: Scores,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor, Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return dO and dmass with 0 in rows that do not count (None: absent), and δ `(B, H, R)`."""
    (do, dmass, dlse), (out, mass, lse) = incoming, results
    absent = lse == float("-inf")
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    if dmass is not None and rows.weights is not None:
        unwanted = absent if rows.call.row_mask is None else absent | (rows.call.row_mask[:, None] == 0)
        dmass = dmass.masked_fill(unwanted[..., None], 0.0)
        delta = delta + (dmass * mass).sum(-1)
    else:
        dmass = None
    if do is not None and out is not None:
        do = do.masked_fill(absent[..., None], 0.0)
        delta = delta + (do.to(rows.dtype) * out.to(rows.dtype)).sum(-1)
    return do, dmass, delta.masked_fill(absent, 0.0)


class _Total:
    """The sum over pieces of the gradient of `x`; a piece that holds all of it is that sum, without a copy."""

    def __init__(self, x: Tensor | None, dtype: torch.dtype):
        self._x, self._dtype = x, dtype
        self._sum: Tensor | None = None

    def add(self, piece: Piece, place: tuple[slice, ...], part: Tensor) -> None:
        assert self._x is not None
        if self._sum is None and part.shape == self._x.shape:
            self._sum = part
            return
        self.value()[place] += part

    def value(self) -> Tensor:
        assert self._x is not None
        if self._sum is None:
            self._sum = torch.zeros(self._x.shape, dtype=self._dtype, device=self._x.device)
        return self._sum
