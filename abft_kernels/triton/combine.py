"""Put the splits of the row kernel together again, in a fixed order.

m = max_s lse_s      out = Σ_s out_s·2^(lse_s − m) / Σ_s 2^(lse_s − m)      mass likewise      dq = Σ_s dq_s
"""

import triton
import triton.language as tl

from abft_kernels.triton.common import UNSPECIALIZED, load_tile, scatter, store_tile
from abft_kernels.triton.softmax import LN2, finish
from abft_kernels.triton.structs import Rows


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_mass_combine_kernel(
    part_out, part_lse, part_mass, sinks, out, lse, mass, total_rows, heads, num_rows, num_splits, F: tl.constexpr
):
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS_PAD: tl.constexpr = F.groups_pad
    offs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs < total_rows
    head = (offs // num_rows) % heads
    columns = tl.arange(0, GROUPS_PAD)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    sums = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    for split in range(num_splits):
        row = offs * num_splits + split
        part = tl.load(part_lse + row, mask=in_range, other=float("-inf"))
        m_new = tl.maximum(m_i, part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(part - shift)
        l_i = l_i * alpha + weight
        if F.groups > 0:
            pointers = part_mass + row[:, None] * F.groups + columns[None, :]
            of_part = tl.load(pointers, mask=in_range[:, None] & (columns < F.groups)[None, :], other=0.0)
            sums = sums * alpha[:, None] + of_part * weight[:, None]
        if F.v:
            pointers = part_out + row[:, None] * F.head_dim_v + offs_dv[None, :]
            of_part = tl.load(pointers, mask=in_range[:, None] & (offs_dv < F.head_dim_v)[None, :], other=0.0)
            acc = acc * alpha[:, None] + of_part * weight[:, None]
        m_i = m_new
    acc, sums, lse2 = finish(acc, sums, m_i, l_i, ~(l_i == 0.0), sinks, head, in_range, F.sinks)
    tl.store(lse + offs, lse2 * LN2, mask=in_range)
    if F.groups > 0:
        scatter(mass + offs * F.groups, 1, sums, in_range, F.groups)
    if F.v:
        pointers = out.ptr + offs // (num_rows * heads) * out.b + head * out.h + offs % num_rows * out.n
        scatter(pointers, out.d, acc, in_range, F.head_dim_v)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_mass_dq_kernel(part_dq, dq, total_rows, num_splits, F: tl.constexpr):
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_D: tl.constexpr = F.block_d
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for split in range(num_splits):
        part = Rows(part_dq + split * F.head_dim, num_splits * F.head_dim, 1)
        total += load_tile(part, start_m, offs_m, offs_d, 0, total_rows, F.head_dim, True)
    store_tile(Rows(dq, F.head_dim, 1), start_m, offs_m, offs_d, total_rows, total, F.head_dim)
