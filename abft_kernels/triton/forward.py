"""Fused forward: flash attention that also sums, per row, the probabilities of each group of keys.

With scores s in base 2 (scale·log2(e)·q·k, soft-capped and biased where asked for) and running m = max s, per block
of keys

    p = 2^(s − m_new)      α = 2^(m_old − m_new)
    l ← l·α + Σ p          acc ← acc·α + p V          mass_g ← mass_g·α + Σ_j p_j w_jg

and at the end out = acc / l, mass = mass / l, lse = (m + log2 l)·ln 2; a sink is one more score, met last, in l
alone. Dropout zeroes elements of the p that meets V. w_jg is the indicator of group g, or the key's weight in it.
The sum for mass uses the float32 p, not the rounded one that meets V: at mass 0.999 bfloat16 rounding alone would
exceed 1 − mass. Blocks of keys without a label, and tiles without a wanted row, skip the mass sums; blocks that
every row sees whole skip the masking. Without V there is the mass alone.

Packed sequences share one batch: a tile of rows lies within one sequence, and `Tiles` tells which.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.launch import decodes, launch_config
from abft_kernels.spec import Extras, Options
from abft_kernels.triton import rows as row_kernel
from abft_kernels.triton.common import (
    LN2,
    LOG2E,
    add_column,
    any_key,
    base2_scores,
    dropout_keep,
    group_weight,
    head_block,
    key_phases,
    labelled_blocks,
    load_groups,
    load_rows,
    masked_block,
    matmul,
    next_power_of_2,
    query_bounds,
    rounded,
    score_factors,
    seen_keys,
    sequence_bounds,
    sequence_tiles,
    store_rows,
    strides,
)


@triton.jit
def _forward_block(
    acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
    start_n, offs_m, offs_d, offs_dv, rows, start, end, wanted, stream, slope2,
    stride_kn, stride_kd, stride_vn, stride_vd, n_k, window, qk_scale, softcap2, keep_scale, threshold, seed,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(
        k_base, start_n, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, MASKED
    )  # [BLOCK_N, BLOCK_D]
    keys = offs_n[None, :]
    s, factor, _ = base2_scores(q, k, rows, keys, slope2, qk_scale, softcap2, HAS_SOFTCAP, HAS_SLOPES, PRECISION)
    if MASKED:
        seen = seen_keys(rows, keys, start, end, window, IS_CAUSAL, HAS_WINDOW)
        s = tl.where(seen, s, float("-inf"))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        # A row that has seen no key yet keeps m = −inf; 2^(−inf − 0) = 0 without a NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        shift = m_new
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    if HAS_V:
        acc = acc * alpha[:, None]
        v = load_rows(v_base, start_n, offs_n, offs_dv, stride_vn, stride_vd, start, end, HEAD_DIM_V, MASKED)
        kept = p
        if HAS_DROPOUT:
            kept = tl.where(dropout_keep(seed, offs_m[:, None], keys, stream, threshold), p * keep_scale, 0.0)
        acc = matmul(rounded(kept, v.dtype), v, acc, PRECISION)
    if GROUPS > 0:
        mass = mass * alpha[:, None]
        if tl.load(labelled_base + start_n // BLOCK_N) * wanted != 0:
            group = load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS)
            for g in tl.static_range(GROUPS):
                w = group_weight(g, group, groups_base, offs_n, start, end, GROUPS, HAS_WEIGHTS)
                mass = add_column(mass, g, tl.sum(p * w[None, :], 1), GROUPS_PAD)
    return acc, l_i, m_new, mass


@triton.jit
def _mass_attn_fwd_kernel(
    Q, K, V, Groups, Labelled, Sinks, Slopes, Starts, Ends, RowMask, Tiles, Out, Mass, LSE,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    heads, group_size, n_q, n_k, num_tiles, num_label_blocks, offset, window,
    qk_scale, softcap2, keep_scale, log2e, ln2, threshold, seed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr, HAS_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ROW_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # One grid dimension: the others end at 65,535. Causal rows grow with their index: longest first evens out
    # the tail.
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    start_m = (num_tiles - 1 - tile) * BLOCK_M
    off_b = off_bh // heads
    off_h = off_bh % heads
    off_hk = off_h // group_size
    sequence = off_b
    if PACKED:
        sequence = tl.load(Tiles + 2 * tile)
        start_m = tl.load(Tiles + 2 * tile + 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m + offset
    start, end = sequence_bounds(Starts, Ends, sequence, n_k, HAS_STARTS, HAS_ENDS)
    first_m, limit_m = query_bounds(start, end, n_q, offset, HAS_ENDS)
    own = (offs_m >= first_m) & (offs_m < limit_m)
    start = tl.maximum(start, 0)
    end = tl.minimum(end, n_k)

    q_base = Q + off_b * stride_qb + off_h * stride_qh
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    v_base = k_base
    if HAS_V:
        v_base = V + off_b * stride_vb + off_hk * stride_vh
    groups_base, labelled_base, wanted, slope2 = Q, Q, 1, 0.0
    if GROUPS > 0:
        groups_base = Groups + off_b * n_k * (GROUPS if HAS_WEIGHTS else 1)
        labelled_base = Labelled + off_b * num_label_blocks
    row_wanted = own
    if HAS_ROW_MASK:
        row_wanted = tl.load(RowMask + off_b * n_q + offs_m, mask=own, other=0) != 0
        wanted = tl.max(row_wanted.to(tl.int32), 0)
    if HAS_SLOPES:
        slope2 = tl.load(Slopes + off_bh) * log2e
    q = load_rows(q_base, start_m, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, True)
    first, full_lo, full_hi, before, behind = key_phases(
        start_m + offset, start_m + BLOCK_M - 1 + offset, start, end, window,
        (start_m >= limit_m) | (start_m + BLOCK_M <= first_m), BLOCK_N, IS_CAUSAL, HAS_WINDOW, HAS_ENDS,
    )  # fmt: skip

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    for start_n in range(full_lo, full_hi, BLOCK_N):
        acc, l_i, m_i, mass = _forward_block(
            acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
            start_n, offs_m, offs_d, offs_dv, rows[:, None], start, end, wanted, off_bh, slope2,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, window,
            qk_scale, softcap2, keep_scale, threshold, seed,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, GROUPS_PAD, False, IS_CAUSAL,
            HAS_WINDOW, HAS_V, HAS_WEIGHTS, HAS_SOFTCAP, HAS_SLOPES, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    for block in tl.range(0, before + behind, num_stages=1):
        start_n = masked_block(block, first, full_hi, before, BLOCK_N)
        acc, l_i, m_i, mass = _forward_block(
            acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
            start_n, offs_m, offs_d, offs_dv, rows[:, None], start, end, wanted, off_bh, slope2,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, window,
            qk_scale, softcap2, keep_scale, threshold, seed,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, GROUPS_PAD, True, IS_CAUSAL,
            HAS_WINDOW, HAS_V, HAS_WEIGHTS, HAS_SOFTCAP, HAS_SLOPES, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    # A NaN sum is a present row: it must show.
    present = own & any_key(rows, start, end, window, IS_CAUSAL, HAS_WINDOW) & ~(l_i == 0.0)
    if HAS_SINKS:
        sink = tl.load(Sinks + off_h).to(tl.float32) * log2e
        m_new = tl.maximum(m_i, sink)
        l_i = l_i * tl.exp2(m_i - m_new) + tl.exp2(sink - m_new)
        acc = acc * tl.exp2(m_i - m_new)[:, None]
        mass = mass * tl.exp2(m_i - m_new)[:, None]
        m_i = m_new
    l_i = tl.where(present, l_i, 1.0)
    lse = tl.where(present, (m_i + tl.log2(l_i)) * ln2, float("-inf"))
    row_base = off_bh * n_q
    limit_out = n_q
    written = offs_m < n_q
    if PACKED:  # rows behind the sequence are another tile's
        limit_out = limit_m
        written = own
    tl.store(LSE + row_base + offs_m, lse, mask=written)
    if GROUPS > 0:
        columns = tl.arange(0, GROUPS_PAD)
        pointers = Mass + (row_base + offs_m)[:, None] * GROUPS + columns[None, :]
        mass = tl.where((present & row_wanted)[:, None], mass / l_i[:, None], 0.0)
        tl.store(pointers, mass, mask=written[:, None] & (columns < GROUPS)[None, :])
    if HAS_V:
        out_base = Out + off_b * stride_ob + off_h * stride_oh
        out = tl.where(present[:, None], acc / l_i[:, None], 0.0)
        store_rows(out_base, start_m, offs_m, offs_dv, stride_om, stride_od, limit_out, out, HEAD_DIM_V)


def features(q: Tensor, v: Tensor | None, extras: Extras, options: Options, groups: int) -> dict[str, Any]:
    """The compile-time arguments that both passes share; `groups` 0 is plain attention."""
    head_dim_v = q.shape[-1] if v is None else v.shape[-1]
    return {
        "HEAD_DIM": q.shape[-1], "BLOCK_D": head_block(q.shape[-1]),
        "HEAD_DIM_V": head_dim_v, "BLOCK_DV": head_block(head_dim_v),
        "GROUPS": groups, "IS_CAUSAL": options.causal, "HAS_WINDOW": options.window > 0,
        "HAS_STARTS": extras.starts is not None, "HAS_ENDS": extras.ends is not None, "PACKED": options.packed,
        "HAS_V": v is not None, "HAS_WEIGHTS": groups > 0 and extras.weights is not None,
        "HAS_SLOPES": extras.slopes is not None, "HAS_SOFTCAP": options.softcap > 0,
        "HAS_ROW_MASK": groups > 0 and extras.row_mask is not None,
        "HAS_DROPOUT": v is not None and options.dropout_p > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def head_tile(q: Tensor, v: Tensor | None) -> int:
    """Width of the wider head tile, by which the launch is chosen."""
    return head_block(max(q.shape[-1], 0 if v is None else v.shape[-1]))


def dropout_arguments(options: Options) -> tuple[float, int, int]:
    """Factor of kept probabilities, threshold of the random 31 bits, seed."""
    return 1.0 / (1.0 - options.dropout_p), int(options.dropout_p * (1 << 31)), options.seed


def row_tiles(extras: Extras, options: Options, length: int, block: int) -> tuple[Tensor | None, int]:
    """The map of tiles of packed sequences (None if they are not), and the number of tiles."""
    if options.packed and extras.starts is not None and extras.ends is not None:
        tiles = sequence_tiles(extras.starts, extras.ends, length, block)
        return tiles, tiles.shape[0]
    return None, triton.cdiv(length, block)


def forward(q: Tensor, k: Tensor, v: Tensor | None, extras: Extras, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel: output `(B, H, N_q, D_v)` (empty without v), mass `(B, H, N_q, G)`, LSE `(B, H, N_q)`."""
    batch, heads, n_q, _ = q.shape
    n_k, groups = k.shape[2], options.num_groups
    # Packed sequences may leave tokens over, which no program owns.
    fresh = torch.zeros if options.packed else torch.empty
    shape = (batch, n_q, heads, 0 if v is None else v.shape[3])
    out = fresh(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    mass = fresh((batch, heads, n_q, groups), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    if options.packed:
        lse.fill_(float("-inf"))
    if lse.numel() == 0:
        return out, mass, lse
    if v is not None and not options.packed and extras.row_mask is None and options.dropout_p == 0:  # noqa: SIM102
        if n_k > 0 and decodes(n_q, heads // k.shape[1], n_k):
            # Positions may not be negative: they are counted from row 0, which stands at `offset`.
            positions = torch.arange(n_q, device=q.device, dtype=torch.int32).expand(batch, -1)
            row_kernel.forward_into(out, mass, lse, q, k, v, positions, extras, options, -options.offset)
            return out, mass, lse
    labels = extras.weights if extras.weights is not None else extras.groups
    config = launch_config("forward", head_tile(q, v), q.element_size(), groups, q.device)
    labelled = labelled_blocks(labels, config.block_n) if labels is not None and groups else None
    keep_scale, threshold, seed = dropout_arguments(options)
    tiles, num_tiles = row_tiles(extras, options, n_q, config.block_m)
    _mass_attn_fwd_kernel[(num_tiles * batch * heads,)](
        q, k, v, labels, labelled, extras.sinks, extras.slopes, extras.starts, extras.ends, extras.row_mask, tiles,
        out, mass, lse,
        *strides(q, k), *(strides(v) if v is not None else (0, 0, 0, 0)), *strides(out),
        heads, heads // k.shape[1], n_q, n_k, num_tiles, 0 if labelled is None else labelled.shape[1],
        options.offset, options.window,
        *score_factors(options), keep_scale, LOG2E, LN2, threshold, seed,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUPS_PAD=next_power_of_2(max(1, groups)),
        HAS_SINKS=extras.sinks is not None, num_warps=config.num_warps, num_stages=config.num_stages,
        **features(q, v, extras, options, groups),
    )  # fmt: skip
    return out, mass, lse
