"""Put the splits of the row kernel together again, in a fixed order.

m = max_s lse_s      out = Σ_s out_s·2^(lse_s − m) / Σ_s 2^(lse_s − m)      mass likewise      dq = Σ_s dq_s
"""

import triton
import triton.language as tl

from abft_kernels.triton.common import UNSPECIALIZED, locate, one_head, scatter
from abft_kernels.triton.softmax import LN2, finish


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
def row_mass_dq_kernel(
    part_dq, dq, positions, heads, num_rows, n_q, num_tiles, num_sequences, num_splits, offset, F: tl.constexpr
):
    """Write dq of a tile of queries: the sum of its rows' parts, 0 without any; with F.add, add them to what is there.

    Rows are looked for by position, so that each query is written once, however often it was chosen.
    """
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    at = locate(heads, num_tiles, BLOCK_M, False)
    offs_m = at.start + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    begin = (at.b * num_rows).to(tl.int32)
    end = begin + num_rows
    if F.packed:  # rows of any sequence
        end = num_sequences * num_rows
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    chosen = tl.zeros([BLOCK_M], dtype=tl.int32)
    for first in range(begin, end, BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)
        place = index - begin
        valid = index < end
        if F.whole:
            position = tl.load(positions + index, mask=valid, other=-1)
            valid = valid & (position >= 0)
            place = (position - offset).to(tl.int32)
        here = (place[None, :] == offs_m[:, None]) & valid[None, :]  # [BLOCK_M, BLOCK_N]
        found = tl.sum(here.to(tl.int32), 1)
        row = tl.full([BLOCK_M], -1, dtype=tl.int32)
        for _ in range(tl.max(found, 0)):
            row = tl.min(tl.where(here & (index[None, :] > row[:, None]), index[None, :], end), 1)
            of_head = row // num_rows * heads + at.h
            part = ((of_head * num_rows + row % num_rows) * num_splits).to(tl.int64)
            mask = (row < end)[:, None] & (offs_d[None, :] < F.head_dim)
            for split in range(num_splits):
                pointers = part_dq + ((part + split) * F.head_dim)[:, None] + offs_d[None, :]
                total += tl.load(pointers, mask=mask, other=0.0)
        chosen += found
    written = offs_m < n_q
    if F.add:
        written = written & (chosen > 0)
    rows = one_head(dq, at.b, at.h)
    scatter(rows.ptr + offs_m.to(tl.int64) * rows.n, rows.d, total, written, F.head_dim, F.add)
