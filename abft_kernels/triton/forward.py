"""Fused forward: flash attention that also sums, per row, the probabilities of each group of keys.

With s = scale·log2(e)·q·k and running m = max s, per block of keys

    p = 2^(s − m_new)      α = 2^(m_old − m_new)
    l ← l·α + Σ p          acc ← acc·α + p V          mass_g ← mass_g·α + Σ_j p_j [group_j = g]

and at the end out = acc / l, mass = mass / l, lse = (m + log2 l)·ln 2. The sum for mass uses the float32 p, not
the rounded one that meets V: at mass 0.999 bfloat16 rounding alone would exceed 1 − mass.
Blocks of keys without a label skip the mass sums; blocks that every row sees whole skip the masking.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.launch import launch_config
from abft_kernels.triton.common import (
    LN2,
    LOG2E,
    head_block,
    key_range,
    labelled_blocks,
    load_rows,
    masked_block,
    matmul,
    next_power_of_2,
    query_bounds,
    rounded,
    sample_bounds,
    store_rows,
    strides,
)


@triton.jit
def _forward_block(
    acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
    start_n, offs_d, rows, start, end,
    stride_kn, stride_kd, stride_vn, stride_vd, n_k, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_base, offs_n, offs_d, stride_kn, stride_kd, start, end, HEAD_DIM, MASKED)  # [BLOCK_N, BLOCK_D]
    s = matmul(q, tl.trans(k), None, PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        visible = (offs_n >= start) & (offs_n < end)
        seen = visible[None, :]
        if IS_CAUSAL:
            seen = seen & (offs_n[None, :] <= rows[:, None])
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen no key yet keeps m = −inf; 2^(−inf − 0) = 0 without a NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = m_new
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = load_rows(v_base, offs_n, offs_d, stride_vn, stride_vd, start, end, HEAD_DIM, MASKED)
    acc = matmul(rounded(p, v.dtype), v, acc, PRECISION)
    if GROUPS > 0:
        mass = mass * alpha[:, None]
        if tl.load(labelled_base + start_n // BLOCK_N) != 0:
            group = tl.load(groups_base + offs_n, mask=offs_n < n_k, other=-1)
            columns = tl.arange(0, GROUPS_PAD)
            for g in tl.static_range(GROUPS):
                in_group = tl.sum(tl.where((group == g)[None, :], p, 0.0), 1)
                mass += tl.where((columns == g)[None, :], in_group[:, None], 0.0)
    return acc, l_i, m_new, mass


@triton.jit
def _mass_attn_fwd_kernel(
    Q, K, V, Groups, Labelled, Starts, Ends, Out, Mass, LSE,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    heads, group_size, n_q, n_k, num_label_blocks, qk_scale, ln2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One grid dimension: the others end at 65,535. Causal rows grow with their index: longest first evens out
    # the tail.
    num_tiles = tl.cdiv(n_q, BLOCK_M)
    off_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    start_m = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    off_b = off_bh // heads
    off_h = off_bh % heads
    off_hk = off_h // group_size
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m + (n_k - n_q)
    start, end = sample_bounds(Starts, Ends, off_b, n_k, HAS_STARTS, HAS_ENDS)

    q_base = Q + off_b * stride_qb + off_h * stride_qh
    k_base = K + off_b * stride_kb + off_hk * stride_kh
    v_base = V + off_b * stride_vb + off_hk * stride_vh
    groups_base, labelled_base = Q, Q
    if GROUPS > 0:
        groups_base, labelled_base = Groups + off_b * n_k, Labelled + off_b * num_label_blocks
    first_m, limit_m = query_bounds(start, end, n_q, n_k, HAS_ENDS)
    q = load_rows(q_base, offs_m, offs_d, stride_qm, stride_qd, first_m, limit_m, HEAD_DIM, True)

    lo, full_lo, full_hi, head_blocks, tail_blocks = key_range(
        start_m + (n_k - n_q), start, end, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_ENDS
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    for start_n in range(full_lo, full_hi, BLOCK_N):
        acc, l_i, m_i, mass = _forward_block(
            acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
            start_n, offs_d, rows, start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, qk_scale,
            HEAD_DIM, BLOCK_N, GROUPS, GROUPS_PAD, False, IS_CAUSAL, PRECISION,
        )  # fmt: skip
    for block in range(head_blocks + tail_blocks):
        start_n = masked_block(block, lo, full_hi, head_blocks, BLOCK_N)
        acc, l_i, m_i, mass = _forward_block(
            acc, l_i, m_i, mass, q, k_base, v_base, groups_base, labelled_base,
            start_n, offs_d, rows, start, end,
            stride_kn, stride_kd, stride_vn, stride_vd, n_k, qk_scale,
            HEAD_DIM, BLOCK_N, GROUPS, GROUPS_PAD, True, IS_CAUSAL, PRECISION,
        )  # fmt: skip

    present = ~(l_i == 0.0)  # a NaN sum is a present row: it must show
    if HAS_ENDS:
        present = present & (offs_m >= first_m) & (offs_m < limit_m)
    l_i = tl.where(present, l_i, 1.0)
    lse = tl.where(present, (m_i + tl.log2(l_i)) * ln2, float("-inf"))
    row_base = off_bh * n_q
    in_range = offs_m < n_q
    tl.store(LSE + row_base + offs_m, lse, mask=in_range)
    if GROUPS > 0:
        columns = tl.arange(0, GROUPS_PAD)
        pointers = Mass + (row_base + offs_m)[:, None] * GROUPS + columns[None, :]
        mass = tl.where(present[:, None], mass / l_i[:, None], 0.0)
        tl.store(pointers, mass, mask=in_range[:, None] & (columns < GROUPS)[None, :])
    out_base = Out + off_b * stride_ob + off_h * stride_oh
    out = tl.where(present[:, None], acc / l_i[:, None], 0.0)
    store_rows(out_base, offs_m, offs_d, stride_om, stride_od, n_q, out, HEAD_DIM)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    num_groups: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel; arguments as in `abft_kernels.ops.mass_attention_op`."""
    batch, heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    out = torch.empty((batch, n_q, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    mass = torch.empty((batch, heads, n_q, num_groups), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, mass, lse
    block_d = head_block(head_dim)
    config = launch_config("forward", block_d, q.element_size(), num_groups, q.device)
    labelled = None if groups is None else labelled_blocks(groups, config.block_n)
    _mass_attn_fwd_kernel[(triton.cdiv(n_q, config.block_m) * batch * heads,)](
        q, k, v, None if groups is None else groups.contiguous(), labelled, starts, ends, out, mass, lse,
        *strides(q, k, v, out),
        heads, heads // k.shape[1], n_q, n_k, 0 if labelled is None else labelled.shape[1],
        scale * LOG2E, LN2,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        GROUPS=num_groups, GROUPS_PAD=max(1, next_power_of_2(max(1, num_groups))), IS_CAUSAL=causal,
        HAS_STARTS=starts is not None, HAS_ENDS=ends is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, mass, lse
