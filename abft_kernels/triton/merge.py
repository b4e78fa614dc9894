"""What puts the splits of the row kernel together again, in a fixed order."""

import triton
import triton.language as tl

from abft_kernels.triton.common import load_rows, rounded, store_rows


@triton.jit
def row_mass_combine_kernel(
    PartOut, PartLSE, PartMass, Sinks, Out, LSE, Mass,
    stride_ob, stride_oh, stride_om, stride_od,
    total_rows, heads, num_rows, num_splits, log2e, ln2,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, HAS_V: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = offs < total_rows
    head = (offs // num_rows) % heads
    columns = tl.arange(0, GROUPS_PAD)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_i = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK], dtype=tl.float32)
    mass = tl.zeros([BLOCK, GROUPS_PAD], dtype=tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_DV], dtype=tl.float32)
    for split in range(num_splits):
        part = tl.load(PartLSE + offs * num_splits + split, mask=in_range, other=float("-inf"))
        m_new = tl.maximum(m_i, part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(part - shift)
        l_i = l_i * alpha + weight
        if GROUPS > 0:
            pointers = PartMass + (offs * num_splits + split)[:, None] * GROUPS + columns[None, :]
            part_mass = tl.load(pointers, mask=in_range[:, None] & (columns < GROUPS)[None, :], other=0.0)
            mass = mass * alpha[:, None] + part_mass * weight[:, None]
        if HAS_V:
            pointers = PartOut + (offs * num_splits + split)[:, None] * HEAD_DIM_V + offs_dv[None, :]
            part_out = tl.load(pointers, mask=in_range[:, None] & (offs_dv < HEAD_DIM_V)[None, :], other=0.0)
            acc = acc * alpha[:, None] + part_out * weight[:, None]
        m_i = m_new
    some = ~(l_i == 0.0)
    if HAS_SINKS:
        sink = tl.load(Sinks + head, mask=in_range, other=0.0).to(tl.float32) * log2e
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        mass = mass * alpha[:, None]
        acc = acc * alpha[:, None]
        m_i = m_new
    l_i = tl.where(some, l_i, 1.0)
    tl.store(LSE + offs, tl.where(some, (m_i + tl.log2(l_i)) * ln2, float("-inf")), mask=in_range)
    if GROUPS > 0:
        pointers = Mass + offs[:, None] * GROUPS + columns[None, :]
        mass = tl.where(some[:, None], mass / l_i[:, None], 0.0)
        tl.store(pointers, mass, mask=in_range[:, None] & (columns < GROUPS)[None, :])
    if HAS_V:
        pointers = Out + (offs // (num_rows * heads))[:, None] * stride_ob + head[:, None] * stride_oh
        pointers += (offs % num_rows)[:, None] * stride_om + offs_dv[None, :] * stride_od
        acc = tl.where(some[:, None], acc / l_i[:, None], 0.0)
        mask = in_range[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
        tl.store(pointers, rounded(acc, Out.dtype.element_ty), mask=mask)


@triton.jit
def row_mass_dq_kernel(
    PartDQ, dQ, total_rows, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK
    offs_m = start_m + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for split in range(num_splits):
        part = PartDQ + split * HEAD_DIM
        dq += load_rows(part, start_m, offs_m, offs_d, num_splits * HEAD_DIM, 1, 0, total_rows, HEAD_DIM, True)
    store_rows(dQ, start_m, offs_m, offs_d, HEAD_DIM, 1, total_rows, dq, HEAD_DIM)
