"""Row kernel: the attention mass of a few query rows in one pass over K, forward and backward.

The rows of all query heads that share a KV head are packed into one tile, so K is read once per KV head.
Forward: every split of the keys keeps its own m, l and mass (and output, when it serves decoding); `combine` merges
them exactly, and adds the sink,

    lse = logaddexp_s lse_s        mass = Σ_s mass_s·exp(lse_s − lse)        out likewise

Backward, with P from the merged LSE and w_jg the indicator or weight of key j in group g:

    dS_rj = P_rj (Σ_g dmass_rg (w_jg − mass_rg) + dlse_r)·(1 − tanh²)
    dq = scale·dS k      dk = scale·dSᵀ q      dw_jg = Σ_r P_rj dmass_rg

Each key is owned by one program, which writes its dk; dq is summed over the splits in a fixed order. There are
no atomics: the same input gives the same bits. A single split writes its results itself: one launch each way.

Of packed sequences the queries are a batch, one entry a sequence, over the keys of one batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.launch import Launch, launch_config, row_splits
from abft_kernels.merging import sink_gradient
from abft_kernels.spec import Extras, Options
from abft_kernels.triton.common import (
    INTERPRETED,
    LN2,
    LOG2E,
    add_column,
    base2_scores,
    group_weight,
    head_block,
    load_groups,
    load_rows,
    matmul,
    next_power_of_2,
    rounded,
    score_factors,
    seen_keys,
    sequence_bounds,
    strides,
)
from abft_kernels.triton.merge import row_mass_combine_kernel, row_mass_dq_kernel


@triton.jit
def _load_packed(
    Q, Positions, Slopes, off_b, off_hk, packed, group_size, kv_heads, num_rows, key_offset, offs_d, start, end, log2e,
    stride_qb, stride_qh, stride_qm, stride_qd, HEAD_DIM: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """Tile `[BLOCK_R, BLOCK_D]` of packed rows, their positions, slopes, indices into `(H, R)`, and which there are.

    Absent rows are 0 and never read: what stands there, NaN too, has no effect.
    """
    in_range = packed < group_size * num_rows
    head = off_hk * group_size + packed // num_rows
    row = packed % num_rows
    position = tl.load(Positions + off_b * num_rows + row, mask=in_range, other=-1).to(tl.int32)
    present = position >= 0
    position -= key_offset
    if HAS_ENDS:
        present = present & (position >= start) & (position < end)
    pointers = Q + off_b * stride_qb + head[:, None] * stride_qh + row.to(tl.int64)[:, None] * stride_qm
    mask = present[:, None] & (offs_d[None, :] < HEAD_DIM)
    q = tl.load(pointers + offs_d[None, :] * stride_qd, mask=mask, other=0.0)
    slope2 = tl.zeros([packed.shape[0]], dtype=tl.float32)
    if HAS_SLOPES:
        slope2 = tl.load(Slopes + off_b * kv_heads * group_size + head, mask=in_range, other=0.0) * log2e
    return q, position, present, slope2[:, None], head * num_rows + row, in_range


@triton.jit
def _key_reach(position, present, start, end, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First and one past the last key that any row of the tile sees."""
    lo = start
    hi = end
    if IS_CAUSAL:
        hi = tl.minimum(end, tl.max(tl.where(present, position + 1, 0), 0))
        if HAS_WINDOW:
            lo = tl.maximum(start, tl.min(tl.where(present, position - window + 1, end), 0))
    else:
        hi = tl.where(tl.max(present.to(tl.int32), 0) > 0, end, start)
    return lo, hi


@triton.jit
def _row_mass_fwd_kernel(
    Q, K, V, Groups, Positions, Sinks, Slopes, Starts, Ends, PartOut, PartLSE, PartMass,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    kv_heads, group_size, num_rows, n_k, blocks_per_split, key_offset, window, qk_scale, softcap2, log2e, ln2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    num_tiles = tl.cdiv(group_size * num_rows, BLOCK_R)
    off_bk = (tl.program_id(0) // num_tiles).to(tl.int64)
    off_b = off_bk // kv_heads
    off_hk = off_bk % kv_heads
    off_keys = 0 if PACKED else off_b
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    packed = (tl.program_id(0) % num_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    start, end = sequence_bounds(Starts, Ends, off_b, n_k, HAS_STARTS, HAS_ENDS)
    q, position, own, slope2, index, in_range = _load_packed(
        Q, Positions, Slopes, off_b, off_hk, packed, group_size, kv_heads, num_rows, key_offset, offs_d, start, end,
        log2e, stride_qb, stride_qh, stride_qm, stride_qd, HEAD_DIM, HAS_ENDS, HAS_SLOPES,
    )  # fmt: skip
    start = tl.maximum(start, 0)
    end = tl.minimum(end, n_k)
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    v_base = k_base
    if HAS_V:
        v_base = V + off_b * stride_vb + off_hk * stride_vh
    groups_base = Q
    if GROUPS > 0:
        groups_base = Groups + off_keys * n_k * (GROUPS if HAS_WEIGHTS else 1)

    acc = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_R], dtype=tl.float32)
    m_i = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_R, GROUPS_PAD], dtype=tl.float32)
    lo, hi = _key_reach(position, own, start, end, window, IS_CAUSAL, HAS_WINDOW)
    lo = tl.maximum(split * blocks_per_split, lo // BLOCK_N) * BLOCK_N
    hi = tl.minimum((split + 1) * blocks_per_split * BLOCK_N, hi)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, start_n, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, True)
        s, factor, _ = base2_scores(
            q, k, position[:, None], offs_n[None, :], slope2, qk_scale, softcap2, HAS_SOFTCAP, HAS_SLOPES, PRECISION
        )  # [BLOCK_R, BLOCK_N]
        seen = seen_keys(position[:, None], offs_n[None, :], start, end, window, IS_CAUSAL, HAS_WINDOW) & own[:, None]
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        if HAS_V:
            v = load_rows(v_base, start_n, offs_n, offs_dv, stride_vn, stride_vd, start, end, HEAD_DIM_V, True)
            acc = matmul(rounded(p, v.dtype), v, acc * alpha[:, None], PRECISION)
        if GROUPS > 0:
            group = load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS)
            mass = mass * alpha[:, None]
            for g in tl.static_range(GROUPS):
                w = group_weight(g, group, groups_base, offs_n, start, end, GROUPS, HAS_WEIGHTS)
                mass = add_column(mass, g, tl.sum(p * w[None, :], 1), GROUPS_PAD)
        m_i = m_new

    some = ~(l_i == 0.0)  # a NaN sum must show
    if FINAL and HAS_SINKS:
        sink = tl.load(Sinks + index // num_rows, mask=in_range, other=0.0).to(tl.float32) * log2e
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        mass = mass * alpha[:, None]
        acc = acc * alpha[:, None]
        m_i = m_new
    l_i = tl.where(some, l_i, 1.0)
    lse = tl.where(some, m_i + tl.log2(l_i), float("-inf"))
    if FINAL:
        lse = lse * ln2
    mass = tl.where(some[:, None], mass / l_i[:, None], 0.0)
    acc = tl.where(some[:, None], acc / l_i[:, None], 0.0)
    row = off_b * kv_heads * group_size * num_rows + index
    part = row * num_splits + split
    tl.store(PartLSE + part, lse, mask=in_range)
    if GROUPS > 0:
        columns = tl.arange(0, GROUPS_PAD)
        pointers = PartMass + part[:, None] * GROUPS + columns[None, :]
        tl.store(pointers, mass, mask=in_range[:, None] & (columns < GROUPS)[None, :])
    if HAS_V:
        mask = in_range[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
        pointers = PartOut + part[:, None] * HEAD_DIM_V + offs_dv[None, :]
        if FINAL:
            pointers = PartOut + off_b * stride_ob + (index // num_rows)[:, None] * stride_oh
            pointers += (index % num_rows)[:, None] * stride_om + offs_dv[None, :] * stride_od
        tl.store(pointers, rounded(acc, PartOut.dtype.element_ty), mask=mask)


@triton.jit
def _row_mass_bwd_kernel(
    Q, K, Groups, Positions, Slopes, Starts, Ends, LSE, Mass, dMass, dLSE, PartDQ, dK, PartDW,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    kv_heads, group_size, num_rows, n_k, blocks_per_split, tiles_per_program, key_offset, window,
    scale, qk_scale, softcap2, log2e,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, PACKED: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DLSE: tl.constexpr,
    WRITE_DQ: tl.constexpr, WRITE_DK: tl.constexpr, WRITE_DW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    owners = tl.cdiv(tl.cdiv(group_size * num_rows, BLOCK_R), tiles_per_program)
    off_bk = (tl.program_id(0) // owners).to(tl.int64)
    off_b = off_bk // kv_heads
    off_hk = off_bk % kv_heads
    off_keys = 0 if PACKED else off_b
    offs_d = tl.arange(0, BLOCK_D)
    start, end = sequence_bounds(Starts, Ends, off_b, n_k, HAS_STARTS, HAS_ENDS)
    key_start = tl.maximum(start, 0)
    key_end = tl.minimum(end, n_k)
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    groups_base = Q
    if HAS_DMASS:
        groups_base = Groups + off_keys * n_k * (GROUPS if HAS_WEIGHTS else 1)
    key_base = (off_keys * kv_heads + off_hk) * n_k
    batch_base = off_b * kv_heads * group_size * num_rows
    first_tile = (tl.program_id(0) % owners) * tiles_per_program

    first_block = split * blocks_per_split
    last_block = (split + 1) * blocks_per_split
    if PACKED:  # the other keys are other sequences'
        first_block = tl.maximum(first_block, key_start // BLOCK_N)
        last_block = tl.minimum(last_block, tl.cdiv(key_end, BLOCK_N))
    dq = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for block in range(first_block, last_block):
        start_n = block * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, start_n, offs_n, offs_d, stride_kn, stride_kd, key_start, key_end, HEAD_DIM, True)
        group = offs_n
        if HAS_DMASS:
            group = load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS)
        dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dw = tl.zeros([BLOCK_N, GROUPS_PAD], dtype=tl.float32)
        for tile in range(first_tile, first_tile + tiles_per_program):
            packed = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            q, position, own, slope2, index, in_range = _load_packed(
                Q, Positions, Slopes, off_b, off_hk, packed, group_size, kv_heads, num_rows, key_offset, offs_d,
                start, end, log2e, stride_qb, stride_qh, stride_qm, stride_qd, HEAD_DIM, HAS_ENDS, HAS_SLOPES,
            )  # fmt: skip
            row = batch_base + index
            lse = tl.load(LSE + row, mask=in_range, other=float("-inf"))
            lse2 = tl.where(lse == float("-inf"), float("inf"), lse * log2e)
            s, factor, capped = base2_scores(
                q, k, position[:, None], offs_n[None, :], slope2, qk_scale, softcap2, HAS_SOFTCAP, HAS_SLOPES, PRECISION
            )
            p = tl.exp2(s * factor - lse2[:, None])
            seen = (
                seen_keys(position[:, None], offs_n[None, :], key_start, key_end, window, IS_CAUSAL, HAS_WINDOW)
                & own[:, None]
            )
            p = tl.where(seen, p, 0.0)
            slope = tl.zeros_like(p)
            if HAS_DMASS:
                for g in tl.static_range(GROUPS):
                    # The incoming gradient of an absent row may be anything.
                    dmass = tl.load(dMass + row * GROUPS + g, mask=in_range & own, other=0.0)
                    mass = tl.load(Mass + row * GROUPS + g, mask=in_range, other=0.0)
                    w = group_weight(g, group, groups_base, offs_n, key_start, key_end, GROUPS, HAS_WEIGHTS)
                    slope += dmass[:, None] * (w[None, :] - mass[:, None])
                    if WRITE_DW:
                        dw = add_column(dw, g, tl.sum(p * dmass[:, None], 0), GROUPS_PAD)
            if HAS_DLSE:
                slope += tl.load(dLSE + row, mask=in_range & own, other=0.0)[:, None]
            ds = tl.where(p == 0.0, 0.0, p * slope)
            if HAS_SOFTCAP:
                ds = ds * (1.0 - capped * capped)
            ds = rounded(ds, q.dtype)
            if WRITE_DK:
                dk = matmul(tl.trans(ds), q, dk, PRECISION)
            if WRITE_DQ:
                dq = matmul(ds, k, dq, PRECISION)
        limit_out = n_k
        first_out = 0
        if PACKED:
            limit_out = key_end
            first_out = key_start
        if WRITE_DK:
            mine = (offs_n >= first_out) & (offs_n < limit_out)
            pointers = dK + key_base * HEAD_DIM + offs_n[:, None] * HEAD_DIM + offs_d[None, :]
            mask = mine[:, None] & (offs_d < HEAD_DIM)[None, :]
            tl.store(pointers, rounded(dk * scale, dK.dtype.element_ty), mask=mask)
        if WRITE_DW:
            mine = (offs_n >= first_out) & (offs_n < limit_out)
            columns = tl.arange(0, GROUPS_PAD)
            pointers = PartDW + key_base * GROUPS + offs_n[:, None] * GROUPS + columns[None, :]
            tl.store(pointers, dw, mask=mine[:, None] & (columns < GROUPS)[None, :])
    if WRITE_DQ:
        packed = first_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        row = batch_base + off_hk * group_size * num_rows + packed
        pointers = PartDQ + (row * num_splits + split)[:, None] * HEAD_DIM + offs_d[None, :]
        mask = (packed < group_size * num_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(pointers, rounded(dq * scale, PartDQ.dtype.element_ty), mask=mask)


class _Grid:
    """How one call is cut: packed row tiles × splits of the keys × (sequences · KV heads)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, extras: Extras, options: Options):
        self.sequences, self.heads, self.num_rows, self.head_dim = q.shape
        self.kv_heads, self.n_k = k.shape[1], k.shape[2]
        self.group_size = self.heads // self.kv_heads
        self.head_dim_v = self.head_dim if v is None else v.shape[3]
        self.groups = options.num_groups
        self.block_d, self.block_dv = head_block(self.head_dim), head_block(self.head_dim_v)
        width = max(self.block_d, 0 if v is None else self.block_dv)
        config: Launch = launch_config("rows", width, q.element_size(), self.groups, q.device)
        packed = self.group_size * self.num_rows
        self.block_r = min(config.block_m, max(16, next_power_of_2(packed)))
        self.block_n, self.launch = config.block_n, config
        self.tiles = triton.cdiv(packed, self.block_r)
        self.programs = self.sequences * self.kv_heads
        blocks = triton.cdiv(self.n_k, self.block_n)
        self.blocks_per_split = triton.cdiv(
            blocks, row_splits(self.programs * self.tiles, blocks, _multiprocessors(q.device))
        )
        self.splits = triton.cdiv(blocks, self.blocks_per_split)
        # Packed sequences share the keys of one batch entry.
        self.k_strides = (0, *k.stride()[1:]) if options.packed else k.stride()
        self.meta: dict[str, Any] = {
            "HEAD_DIM": self.head_dim, "BLOCK_D": self.block_d, "BLOCK_R": self.block_r, "BLOCK_N": self.block_n,
            "GROUPS": self.groups, "GROUPS_PAD": next_power_of_2(max(1, self.groups)),
            "IS_CAUSAL": options.causal, "HAS_WINDOW": options.window > 0, "HAS_STARTS": extras.starts is not None,
            "HAS_ENDS": extras.ends is not None, "PACKED": options.packed,
            "HAS_WEIGHTS": self.groups > 0 and extras.weights is not None,
            "HAS_SLOPES": extras.slopes is not None, "HAS_SOFTCAP": options.softcap > 0,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _labels(extras: Extras) -> Tensor | None:
    return extras.weights if extras.weights is not None else extras.groups


def forward(q: Tensor, k: Tensor, positions: Tensor, extras: Extras, options: Options) -> tuple[Tensor, Tensor]:
    """Mass `(B, H, R, G)` and LSE `(B, H, R)`; arguments as in `abft_kernels.ops.row_mass_op`."""
    mass = torch.empty((*q.shape[:3], options.num_groups), dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or k.shape[2] == 0:
        return mass.zero_(), lse.fill_(float("-inf"))
    forward_into(None, mass, lse, q, k, None, positions, extras, options, options.offset)
    return mass, lse


def forward_into(
    out: Tensor | None,
    mass: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor,
    extras: Extras,
    options: Options,
    key_offset: int,
) -> None:
    """Launches the kernels; with v also the output of the rows, into `out` `(B, H, R, D_v)` of any strides."""
    grid = _Grid(q, k, v, extras, options)
    final = grid.splits == 1
    part_out, part_mass, part_lse = out, mass, lse
    if not final:
        parts = (lse.numel(), grid.splits)
        part_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        part_mass = torch.empty((*parts, grid.groups), dtype=torch.float32, device=q.device)
        if out is not None:
            part_out = torch.empty((*parts, grid.head_dim_v), dtype=torch.float32, device=q.device)
    out_strides = (0, 0, 0, 0) if out is None else out.stride()
    _row_mass_fwd_kernel[(grid.tiles * grid.programs, grid.splits)](
        q, k, v, _labels(extras), positions.contiguous(), extras.sinks, extras.slopes, extras.starts, extras.ends,
        part_out, part_lse, part_mass,
        *strides(q), *grid.k_strides, *(strides(v) if v is not None else (0, 0, 0, 0)), *out_strides,
        grid.kv_heads, grid.group_size, grid.num_rows, grid.n_k, grid.blocks_per_split, key_offset, options.window,
        *score_factors(options), LOG2E, LN2,
        HEAD_DIM_V=grid.head_dim_v, BLOCK_DV=grid.block_dv if v is not None else 1, HAS_V=v is not None,
        HAS_SINKS=extras.sinks is not None, FINAL=final, **grid.meta,
    )  # fmt: skip
    if final:
        return
    block = 32 if v is None else 8
    row_mass_combine_kernel[(triton.cdiv(lse.numel(), block),)](
        part_out, part_lse, part_mass, extras.sinks, out, lse, mass, *out_strides,
        lse.numel(), grid.heads, grid.num_rows, grid.splits, LOG2E, LN2,
        HEAD_DIM_V=grid.head_dim_v, BLOCK_DV=grid.block_dv if v is not None else 1, BLOCK=block,
        GROUPS=grid.groups, GROUPS_PAD=grid.meta["GROUPS_PAD"], HAS_V=v is not None,
        HAS_SINKS=extras.sinks is not None, num_warps=1,
    )  # fmt: skip


def backward(
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
    """dq, dk, dweights and dsinks (the last two empty if not wanted); arguments as in `row_mass_backward_op`."""
    labels = _labels(extras)
    if labels is None or options.num_groups == 0:
        dmass = None
    want_dw = weights_wanted and extras.weights is not None and dmass is not None
    dsinks = torch.empty(0, dtype=torch.float32, device=q.device)
    fresh = torch.zeros if options.packed or q.numel() == 0 or k.numel() == 0 else torch.empty
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    dk = fresh(k.shape, dtype=k.dtype, device=k.device)
    dw_shape = (k.shape[0], k.shape[1], k.shape[2], options.num_groups) if want_dw else (0,)
    dw = fresh(dw_shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dw.sum(1) if want_dw else dw, dsinks
    grid = _Grid(q, k, None, extras, options)
    part_dq = dq
    if grid.splits > 1:
        part_dq = torch.empty((lse.numel(), grid.splits, grid.head_dim), dtype=torch.float32, device=q.device)
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    positions = positions.contiguous()

    def launch(owners: int, tiles_per_program: int, write_dq: bool, write_dk: bool) -> None:
        _row_mass_bwd_kernel[(owners * grid.programs, grid.splits)](
            q, k, labels, positions, extras.slopes, extras.starts, extras.ends, lse, mass, dmass, dlse,
            part_dq, dk, dw, *strides(q), *grid.k_strides,
            grid.kv_heads, grid.group_size, grid.num_rows, grid.n_k, grid.blocks_per_split, tiles_per_program,
            options.offset, options.window, options.scale, *score_factors(options), LOG2E,
            HAS_DMASS=dmass is not None, HAS_DLSE=dlse is not None,
            WRITE_DQ=write_dq, WRITE_DK=write_dk, WRITE_DW=write_dk and want_dw, **grid.meta,
        )  # fmt: skip

    if grid.tiles == 1:
        launch(1, 1, True, True)
    else:  # dk sums over all tiles of rows, dq over all keys: an owner for each
        launch(1, grid.tiles, False, True)
        launch(grid.tiles, 1, True, False)
    if grid.splits > 1:
        block = max(1, 4096 // grid.block_d)
        row_mass_dq_kernel[(triton.cdiv(lse.numel(), block),)](
            part_dq, dq, lse.numel(), grid.splits,
            HEAD_DIM=grid.head_dim, BLOCK_D=grid.block_d, BLOCK=block, num_warps=4,
        )  # fmt: skip
    if extras.sinks is not None:
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        dsinks = sink_gradient(extras.sinks, lse, delta if dmass is None else delta + (dmass * mass).sum(-1))
    return dq, dk, dw.sum(1) if want_dw else dw, dsinks
