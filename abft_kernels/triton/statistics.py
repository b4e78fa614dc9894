"""Statistics of the rows for the backward kernels: LSE in base 2, and δ of `abft_kernels.triton.backward`."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.triton.common import UNSPECIALIZED, load_tile, locate, one_head
from abft_kernels.triton.softmax import LOG2E
from abft_kernels.triton.structs import Rows


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


class HeadRows(NamedTuple):
    """Where the statistics of a head's rows begin, and where its sample's do in `row_mask`."""

    base: tl.tensor
    sample: tl.tensor
    n_q: tl.tensor
    dq: Rows  # with `atomic_dq`


@triton.jit
def load_statistics(statistics, head, offs_m, CHECKED: tl.constexpr):
    """Load LSE in base 2 and δ of a tile of rows."""
    if CHECKED:
        lse2 = tl.load(statistics.lse2 + head.base + offs_m, mask=offs_m < head.n_q, other=float("inf"))
        delta = tl.load(statistics.delta + head.base + offs_m, mask=offs_m < head.n_q, other=0.0)
    else:
        lse2 = tl.load(statistics.lse2 + head.base + offs_m)
        delta = tl.load(statistics.delta + head.base + offs_m)
    return lse2, delta


@triton.jit
def load_dmass(statistics, head, g, offs_m, wanted, F: tl.constexpr):
    """Load dmass_g of a tile of rows; that of absent and unwanted rows is 0, whatever came in."""
    return tl.load(statistics.dmass + (head.base + offs_m) * F.groups + g, mask=wanted, other=0.0)


@triton.jit
def wanted_rows(statistics, head, offs_m, lse2, F: tl.constexpr):
    """Return the rows whose dmass counts, and 0 if there are none (without a mask of rows always 1)."""
    wanted = (offs_m < head.n_q) & (lse2 != float("inf"))
    some = 1
    if F.row_mask:
        pointers = statistics.row_mask + head.sample + offs_m
        wanted = wanted & (tl.load(pointers, mask=offs_m < head.n_q, other=0) != 0)
        some = tl.max(wanted.to(tl.int32), 0)
    return wanted, some
