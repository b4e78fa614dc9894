"""Fused backward, without atomics: one kernel owns blocks of keys (dK, dV, dw), another blocks of rows (dQ).
With `deterministic=False` the first adds up dQ too, by float32 atomics, and is the only one.
The first works on transposed scores, so that P and dS meet dO and Q as they stand in registers.

    P_ij  = 2^(s_ij − lse_i·log2 e)
    dP_ij = Z_ij dO_i·V_j                                         only with dO; Z is dropout's 0 or 1/(1 − p)
    δ_i   = Σ_d dO_id O_id + Σ_g dmass_ig mass_ig − dlse_i        preprocess, float32; 0 for an absent row
    dS_ij = P_ij (dP_ij − δ_i + Σ_g dmass_ig w_jg) · (1 − tanh²)  the last factor with a soft cap
    dQ = scale·dS K      dK = scale·dSᵀ Q      dV = (Z P)ᵀ dO      dw_jg = Σ_i P_ij dmass_ig

The mass terms are Σ_g dmass_ig (w_jg − mass_ig), formed in float32 for every element before P multiplies them, so
a saturated row (mass → 1) keeps the gradient that remains. An incoming gradient that is absent removes its
work at compile time: without dO there is no dP and no dV. A sink holds P_i,sink = exp(sink − lse_i) and nothing
else, so its gradient is −Σ_i P_i,sink δ_i. Mass alone costs four products: Q Kᵀ in each of the two kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.merging import sink_gradient
from abft_kernels.triton.common import (
    UNSPECIALIZED,
    add_tile,
    load_tile,
    locate,
    locate_packed,
    matmul,
    one_head,
    rounded,
    store_tile,
)
from abft_kernels.triton.descriptors import forms_of, tiles_of, with_scratch
from abft_kernels.triton.labelled import (
    STRETCH,
    block_labels,
    defer,
    first_upcoming,
    index_labels,
    key_bounds,
    key_offsets,
    label_programs,
    label_range,
    label_tiles,
    scattered,
    stored_keys,
)
from abft_kernels.triton.labels import (
    add_column,
    any_label,
    group_weight,
    is_labelled,
    key_labels,
    load_groups,
    sample_labels,
)
from abft_kernels.triton.launch import SMALL, launch_config, preprocess_block, serves
from abft_kernels.triton.masks import block_start, key_phases, keys_and_queries, phase_range, row_phases, seen_keys
from abft_kernels.triton.softmax import dropout_keep, head_dropout, head_scores, probabilities, seeded_dropout
from abft_kernels.triton.statistics import (
    HeadRows,
    Statistics,
    load_dmass,
    load_statistics,
    mass_attn_bwd_preprocess_kernel,
    wanted_rows,
)
from abft_kernels.triton.structs import (
    Dropout,
    Features,
    HeadCounts,
    Heads,
    Place,
    Rows,
    Scores,
    Sequences,
    Shape,
    Sizes,
    features,
    head_tile,
    seed_halves,
)


class KeyTile(NamedTuple):
    """The keys that a program owns."""

    k: tl.tensor
    v: tl.tensor
    group: tl.tensor
    labelled: tl.tensor  # 0 if none of them has a label
    offs: tl.tensor


class RowTile(NamedTuple):
    """The rows that a program owns; `wanted` are those whose mass counts."""

    q: tl.tensor
    do: tl.tensor
    lse2: tl.tensor
    delta: tl.tensor
    wanted: tl.tensor
    offs: tl.tensor


@triton.jit
def _score_gradient(p, slope, capped, F: tl.constexpr):
    """Return dS in float32."""
    ds = p * slope
    if F.softcap:
        ds = ds * (1.0 - capped * capped)
    return ds


@triton.jit
def _key_block(
    dk, dv, dw, tile, labels, q_rows, do_rows, statistics, head, start_m, keys, queries, scores, dropout,
    F: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dk, dv and dw of a block of keys after one block of rows; scores are `[BLOCK_N, BLOCK_M]`."""
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS: tl.constexpr = F.groups
    offs_m = start_m + tl.arange(0, BLOCK_M)
    # Rows that see the whole block are all the sequence's own.
    q = load_tile(q_rows, start_m, offs_m, tl.arange(0, BLOCK_D), queries.first, queries.limit, F.head_dim, MASKED)
    lse2, delta = load_statistics(statistics, head, offs_m, MASKED)
    rows, cols = (offs_m + queries.offset)[None, :], tile.offs[:, None]
    p, capped = probabilities(scores, tile.k, q, rows, cols, lse2[None, :], F)
    if MASKED:
        # Rows of other packed sequences have an LSE of their own.
        own = (offs_m >= queries.first) & (offs_m < queries.limit)
        p = tl.where(seen_keys(rows, cols, keys, F, True) & own[None, :], p, 0.0)
    slope = tl.zeros_like(p) - delta[None, :]
    if F.v:
        offs_dv = tl.arange(0, BLOCK_DV)
        do = load_tile(do_rows, start_m, offs_m, offs_dv, queries.first, queries.limit, F.head_dim_v, MASKED)
        dp = matmul(tile.v, tl.trans(do), None)
        kept = p
        if F.dropout:
            keep = dropout_keep(dropout, offs_m[None, :], cols)
            kept = tl.where(keep, p * dropout.scale, 0.0)
            dp = tl.where(keep, dp * dropout.scale, 0.0)
        dv = matmul(rounded(kept, do.dtype), do, dv)
        slope += dp
    if F.groups > 0:
        wanted, some = wanted_rows(statistics, head, offs_m, lse2, F)
        if tile.labelled * some != 0:
            for g in tl.static_range(GROUPS):
                dmass = load_dmass(statistics, head, g, offs_m, wanted, F)
                w = group_weight(g, tile.group, labels, tile.offs, keys, F)
                slope += w[:, None] * dmass[None, :]
                if F.dw:
                    dw = add_column(dw, g, tl.sum(p * dmass[None, :], 1), F.groups_pad)
    ds = rounded(_score_gradient(p, slope, capped, F), q.dtype)
    dk = matmul(ds, q, dk)
    if F.atomic_dq:
        if F.deferred > 0:  # the dS of labelled keys is another program's
            ds = tl.where(is_labelled(load_groups(labels, tile.offs, F), F.deferred)[:, None], 0.0, ds)
        dq = matmul(tl.trans(ds), tile.k, None)
        add_tile(head.dq, start_m, offs_m, tl.arange(0, BLOCK_D), queries.first, queries.limit, dq, F.head_dim)
    return dk, dv, dw


@triton.jit
def _key_tile(
    at, q, k, v, do, labels, statistics, dq, dk, dv, dw, scale, scores, dropout, sequences, shape, F: tl.constexpr,
):  # fmt: skip
    """Compute and store dk, dv and dw of a tile of keys."""
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    HEAD_DIM: tl.constexpr = F.head_dim
    GROUPS: tl.constexpr = F.groups
    GROUPS_PAD: tl.constexpr = F.groups_pad
    labels = sample_labels(labels, at.b, shape.n_k, 1, F)
    offs_n = key_offsets(labels, at.start, F)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    keys, queries = keys_and_queries(sequences, at.sequence, shape, F)
    k_tile = load_tile(one_head(k, at.b, at.h), at.start, offs_n, offs_d, keys.start, keys.end, F.head_dim, True)
    v_tile = k_tile
    if F.v:
        v_rows = one_head(v, at.b, at.h)
        v_tile = load_tile(v_rows, at.start, offs_n, offs_dv, keys.start, keys.end, F.head_dim_v, True)
    group = offs_n
    labelled = 1
    if F.groups > 0:
        group = load_groups(labels, offs_n, F)
        if not F.dw:  # the gradient of a weight that is 0 is not 0
            found = tl.zeros([BLOCK_N], dtype=tl.float32)
            for g in tl.static_range(GROUPS):
                found += tl.abs(group_weight(g, group, labels, offs_n, keys, F))
            labelled = tl.max((found > 0).to(tl.int32), 0)
    tile = KeyTile(k_tile, v_tile, group, labelled, offs_n.to(tl.int32))
    # Labelled keys have masked blocks alone, and many.
    STAGES: tl.constexpr = None if F.gathered else F.masked_stages
    first_n, last_n = key_bounds(at.start, offs_n, keys, F)
    phases = row_phases(first_n, last_n, keys, queries, F)

    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    dw_tile = tl.zeros([BLOCK_N, GROUPS_PAD], dtype=tl.float32)
    q_tiles = tiles_of(q, at.b, shape.heads, queries.first, queries.limit, F.block_m, F.head_dim, F.descriptors)
    do_tiles = q_tiles
    if F.v:
        do_tiles = tiles_of(do, at.b, shape.heads, queries.first, queries.limit, F.block_m, F.head_dim_v, F.descriptors)
    for member in range(shape.group_size):
        off_h = at.h * shape.group_size + member
        off_bh = at.b * shape.heads + off_h
        q_rows = one_head(q, at.b, off_h, q_tiles)
        do_rows = q_rows
        if F.v:
            do_rows = one_head(do, at.b, off_h, do_tiles)
        dq_rows = q_rows
        if F.atomic_dq:
            dq_rows = Rows(dq + off_bh * shape.n_q * F.head_dim, HEAD_DIM, 1)
        head = HeadRows(off_bh * shape.n_q, at.b * shape.n_q, shape.n_q, dq_rows)
        of_scores = head_scores(scores, off_bh, F)
        of_dropout = head_dropout(dropout, off_bh)
        for MASKED in tl.static_range(1, 0 if F.gathered else -1, -1):
            begin, end = phase_range(phases, MASKED)
            for block in tl.range(begin, end, 1 if MASKED else F.block_m, num_stages=STAGES if MASKED else None):
                start_m = block_start(block, phases, F.block_m, MASKED)
                dk_tile, dv_tile, dw_tile = _key_block(
                    dk_tile,
                    dv_tile,
                    dw_tile,
                    tile,
                    labels,
                    q_rows,
                    do_rows,
                    statistics,
                    head,
                    start_m,
                    keys,
                    queries,
                    of_scores,
                    of_dropout,
                    F,
                    MASKED,
                )

    limit_out = shape.n_k
    if F.packed:  # keys after the sequence are another tile's
        limit_out = at.limit
    offs_n = stored_keys(labels, offs_n, keys, limit_out, F)
    store_tile(one_head(dk, at.b, at.h), at.start, offs_n, offs_d, limit_out, dk_tile * scale, F.head_dim)
    if F.v:
        store_tile(one_head(dv, at.b, at.h), at.start, offs_n, offs_dv, limit_out, dv_tile, F.head_dim_v)
    if F.dw:
        dw_rows = Rows(dw + at.bh * shape.n_k * F.groups, GROUPS, 1)
        store_tile(dw_rows, at.start, offs_n, tl.arange(0, GROUPS_PAD), limit_out, dw_tile, F.groups)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mass_attn_bwd_kv_kernel(
    q, k, v, do, labels, statistics, dq, dk, dv, dw, scale, scores, dropout, seed_low, seed_high, sequences, counts,
    n_q, n_k, offset, num_tiles, num_sequences, F: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = F.block_n
    kv_heads = counts.heads // counts.group_size
    shape = Shape(counts.heads, counts.group_size, n_q, n_k, offset)
    dropout = seeded_dropout(dropout, seed_low, seed_high, F)
    skipped = 0
    if F.deferred > 0:  # first the programs that own labelled keys, of all heads: theirs are the longest loops
        L: tl.constexpr = F.last
        of_head = label_programs(n_k, num_sequences, F)
        skipped = tl.num_programs(0) // (num_tiles + of_head) * of_head
        if tl.program_id(0) < skipped:
            if F.packed:
                at = locate_packed(sequences, num_sequences, kv_heads, of_head, n_k, STRETCH)
            else:
                at = locate(kv_heads, of_head, STRETCH, False)
            keys, _ = keys_and_queries(sequences, at.sequence, shape, F)
            first, end, step = label_tiles(sample_labels(labels, at.b, n_k, 1, F), at, keys, n_k, F)
            for entry in range(first, end, step):
                tile = Place(at.b, at.h, at.bh, at.sequence, entry, keys.end)
                _key_tile(
                    tile, q, k, v, do, labels, statistics, dq, dk, dv, dw, scale, scores, dropout, sequences, shape, L
                )
            return
    # Causal: the first keys have the most rows, and their tiles come first.
    if F.packed:
        at = locate_packed(sequences, num_sequences, kv_heads, num_tiles, n_k, BLOCK_N, skipped)
    else:
        at = locate(kv_heads, num_tiles, BLOCK_N, False, skipped)
    _key_tile(at, q, k, v, do, labels, statistics, dq, dk, dv, dw, scale, scores, dropout, sequences, shape, F)


@triton.jit
def _row_block(
    dq, upcoming, tile, labels, statistics, head, k_rows, v_rows, start_n, rows, keys, scores, dropout,
    F: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dq of a block of rows after one block of keys, and the first labelled key after it where these come last;
    `upcoming` is that key before the block, or any before the block itself."""
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS: tl.constexpr = F.groups
    offs_n = key_offsets(labels, start_n, F)
    cols = offs_n.to(tl.int32)[None, :]
    k = load_tile(k_rows, start_n, offs_n, tl.arange(0, BLOCK_D), keys.start, keys.end, F.head_dim, MASKED)
    p, capped = probabilities(scores, tile.q, k, rows, cols, tile.lse2[:, None], F)
    if MASKED:
        p = tl.where(seen_keys(rows, cols, keys, F, False), p, 0.0)
    slope = tl.zeros_like(p) - tile.delta[:, None]
    if F.v:
        v = load_tile(v_rows, start_n, offs_n, tl.arange(0, BLOCK_DV), keys.start, keys.end, F.head_dim_v, MASKED)
        dp = matmul(tile.do, tl.trans(v), None)
        if F.dropout:
            dp = tl.where(dropout_keep(dropout, tile.offs[:, None], cols), dp * dropout.scale, 0.0)
        slope += dp
    if F.groups > 0:  # noqa: SIM102 (decided at compile time, and then at run time)
        if any_label(labels, start_n, F):
            group = load_groups(labels, offs_n, F)
            for g in tl.static_range(GROUPS):
                dmass = load_dmass(statistics, head, g, tile.offs, tile.wanted, F)
                w = group_weight(g, group, labels, offs_n, keys, F)
                slope += dmass[:, None] * w[None, :]
    ds = _score_gradient(p, slope, capped, F)
    if F.deferred > 0:  # noqa: SIM102 (decided at compile time, and then at run time)
        if upcoming < start_n + F.block_n:  # a loop outside of a branch would keep the outer one from being pipelined
            first, end = block_labels(labels, start_n, F)
            for entry in range(first, end):
                ds = tl.where(cols == tl.load(labels.positions + entry), 0.0, ds)
            upcoming = tl.load(labels.positions + end)
    return matmul(rounded(ds, k.dtype), k, dq), upcoming


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mass_attn_bwd_q_kernel(
    q, k, v, do, labels, statistics, dq, scale, scores, dropout, seed_low, seed_high, sequences, counts,
    n_q, n_k, offset, num_tiles, num_sequences, F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    if F.packed:
        at = locate_packed(sequences, num_sequences, counts.heads, num_tiles, n_q, BLOCK_M)
    else:
        at = locate(counts.heads, num_tiles, BLOCK_M, True)
    shape = Shape(counts.heads, counts.group_size, n_q, n_k, offset)
    offs_m = at.start + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    keys, queries = keys_and_queries(sequences, at.sequence, shape, F)
    rows = (offs_m + shape.offset)[:, None]
    off_hk = at.h // shape.group_size
    q_rows = one_head(q, at.b, at.h)
    kv_heads = counts.heads // counts.group_size
    k_tiles = tiles_of(k, at.b, kv_heads, keys.start, keys.end, F.block_n, F.head_dim, F.descriptors)
    k_rows = one_head(k, at.b, off_hk, k_tiles)
    v_rows = k_rows
    q_tile = load_tile(q_rows, at.start, offs_m, offs_d, queries.first, queries.limit, F.head_dim, True)
    do_tile = q_tile
    if F.v:
        v_tiles = tiles_of(v, at.b, kv_heads, keys.start, keys.end, F.block_n, F.head_dim_v, F.descriptors)
        v_rows = one_head(v, at.b, off_hk, v_tiles)
        do_rows, offs_dv = one_head(do, at.b, at.h), tl.arange(0, BLOCK_DV)
        do_tile = load_tile(do_rows, at.start, offs_m, offs_dv, queries.first, queries.limit, F.head_dim_v, True)
    head = HeadRows(at.bh * shape.n_q, at.b * shape.n_q, shape.n_q, q_rows)
    lse2, delta = load_statistics(statistics, head, offs_m, True)
    if F.packed:
        lse2 = tl.where(offs_m < queries.limit, lse2, float("inf"))
    wanted, some = wanted_rows(statistics, head, offs_m, lse2, F)
    labels = sample_labels(labels, at.b, shape.n_k, some, F)
    scores = head_scores(scores, at.bh, F)
    dropout = head_dropout(seeded_dropout(dropout, seed_low, seed_high, F), at.bh)
    tile = RowTile(q_tile, do_tile, lse2, delta, wanted, offs_m)
    phases = key_phases(at.start, keys, queries, F)

    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        begin, end = phase_range(phases, MASKED)
        upcoming = first_upcoming(labels)
        for block in tl.range(begin, end, 1 if MASKED else F.block_n, num_stages=F.masked_stages if MASKED else None):
            start_n = block_start(block, phases, F.block_n, MASKED)
            dq_tile, upcoming = _row_block(
                dq_tile, upcoming, tile, labels, statistics, head, k_rows, v_rows, start_n, rows, keys, scores, dropout,
                F, MASKED,
            )  # fmt: skip
    if F.deferred > 0:
        L: tl.constexpr = F.last
        begin, end = label_range(labels, phases, F)
        k_last, v_last = scattered(k_rows), scattered(v_rows)
        for entry in tl.range(begin, end, L.block_n, num_stages=1):
            dq_tile, _ = _row_block(
                dq_tile, 0, tile, labels, statistics, head, k_last, v_last, entry, rows, keys, scores, dropout, L, True
            )
    limit_out = shape.n_q
    if F.packed:
        limit_out = at.limit
    store_tile(one_head(dq, at.b, at.h), at.start, offs_m, offs_d, limit_out, dq_tile * scale, F.head_dim)


class Gradients(NamedTuple):
    """Empty tensors stand for gradients that nothing asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor  # (B, N_k, G) float32
    sinks: Tensor  # (H,) float32


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
    """Launch the kernels; arguments as in `abft_kernels.ops.mass_attention_backward_op`."""
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    if call.num_groups == 0 or (call.groups is None and call.weights is None):
        dmass = None
    if v is None or do is None:
        v = do = None
    groups = 0 if dmass is None else call.num_groups
    want_dw = weights_wanted and call.weights is not None and dmass is not None
    # In the layout of q, k and v, which spares the projections before them a copy. With no query or no key no program
    # runs.
    nothing = n_q == 0 or n_k == 0 or batch == 0
    like = torch.zeros_like if nothing else torch.empty_like
    dq, dk, dv = like(q), like(k), q.new_empty(0) if v is None else like(v)
    dw = q.new_empty((batch, kv_heads, n_k, groups) if want_dw else (0,), dtype=torch.float32)
    dsinks = q.new_empty(0 if call.sinks is None else heads, dtype=torch.float32)
    if nothing:
        dw, dsinks = dw.zero_(), dsinks.zero_()
        return Gradients(dq, dk, dv, dw.sum(1) if want_dw else dw, dsinks)
    if dmass is not None and call.row_mask is not None:
        dmass = dmass.masked_fill(call.row_mask[:, None, :, None] == 0, 0.0)
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    statistics = Statistics(torch.empty_like(delta), delta, dmass, call.row_mask)
    inputs = (Heads.of(q), Heads.of(k), Heads.of(v), Heads.of(do))
    scores, dropout = Scores.of(call), Dropout.of(call)
    of_call = (
        call.scale,
        scores,
        dropout,
        *seed_halves(call),
        Sequences.of(call),
        HeadCounts(heads, heads // kv_heads),
    )
    shape = Sizes.of(call, n_q, n_k)
    of_table = (head_tile(q, v), q.element_size(), call.loop_groups(groups), q.device, forms_of(q, k, v, do))
    atomic = not call.deterministic and not torch.are_deterministic_algorithms_enabled()
    atomic = atomic and serves("backward_atomic", *of_table[:4])
    launch = launch_config("backward_atomic" if atomic else "backward_kv", *of_table)
    of_keys = defer(features(q, v, call, launch, groups, dw=want_dw, atomic_dq=atomic), call)

    block = preprocess_block(of_keys.block_dv)
    num_tiles = triton.cdiv(n_q, block)
    of = Features(head_dim_v=of_keys.head_dim_v, block_dv=of_keys.block_dv, block_m=block, groups=groups, v=of_keys.v)
    of = of._replace(dlse=dlse is not None)
    mass_attn_bwd_preprocess_kernel[(num_tiles * batch * heads,)](
        Heads.of(out), inputs[3], mass, lse, dlse, statistics, heads, n_q, num_tiles, of, **SMALL.options
    )
    if call.sinks is not None:
        dsinks = sink_gradient(call.sinks, lse, delta)

    sizes, results = shape.tiled(call, n_k, launch.block_n), (Heads.of(dk), Heads.of(None if v is None else dv))
    labels, tiles = key_labels(call, groups), sizes.num_tiles
    if of_keys.deferred:
        labels, tiles = index_labels(call, groups), tiles + shape.tiled(call, n_k, STRETCH.value).num_tiles
    # Without its scale, which meets every element once, afterwards.
    sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if atomic else None
    run = with_scratch(_mass_attn_bwd_kv_kernel[(tiles * batch * kv_heads,)], launch, q.device)
    run(*inputs, labels, statistics, sums, *results, dw, *of_call, *sizes, of_keys, **launch.options)
    if sums is not None:
        torch.mul(sums, call.scale, out=dq)
        return Gradients(dq, dk, dv, dw.sum(1) if want_dw else dw, dsinks)

    launch = launch_config("backward_q", *of_table)
    sizes, of = shape.tiled(call, n_q, launch.block_m), defer(features(q, v, call, launch, groups), call)
    if not of.deferred:
        labels = key_labels(call, groups, launch.block_n)
    run = with_scratch(_mass_attn_bwd_q_kernel[(sizes.num_tiles * batch * heads,)], launch, q.device)
    run(*inputs, labels, statistics, Heads.of(dq), *of_call, *sizes, of, **launch.options)
    return Gradients(dq, dk, dv, dw.sum(1) if want_dw else dw, dsinks)
