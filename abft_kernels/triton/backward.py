"""Fused backward, without atomics: one kernel owns blocks of keys (dK, dV), another blocks of rows (dQ).

    P_ij  = 2^(s_ij − lse_i·log2 e)
    dP_ij = dO_i·V_j                                              only with dO
    δ_i   = Σ_d dO_id O_id + Σ_g dmass_ig mass_ig − dlse_i        preprocess, float32; 0 for an absent row
    dS_ij = P_ij (dP_ij − δ_i + Σ_g dmass_ig [group_j = g])
    dQ = scale·dS K      dK = scale·dSᵀ Q      dV = Pᵀ dO

The mass terms are Σ_g dmass_ig (w_jg − mass_ig), formed in float32 for every element before P multiplies them, so
a saturated row (mass → 1) keeps the gradient that remains. An incoming gradient that is absent removes its
work at compile time: without dO there is no dP and no dV.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.launch import launch_config, preprocess_block
from abft_kernels.triton.common import (
    LOG2E,
    head_block,
    key_range,
    labelled_blocks,
    load_rows,
    masked_block,
    matmul,
    query_bounds,
    rounded,
    sample_bounds,
    store_rows,
    strides,
)


@triton.jit
def _mass_attn_bwd_preprocess_kernel(
    Out, dO, Mass, dMass, LSE, dLSE, Delta,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, n_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(n_q, BLOCK_M)
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    off_b = off_bh // heads
    off_h = off_bh % heads
    offs_m = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < n_q
    row = off_bh * n_q + offs_m
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_DO:
        offs_d = tl.arange(0, BLOCK_D)
        out_base = Out + off_b * stride_ob + off_h * stride_oh
        do_base = dO + off_b * stride_dob + off_h * stride_doh
        out = load_rows(out_base, offs_m, offs_d, stride_om, stride_od, 0, n_q, HEAD_DIM, True)
        do = load_rows(do_base, offs_m, offs_d, stride_dom, stride_dod, 0, n_q, HEAD_DIM, True)
        delta += tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DMASS:
        for g in tl.static_range(GROUPS):
            mass = tl.load(Mass + row * GROUPS + g, mask=in_range, other=0.0)
            delta += mass * tl.load(dMass + row * GROUPS + g, mask=in_range, other=0.0)
    if HAS_DLSE:
        delta -= tl.load(dLSE + row, mask=in_range, other=0.0)
    lse = tl.load(LSE + row, mask=in_range, other=0.0)
    tl.store(Delta + row, tl.where(lse == float("-inf"), 0.0, delta), mask=in_range)


@triton.jit
def _probabilities(q, k, lse2, offs_n, rows, start, end, qk_scale,
                   MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """P `[BLOCK_M, BLOCK_N]` from the stored LSE, base 2; absent rows carry lse2 = +inf and give 0."""
    s = matmul(q, tl.trans(k), None, PRECISION) * qk_scale
    p = tl.exp2(s - lse2[:, None])
    if MASKED:
        visible = ((offs_n >= start) & (offs_n < end))[None, :]
        if IS_CAUSAL:
            visible = visible & (offs_n[None, :] <= rows[:, None])
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _load_lse2(LSE, row_base, offs_m, n_q, log2e):
    lse = tl.load(LSE + row_base + offs_m, mask=offs_m < n_q, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * log2e)


@triton.jit
def _add_mass_slope(ds, dMass, row_base, offs_m, lse2, group, n_q, GROUPS: tl.constexpr):
    """ds + Σ_g dmass_g [group = g], for a block of keys that holds labels; dmass of an absent row is 0."""
    for g in tl.static_range(GROUPS):
        pointers = dMass + (row_base + offs_m) * GROUPS + g
        dmass = tl.load(pointers, mask=offs_m < n_q, other=0.0)
        dmass = tl.where(lse2 == float("inf"), 0.0, dmass)
        ds += tl.where((group == g)[None, :], dmass[:, None], 0.0)
    return ds


@triton.jit
def _key_block(
    dk, dv, k, v, group, labelled, q_base, do_base, LSE, Delta, dMass,
    row_base, start_m, offs_n, offs_d, start, end, first_m, limit_m,
    stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, qk_scale, log2e,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, True)
    lse2 = _load_lse2(LSE, row_base, offs_m, n_q, log2e)
    delta = tl.load(Delta + row_base + offs_m, mask=offs_m < n_q, other=0.0)
    rows = offs_m + (n_k - n_q)
    p = _probabilities(q, k, lse2, offs_n, rows, start, end, qk_scale, MASKED, IS_CAUSAL, PRECISION)
    ds = tl.zeros_like(p) - delta[:, None]
    if HAS_DO:
        do = load_rows(do_base, offs_m, offs_d, stride_dom, stride_dod, first_m, limit_m, HEAD_DIM, True)
        dv = matmul(tl.trans(rounded(p, do.dtype)), do, dv, PRECISION)
        ds += matmul(do, tl.trans(v), None, PRECISION)
    if HAS_DMASS:  # noqa: SIM102 (decided at compile time, and then at run time)
        if labelled:
            ds = _add_mass_slope(ds, dMass, row_base, offs_m, lse2, group, n_q, GROUPS)
    dk = matmul(tl.trans(rounded(p * ds, q.dtype)), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _mass_attn_bwd_kv_kernel(
    Q, K, V, Groups, Starts, Ends, dO, dMass, LSE, Delta, dK, dV,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, group_size, n_q, n_k, scale, qk_scale, log2e,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group_size
    num_blocks = tl.cdiv(n_k, BLOCK_N)
    off_bk = (tl.program_id(0) // num_blocks).to(tl.int64)
    off_b = off_bk // kv_heads
    off_hk = off_bk % kv_heads
    start_n = (tl.program_id(0) % num_blocks) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    start, end = sample_bounds(Starts, Ends, off_b, n_k, HAS_STARTS, HAS_ENDS)

    k_base = K + off_b * stride_kb + off_hk * stride_kh
    k = load_rows(k_base, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, True)
    v = k
    if HAS_DO:
        v_base = V + off_b * stride_vb + off_hk * stride_vh
        v = load_rows(v_base, offs_n, offs_d, stride_vn, stride_vd, start, end, HEAD_DIM, True)
    group = offs_n
    labelled = False
    if HAS_DMASS:
        group = tl.load(Groups + off_b * n_k + offs_n, mask=offs_n < n_k, other=-1).to(tl.int32)
        labelled = tl.max(group, 0) >= 0

    # Rows i see this block if i + n_k − n_q ≥ start_n; from full_m on they see every key of it.
    offset = n_k - n_q
    first_m, limit_m = query_bounds(start, end, n_q, n_k, HAS_ENDS)
    lo = first_m
    hi = limit_m
    full_m = 0
    if IS_CAUSAL:
        lo = tl.maximum(start_n - offset, first_m)
        full_m = tl.maximum(start_n + BLOCK_N - 1 - offset, 0)
    lo = (lo // BLOCK_M) * BLOCK_M
    # A block of keys cut by the sample's bounds is masked throughout.
    cut = (start_n < start) | (start_n + BLOCK_N > end)
    full_m = tl.where(cut, hi, tl.minimum(tl.cdiv(full_m, BLOCK_M) * BLOCK_M, hi))
    full_m = tl.maximum(full_m, lo)
    hi = tl.where((start_n >= end) | (start_n + BLOCK_N <= start), lo, hi)
    full_m = tl.where((start_n >= end) | (start_n + BLOCK_N <= start), lo, full_m)

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for member in range(group_size):
        off_h = off_hk * group_size + member
        q_base = Q + off_b * stride_qb + off_h * stride_qh
        do_base = q_base
        if HAS_DO:
            do_base = dO + off_b * stride_dob + off_h * stride_doh
        row_base = (off_b * heads + off_h) * n_q
        for start_m in range(lo, full_m, BLOCK_M):
            dk, dv = _key_block(
                dk, dv, k, v, group, labelled, q_base, do_base, LSE, Delta, dMass,
                row_base, start_m, offs_n, offs_d, start, end, first_m, limit_m,
                stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, qk_scale, log2e,
                HEAD_DIM, BLOCK_M, GROUPS, True, IS_CAUSAL, HAS_DO, HAS_DMASS, PRECISION,
            )  # fmt: skip
        for start_m in range(full_m, hi, BLOCK_M):
            dk, dv = _key_block(
                dk, dv, k, v, group, labelled, q_base, do_base, LSE, Delta, dMass,
                row_base, start_m, offs_n, offs_d, start, end, first_m, limit_m,
                stride_qm, stride_qd, stride_dom, stride_dod, n_q, n_k, qk_scale, log2e,
                HEAD_DIM, BLOCK_M, GROUPS, False, IS_CAUSAL, HAS_DO, HAS_DMASS, PRECISION,
            )  # fmt: skip

    base = off_bk * n_k * HEAD_DIM
    store_rows(dK + base, offs_n, offs_d, HEAD_DIM, 1, n_k, dk * scale, HEAD_DIM)
    if HAS_DO:
        store_rows(dV + base, offs_n, offs_d, HEAD_DIM, 1, n_k, dv, HEAD_DIM)


@triton.jit
def _row_block(
    dq, q, do, lse2, delta, k_base, v_base, groups_base, labelled_base, dMass,
    row_base, start_n, offs_m, offs_d, rows, start, end,
    stride_kn, stride_kd, stride_vn, stride_vd, n_q, n_k, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_base, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, MASKED)
    p = _probabilities(q, k, lse2, offs_n, rows, start, end, qk_scale, MASKED, IS_CAUSAL, PRECISION)
    ds = tl.zeros_like(p) - delta[:, None]
    if HAS_DO:
        v = load_rows(v_base, offs_n, offs_d, stride_vn, stride_vd, start, end, HEAD_DIM, MASKED)
        ds += matmul(do, tl.trans(v), None, PRECISION)
    if HAS_DMASS:  # noqa: SIM102
        if tl.load(labelled_base + start_n // BLOCK_N) != 0:
            group = tl.load(groups_base + offs_n, mask=offs_n < n_k, other=-1)
            ds = _add_mass_slope(ds, dMass, row_base, offs_m, lse2, group, n_q, GROUPS)
    return matmul(rounded(p * ds, k.dtype), k, dq, PRECISION)


@triton.jit
def _mass_attn_bwd_q_kernel(
    Q, K, V, Groups, Labelled, Starts, Ends, dO, dMass, LSE, Delta, dQ,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    heads, group_size, n_q, n_k, num_label_blocks, scale, qk_scale, log2e,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DMASS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(n_q, BLOCK_M)
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    off_b = off_bh // heads
    off_h = off_bh % heads
    off_hk = off_h // group_size
    start_m = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m + (n_k - n_q)
    row_base = off_bh * n_q
    start, end = sample_bounds(Starts, Ends, off_b, n_k, HAS_STARTS, HAS_ENDS)

    q_base = Q + off_b * stride_qb + off_h * stride_qh
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    v_base = V + off_b * stride_vb + off_hk * stride_vh
    groups_base, labelled_base = Q, Q
    if HAS_DMASS:
        groups_base, labelled_base = Groups + off_b * n_k, Labelled + off_b * num_label_blocks
    first_m, limit_m = query_bounds(start, end, n_q, n_k, HAS_ENDS)
    q = load_rows(q_base, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, True)
    do = q
    if HAS_DO:
        do_base = dO + off_b * stride_dob + off_h * stride_doh
        do = load_rows(do_base, offs_m, offs_d, stride_dom, stride_dod, first_m, limit_m, HEAD_DIM, True)
    lse2 = _load_lse2(LSE, row_base, offs_m, n_q, log2e)
    delta = tl.load(Delta + row_base + offs_m, mask=offs_m < n_q, other=0.0)

    lo, full_lo, full_hi, head_blocks, tail_blocks = key_range(
        start_m + (n_k - n_q), start, end, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_ENDS
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start_n in range(full_lo, full_hi, BLOCK_N):
        dq = _row_block(
            dq, q, do, lse2, delta, k_base, v_base, groups_base, labelled_base, dMass,
            row_base, start_n, offs_m, offs_d, rows, start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_q, n_k, qk_scale,
            HEAD_DIM, BLOCK_N, GROUPS, False, IS_CAUSAL, HAS_DO, HAS_DMASS, PRECISION,
        )  # fmt: skip
    for block in range(head_blocks + tail_blocks):
        start_n = masked_block(block, lo, full_hi, head_blocks, BLOCK_N)
        dq = _row_block(
            dq, q, do, lse2, delta, k_base, v_base, groups_base, labelled_base, dMass,
            row_base, start_n, offs_m, offs_d, rows, start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_q, n_k, qk_scale,
            HEAD_DIM, BLOCK_N, GROUPS, True, IS_CAUSAL, HAS_DO, HAS_DMASS, PRECISION,
        )  # fmt: skip
    store_rows(dQ + row_base * HEAD_DIM, offs_m, offs_d, HEAD_DIM, 1, n_q, dq * scale, HEAD_DIM)


def backward(
    do: Tensor | None,
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernels; arguments as in `abft_kernels.ops.mass_attention_backward_op`."""
    batch, heads, n_q, head_dim = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    if groups is None or mass.shape[-1] == 0:
        dmass = None
    # Fills, not empties: with no query or no key no program runs.
    fresh = torch.zeros if n_q == 0 or n_k == 0 else torch.empty
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    dk = fresh(k.shape, dtype=k.dtype, device=k.device)
    dv = fresh(v.shape if do is not None else (0,), dtype=v.dtype, device=v.device)
    if n_q == 0 or n_k == 0 or batch == 0:
        return dq, dk, dv
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    groups = None if groups is None else groups.contiguous()
    delta = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    block_d = head_block(head_dim)
    groups_used = mass.shape[-1] if dmass is not None else 0
    shared: dict[str, Any] = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "GROUPS": groups_used,
        "HAS_DO": do is not None, "HAS_DMASS": dmass is not None,
    }  # fmt: skip
    do_strides = strides(do) if do is not None else (0, 0, 0, 0)
    preprocess_rows = preprocess_block(block_d)
    _mass_attn_bwd_preprocess_kernel[(triton.cdiv(n_q, preprocess_rows) * batch * heads,)](
        out, do, mass, dmass, lse, dlse, delta, *strides(out), *do_strides, heads, n_q,
        BLOCK_M=preprocess_rows, HAS_DLSE=dlse is not None, num_warps=4, **shared,
    )  # fmt: skip
    shared |= {
        "IS_CAUSAL": causal, "HAS_STARTS": starts is not None, "HAS_ENDS": ends is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    config = launch_config("backward_kv", block_d, q.element_size(), groups_used, q.device)
    _mass_attn_bwd_kv_kernel[(triton.cdiv(n_k, config.block_n) * batch * kv_heads,)](
        q, k, v, groups, starts, ends, do, dmass, lse, delta, dk, dv,
        *strides(q, k, v), *do_strides,
        heads, heads // kv_heads, n_q, n_k, scale, scale * LOG2E, LOG2E,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    config = launch_config("backward_q", block_d, q.element_size(), groups_used, q.device)
    labelled = labelled_blocks(groups, config.block_n) if dmass is not None and groups is not None else None
    _mass_attn_bwd_q_kernel[(triton.cdiv(n_q, config.block_m) * batch * heads,)](
        q, k, v, groups, labelled, starts, ends, do, dmass, lse, delta, dq,
        *strides(q, k, v), *do_strides,
        heads, heads // kv_heads, n_q, n_k, 0 if labelled is None else labelled.shape[1],
        scale, scale * LOG2E, LOG2E,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    return dq, dk, dv
