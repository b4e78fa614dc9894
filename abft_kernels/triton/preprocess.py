"""Statistics of the rows for the backward kernels: LSE in base 2, and δ of `abft_kernels.triton.backward`."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.triton.common import UNSPECIALIZED, load_tile, locate, one_head
from abft_kernels.triton.softmax import LOG2E


class Statistics(NamedTuple):
    """The statistics of every row, contiguous `(B, H, N_q, …)`."""

    lse2: Tensor  # LSE in base 2; +inf for absent rows
    delta: Tensor
    dmass: Tensor | None
    row_mask: Tensor | None  # (B, N_q)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_attn_bwd_preprocess_kernel(out, do, mass, lse, dlse, statistics, heads, n_q, num_tiles, F: tl.constexpr):
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS: tl.constexpr = F.groups
    at = locate(heads, num_tiles, BLOCK_M, False)
    offs_m = at.start + tl.arange(0, BLOCK_M)
    in_range = offs_m < n_q
    row = at.bh * n_q + offs_m
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    if F.v:
        offs_dv = tl.arange(0, BLOCK_DV)
        out_tile = load_tile(one_head(out, at.b, at.h), at.start, offs_m, offs_dv, 0, n_q, F.head_dim_v, True)
        do_tile = load_tile(one_head(do, at.b, at.h), at.start, offs_m, offs_dv, 0, n_q, F.head_dim_v, True)
        delta += tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    for g in tl.static_range(GROUPS):
        m = tl.load(mass + row * GROUPS + g, mask=in_range, other=0.0)
        delta += m * tl.load(statistics.dmass + row * GROUPS + g, mask=in_range, other=0.0)
    if F.dlse:
        delta -= tl.load(dlse + row, mask=in_range, other=0.0)
    lse_rows = tl.load(lse + row, mask=in_range, other=0.0)
    absent = lse_rows == float("-inf")
    tl.store(statistics.delta + row, tl.where(absent, 0.0, delta), mask=in_range)
    # +inf, so that every probability of an absent row is 0.
    tl.store(statistics.lse2 + row, tl.where(absent, float("inf"), lse_rows * LOG2E), mask=in_range)
