"""Fused backward, without atomics: one kernel owns blocks of keys (dK, dV, dw), another blocks of rows (dQ).
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

from abft_kernels.launch import launch_config, preprocess_block
from abft_kernels.merging import sink_gradient
from abft_kernels.spec import Extras, Options
from abft_kernels.triton.common import (
    LOG2E,
    add_column,
    base2_scores,
    dropout_keep,
    group_weight,
    key_phases,
    labelled_blocks,
    load_groups,
    load_rows,
    masked_block,
    matmul,
    next_power_of_2,
    query_bounds,
    rounded,
    row_phases,
    score_factors,
    seen_keys,
    sequence_bounds,
    store_rows,
    strides,
)
from abft_kernels.triton.forward import dropout_arguments, features, head_tile, row_tiles


@triton.jit
def _mass_attn_bwd_preprocess_kernel(
    Out, dO, Mass, dMass, LSE, dLSE, Delta, LSE2,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, n_q, log2e,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(n_q, BLOCK_M)
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    off_b = off_bh // heads
    off_h = off_bh % heads
    start_m = (tl.program_id(0) % num_tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_range = offs_m < n_q
    row = off_bh * n_q + offs_m
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_DO:
        offs_d = tl.arange(0, BLOCK_D)
        out_base = Out + off_b * stride_ob + off_h * stride_oh
        do_base = dO + off_b * stride_dob + off_h * stride_doh
        out = load_rows(out_base, start_m, offs_m, offs_d, stride_om, stride_od, 0, n_q, HEAD_DIM, True)
        do = load_rows(do_base, start_m, offs_m, offs_d, stride_dom, stride_dod, 0, n_q, HEAD_DIM, True)
        delta += tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DMASS:
        for g in tl.static_range(GROUPS):
            mass = tl.load(Mass + row * GROUPS + g, mask=in_range, other=0.0)
            delta += mass * tl.load(dMass + row * GROUPS + g, mask=in_range, other=0.0)
    if HAS_DLSE:
        delta -= tl.load(dLSE + row, mask=in_range, other=0.0)
    lse = tl.load(LSE + row, mask=in_range, other=0.0)
    absent = lse == float("-inf")
    tl.store(Delta + row, tl.where(absent, 0.0, delta), mask=in_range)
    # +inf, so that every probability of an absent row is 0.
    tl.store(LSE2 + row, tl.where(absent, float("inf"), lse * log2e), mask=in_range)


@triton.jit
def _load_statistics(LSE2, Delta, row_base, offs_m, n_q, CHECKED: tl.constexpr):
    """LSE in base 2 and δ of a tile of rows."""
    if CHECKED:
        lse2 = tl.load(LSE2 + row_base + offs_m, mask=offs_m < n_q, other=float("inf"))
        delta = tl.load(Delta + row_base + offs_m, mask=offs_m < n_q, other=0.0)
    else:
        lse2 = tl.load(LSE2 + row_base + offs_m)
        delta = tl.load(Delta + row_base + offs_m)
    return lse2, delta


@triton.jit
def _load_dmass(dMass, g, row_base, offs_m, wanted, GROUPS: tl.constexpr):
    """dmass_g of a tile of rows; that of absent and unwanted rows is 0, whatever came in."""
    return tl.load(dMass + (row_base + offs_m) * GROUPS + g, mask=wanted, other=0.0)


@triton.jit
def _wanted_rows(RowMask, mask_base, offs_m, n_q, lse2, HAS_ROW_MASK: tl.constexpr):
    wanted = (offs_m < n_q) & (lse2 != float("inf"))
    if HAS_ROW_MASK:
        wanted = wanted & (tl.load(RowMask + mask_base + offs_m, mask=offs_m < n_q, other=0) != 0)
    return wanted


@triton.jit
def _any_wanted(wanted, HAS_ROW_MASK: tl.constexpr):
    return tl.max(wanted.to(tl.int32), 0) if HAS_ROW_MASK else 1


@triton.jit
def _key_block(
    dk, dv, dw, k, v, group, labelled, q_base, do_base, groups_base, LSE2, Delta, dMass, RowMask,
    row_base, mask_base, stream, slope2, start_m, offs_n, offs_d, offs_dv, start, end, first_m, limit_m,
    stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, offset, window,
    qk_scale, softcap2, keep_scale, threshold, seed,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr,
    HAS_DW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    # Rows that see the whole block are all the sequence's own.
    q = load_rows(q_base, start_m, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, MASKED)
    lse2, delta = _load_statistics(LSE2, Delta, row_base, offs_m, n_q, MASKED)
    rows, keys = (offs_m + offset)[None, :], offs_n[:, None]
    s, factor, capped = base2_scores(k, q, rows, keys, slope2, qk_scale, softcap2, HAS_SOFTCAP, HAS_SLOPES, PRECISION)
    p = tl.exp2(s * factor - lse2[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        # Rows of other packed sequences have an LSE of their own.
        seen = seen_keys(rows, keys, start, end, window, IS_CAUSAL, HAS_WINDOW)
        own = (offs_m >= first_m) & (offs_m < limit_m)
        p = tl.where(seen & own[None, :], p, 0.0)
    ds = tl.zeros_like(p) - delta[None, :]
    if HAS_DO:
        do = load_rows(do_base, start_m, offs_m, offs_dv, stride_dom, stride_dod, first_m, limit_m, HEAD_DIM_V, MASKED)
        dp = matmul(v, tl.trans(do), None, PRECISION)
        kept = p
        if HAS_DROPOUT:
            keep = dropout_keep(seed, offs_m[None, :], keys, stream, threshold)
            kept = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = matmul(rounded(kept, do.dtype), do, dv, PRECISION)
        ds += dp
    if HAS_DMASS:
        wanted = _wanted_rows(RowMask, mask_base, offs_m, n_q, lse2, HAS_ROW_MASK)
        if labelled * _any_wanted(wanted, HAS_ROW_MASK) != 0:
            for g in tl.static_range(GROUPS):
                dmass = _load_dmass(dMass, g, row_base, offs_m, wanted, GROUPS)
                w = group_weight(g, group, groups_base, offs_n, start, end, GROUPS, HAS_WEIGHTS)
                ds += w[:, None] * dmass[None, :]
                if HAS_DW:
                    dw = add_column(dw, g, tl.sum(p * dmass[None, :], 1), GROUPS_PAD)
    ds = p * ds
    if HAS_SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    dk = matmul(rounded(ds, q.dtype), q, dk, PRECISION)
    return dk, dv, dw


@triton.jit
def _mass_attn_bwd_kv_kernel(
    Q, K, V, Groups, Slopes, Starts, Ends, RowMask, Tiles, dO, dMass, LSE2, Delta, dK, dV, PartDW,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, group_size, n_q, n_k, num_tiles, offset, window,
    scale, qk_scale, softcap2, keep_scale, log2e, threshold, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ROW_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group_size
    off_bk = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    off_b = off_bk // kv_heads
    off_hk = off_bk % kv_heads
    start_n = tile * BLOCK_N  # causal: the first keys have the most rows
    sequence = off_b
    if PACKED:
        sequence = tl.load(Tiles + 2 * tile)
        start_n = tl.load(Tiles + 2 * tile + 1)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    start, end = sequence_bounds(Starts, Ends, sequence, n_k, HAS_STARTS, HAS_ENDS)
    first_m, limit_m = query_bounds(start, end, n_q, offset, HAS_ENDS)
    start = tl.maximum(start, 0)
    end = tl.minimum(end, n_k)

    k_base = K + off_b * stride_kb + off_hk * stride_kh
    k = load_rows(k_base, start_n, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, True)
    v = k
    if HAS_DO:
        v_base = V + off_b * stride_vb + off_hk * stride_vh
        v = load_rows(v_base, start_n, offs_n, offs_dv, stride_vn, stride_vd, start, end, HEAD_DIM_V, True)
    group = offs_n
    groups_base = Q
    labelled = 1
    if HAS_DMASS:
        groups_base = Groups + off_b * n_k * (GROUPS if HAS_WEIGHTS else 1)
        group = load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS)
        if not HAS_DW:  # the gradient of a weight that is 0 is not 0
            found = tl.zeros([BLOCK_N], dtype=tl.float32)
            for g in tl.static_range(GROUPS):
                found += tl.abs(group_weight(g, group, groups_base, offs_n, start, end, GROUPS, HAS_WEIGHTS))
            labelled = tl.max((found > 0).to(tl.int32), 0)
    first, full_lo, full_hi, before, behind = row_phases(
        start_n, start, end, first_m, limit_m, offset, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW
    )

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    dw = tl.zeros([BLOCK_N, GROUPS_PAD], dtype=tl.float32)
    for member in range(group_size):
        off_h = off_hk * group_size + member
        off_bh = off_b * heads + off_h
        q_base = Q + off_b * stride_qb + off_h * stride_qh
        do_base = q_base
        if HAS_DO:
            do_base = dO + off_b * stride_dob + off_h * stride_doh
        slope2 = 0.0
        if HAS_SLOPES:
            slope2 = tl.load(Slopes + off_bh) * log2e
        for block in tl.range(0, before + behind, num_stages=1):
            start_m = masked_block(block, first, full_hi, before, BLOCK_M)
            dk, dv, dw = _key_block(
                dk, dv, dw, k, v, group, labelled, q_base, do_base, groups_base, LSE2, Delta, dMass, RowMask,
                off_bh * n_q, off_b * n_q, off_bh, slope2, start_m, offs_n, offs_d, offs_dv, start, end,
                first_m, limit_m, stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, offset, window,
                qk_scale, softcap2, keep_scale, threshold, seed,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, GROUPS, GROUPS_PAD, True, IS_CAUSAL, HAS_WINDOW,
                HAS_WEIGHTS, HAS_SLOPES, HAS_SOFTCAP, HAS_ROW_MASK, HAS_DROPOUT, HAS_DO, HAS_DMASS, HAS_DW, PRECISION,
            )  # fmt: skip
        for start_m in range(full_lo, full_hi, BLOCK_M):
            dk, dv, dw = _key_block(
                dk, dv, dw, k, v, group, labelled, q_base, do_base, groups_base, LSE2, Delta, dMass, RowMask,
                off_bh * n_q, off_b * n_q, off_bh, slope2, start_m, offs_n, offs_d, offs_dv, start, end,
                first_m, limit_m, stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, offset, window,
                qk_scale, softcap2, keep_scale, threshold, seed,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, GROUPS, GROUPS_PAD, False, IS_CAUSAL, HAS_WINDOW,
                HAS_WEIGHTS, HAS_SLOPES, HAS_SOFTCAP, HAS_ROW_MASK, HAS_DROPOUT, HAS_DO, HAS_DMASS, HAS_DW, PRECISION,
            )  # fmt: skip

    limit_out = n_k
    if PACKED:  # keys behind the sequence are another tile's
        limit_out = end
    store_rows(dK + off_bk * n_k * HEAD_DIM, start_n, offs_n, offs_d, HEAD_DIM, 1, limit_out, dk * scale, HEAD_DIM)
    if HAS_DO:
        store_rows(dV + off_bk * n_k * HEAD_DIM_V, start_n, offs_n, offs_dv, HEAD_DIM_V, 1, limit_out, dv, HEAD_DIM_V)
    if HAS_DW:
        columns = tl.arange(0, GROUPS_PAD)
        store_rows(PartDW + off_bk * n_k * GROUPS, start_n, offs_n, columns, GROUPS, 1, limit_out, dw, GROUPS)


@triton.jit
def _row_block(
    dq, q, do, lse2, delta, wanted, any_wanted, k_base, v_base, groups_base, labelled_base, dMass,
    row_base, stream, slope2, start_n, offs_m, offs_d, offs_dv, rows, start, end,
    stride_kn, stride_kd, stride_vn, stride_vd, n_k, window, qk_scale, softcap2, keep_scale, threshold, seed,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keys = offs_n[None, :]
    k = load_rows(k_base, start_n, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, MASKED)
    s, factor, capped = base2_scores(q, k, rows, keys, slope2, qk_scale, softcap2, HAS_SOFTCAP, HAS_SLOPES, PRECISION)
    p = tl.exp2(s * factor - lse2[:, None])
    if MASKED:
        p = tl.where(seen_keys(rows, keys, start, end, window, IS_CAUSAL, HAS_WINDOW), p, 0.0)
    ds = tl.zeros_like(p) - delta[:, None]
    if HAS_DO:
        v = load_rows(v_base, start_n, offs_n, offs_dv, stride_vn, stride_vd, start, end, HEAD_DIM_V, MASKED)
        dp = matmul(do, tl.trans(v), None, PRECISION)
        if HAS_DROPOUT:
            dp = tl.where(dropout_keep(seed, offs_m[:, None], keys, stream, threshold), dp * keep_scale, 0.0)
        ds += dp
    if HAS_DMASS:  # noqa: SIM102 (decided at compile time, and then at run time)
        if tl.load(labelled_base + start_n // BLOCK_N) * any_wanted != 0:
            group = load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS)
            for g in tl.static_range(GROUPS):
                dmass = _load_dmass(dMass, g, row_base, offs_m, wanted, GROUPS)
                w = group_weight(g, group, groups_base, offs_n, start, end, GROUPS, HAS_WEIGHTS)
                ds += dmass[:, None] * w[None, :]
    ds = p * ds
    if HAS_SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    return matmul(rounded(ds, k.dtype), k, dq, PRECISION)


@triton.jit
def _mass_attn_bwd_q_kernel(
    Q, K, V, Groups, Labelled, Slopes, Starts, Ends, RowMask, Tiles, dO, dMass, LSE2, Delta, dQ,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, group_size, n_q, n_k, num_tiles, num_label_blocks, offset, window,
    scale, qk_scale, softcap2, keep_scale, log2e, threshold, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ROW_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    off_b = off_bh // heads
    off_h = off_bh % heads
    off_hk = off_h // group_size
    start_m = (num_tiles - 1 - tile) * BLOCK_M
    sequence = off_b
    if PACKED:
        sequence = tl.load(Tiles + 2 * tile)
        start_m = tl.load(Tiles + 2 * tile + 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m + offset
    row_base = off_bh * n_q
    start, end = sequence_bounds(Starts, Ends, sequence, n_k, HAS_STARTS, HAS_ENDS)
    first_m, limit_m = query_bounds(start, end, n_q, offset, HAS_ENDS)
    start = tl.maximum(start, 0)
    end = tl.minimum(end, n_k)

    q_base = Q + off_b * stride_qb + off_h * stride_qh
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    v_base = k_base
    groups_base, labelled_base, slope2 = Q, Q, 0.0
    if HAS_DMASS:
        groups_base = Groups + off_b * n_k * (GROUPS if HAS_WEIGHTS else 1)
        labelled_base = Labelled + off_b * num_label_blocks
    if HAS_SLOPES:
        slope2 = tl.load(Slopes + off_bh) * log2e
    q = load_rows(q_base, start_m, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, True)
    do = q
    if HAS_DO:
        v_base = V + off_b * stride_vb + off_hk * stride_vh
        do_base = dO + off_b * stride_dob + off_h * stride_doh
        do = load_rows(do_base, start_m, offs_m, offs_dv, stride_dom, stride_dod, first_m, limit_m, HEAD_DIM_V, True)
    lse2, delta = _load_statistics(LSE2, Delta, row_base, offs_m, n_q, True)
    if PACKED:
        lse2 = tl.where(offs_m < limit_m, lse2, float("inf"))
    wanted = offs_m < n_q
    any_wanted = 1
    if HAS_DMASS:
        wanted = _wanted_rows(RowMask, off_b * n_q, offs_m, n_q, lse2, HAS_ROW_MASK)
        any_wanted = _any_wanted(wanted, HAS_ROW_MASK)
    first, full_lo, full_hi, before, behind = key_phases(
        start_m + offset, start_m + BLOCK_M - 1 + offset, start, end, window,
        (start_m >= limit_m) | (start_m + BLOCK_M <= first_m), BLOCK_N, IS_CAUSAL, HAS_WINDOW, HAS_ENDS,
    )  # fmt: skip

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start_n in range(full_lo, full_hi, BLOCK_N):
        dq = _row_block(
            dq, q, do, lse2, delta, wanted, any_wanted, k_base, v_base, groups_base, labelled_base, dMass,
            row_base, off_bh, slope2, start_n, offs_m, offs_d, offs_dv, rows[:, None], start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, window,
            qk_scale, softcap2, keep_scale, threshold, seed,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, False, IS_CAUSAL,
            HAS_WINDOW, HAS_WEIGHTS, HAS_SLOPES, HAS_SOFTCAP, HAS_DROPOUT, HAS_DO, HAS_DMASS, PRECISION,
        )  # fmt: skip
    for block in tl.range(0, before + behind, num_stages=1):
        start_n = masked_block(block, first, full_hi, before, BLOCK_N)
        dq = _row_block(
            dq, q, do, lse2, delta, wanted, any_wanted, k_base, v_base, groups_base, labelled_base, dMass,
            row_base, off_bh, slope2, start_n, offs_m, offs_d, offs_dv, rows[:, None], start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, window,
            qk_scale, softcap2, keep_scale, threshold, seed,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, True, IS_CAUSAL,
            HAS_WINDOW, HAS_WEIGHTS, HAS_SLOPES, HAS_SOFTCAP, HAS_DROPOUT, HAS_DO, HAS_DMASS, PRECISION,
        )  # fmt: skip
    limit_out = n_q
    if PACKED:
        limit_out = limit_m
    store_rows(dQ + row_base * HEAD_DIM, start_m, offs_m, offs_d, HEAD_DIM, 1, limit_out, dq * scale, HEAD_DIM)


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
    extras: Extras,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    options: Options,
    weights_wanted: bool,
) -> Gradients:
    """Launches the kernels; arguments as in `abft_kernels.ops.mass_attention_backward_op`."""
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    labels = extras.weights if extras.weights is not None else extras.groups
    if labels is None or options.num_groups == 0:
        dmass = None
    do = do if v is not None else None
    groups = options.num_groups if dmass is not None else 0
    want_dw = weights_wanted and extras.weights is not None and dmass is not None
    # Fills, not empties: with no query or no key no program runs, and packed sequences may leave tokens over.
    nothing = n_q == 0 or n_k == 0 or batch == 0
    fresh = torch.zeros if nothing or options.packed else torch.empty
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    dk = fresh(k.shape, dtype=k.dtype, device=k.device)
    dv = fresh(v.shape if v is not None and do is not None else (0,), dtype=q.dtype, device=k.device)
    dw = fresh((batch, kv_heads, n_k, groups) if want_dw else (0,), dtype=torch.float32, device=q.device)
    dsinks = torch.zeros(heads if extras.sinks is not None else 0, dtype=torch.float32, device=q.device)
    if nothing:
        return Gradients(dq, dk, dv, dw.sum(1) if want_dw else dw, dsinks)
    if dmass is not None and extras.row_mask is not None:
        dmass = dmass.masked_fill(extras.row_mask[:, None, :, None] == 0, 0.0)
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    lse2 = torch.empty_like(delta)
    shared = features(q, v if do is not None else None, extras, options, groups)
    shared |= {"HAS_DO": do is not None, "HAS_DMASS": dmass is not None}
    do_strides = strides(do) if do is not None else (0, 0, 0, 0)
    v_strides = strides(v) if v is not None else (0, 0, 0, 0)
    preprocess_rows = preprocess_block(shared["BLOCK_DV"])
    _mass_attn_bwd_preprocess_kernel[(triton.cdiv(n_q, preprocess_rows) * batch * heads,)](
        out, do, mass, dmass, lse, dlse, delta, lse2, *strides(out), *do_strides, heads, n_q, LOG2E,
        HEAD_DIM=shared["HEAD_DIM_V"], BLOCK_D=shared["BLOCK_DV"], BLOCK_M=preprocess_rows, GROUPS=groups,
        HAS_DO=do is not None, HAS_DMASS=dmass is not None, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    if extras.sinks is not None:
        dsinks = sink_gradient(extras.sinks, lse, delta)
    keep_scale, threshold, seed = dropout_arguments(options)
    numbers = (options.scale, *score_factors(options), keep_scale, LOG2E, threshold, seed)
    width = head_tile(q, v if do is not None else None)
    config = launch_config("backward_kv", width, q.element_size(), groups, q.device)
    tiles, num_tiles = row_tiles(extras, options, n_k, config.block_n)
    _mass_attn_bwd_kv_kernel[(num_tiles * batch * kv_heads,)](
        q, k, v, labels, extras.slopes, extras.starts, extras.ends, extras.row_mask, tiles,
        do, dmass, lse2, delta, dk, dv, dw,
        *strides(q, k), *v_strides, *do_strides,
        heads, heads // kv_heads, n_q, n_k, num_tiles, options.offset, options.window, *numbers,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUPS_PAD=next_power_of_2(max(1, groups)), HAS_DW=want_dw,
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    config = launch_config("backward_q", width, q.element_size(), groups, q.device)
    labelled = labelled_blocks(labels, config.block_n) if dmass is not None and labels is not None else None
    tiles, num_tiles = row_tiles(extras, options, n_q, config.block_m)
    _mass_attn_bwd_q_kernel[(num_tiles * batch * heads,)](
        q, k, v, labels, labelled, extras.slopes, extras.starts, extras.ends, extras.row_mask, tiles,
        do, dmass, lse2, delta, dq,
        *strides(q, k), *v_strides, *do_strides,
        heads, heads // kv_heads, n_q, n_k, num_tiles, 0 if labelled is None else labelled.shape[1],
        options.offset, options.window, *numbers,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    return Gradients(dq, dk, dv, dw.sum(1) if want_dw else dw, dsinks)
