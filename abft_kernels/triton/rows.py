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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.masking import MAX_POSITIONS
from abft_kernels.merging import sink_gradient
from abft_kernels.triton.combine import row_mass_combine_kernel, row_mass_dq_kernel
from abft_kernels.triton.common import INTERPRETED, UNSPECIALIZED, load_tile, locate, matmul, one_head, rounded, scatter
from abft_kernels.triton.labels import add_column, add_masses, group_weight, key_labels, load_groups, sample_labels
from abft_kernels.triton.launch import SMALL, launch_config, row_splits
from abft_kernels.triton.masks import key_reach, seen_keys, sequence_keys
from abft_kernels.triton.softmax import LN2, LOG2E, base2_scores, finish, probabilities, softmax_step
from abft_kernels.triton.structs import (
    Features,
    Heads,
    RowCounts,
    RowShape,
    RowSizes,
    Scores,
    Sequences,
    features,
    head_tile,
    next_power_of_2,
)

_LAST_POSITION = tl.constexpr(MAX_POSITIONS - 1)


class PackedRows(NamedTuple):
    """A tile of the rows of all query heads of a KV head."""

    q: tl.tensor  # [BLOCK_M, BLOCK_D]; absent rows are 0
    position: tl.tensor
    own: tl.tensor  # rows that are there
    index: tl.tensor  # into (B, H, R)
    head: tl.tensor
    row: tl.tensor
    in_range: tl.tensor


@triton.jit
def _row_shape(counts, n_k, blocks_per_split, key_offset):
    return RowShape(
        counts.kv_heads,
        counts.group_size,
        counts.num_rows,
        counts.tiles_per_program,
        n_k,
        blocks_per_split,
        key_offset,
    )


@triton.jit
def _packed_tile(q, positions, scores, at, first, keys, shape, F: tl.constexpr):
    """Load a tile of packed rows, and return it with its scores: of each row, the slope of its head.

    Absent rows are never read: what stands there, NaN too, has no effect.
    """
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_D: tl.constexpr = F.block_d
    packed = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_range = packed < shape.group_size * shape.num_rows
    head = at.h * shape.group_size + packed // shape.num_rows
    row = packed % shape.num_rows
    position = tl.load(positions + at.b * shape.num_rows + row, mask=in_range, other=-1)
    position = tl.minimum(position, _LAST_POSITION).to(tl.int32)
    own = position >= 0
    position -= shape.key_offset
    if F.ends:
        own = own & (position >= keys.origin) & (position < keys.limit)
    pointers = q.ptr + at.b * q.b + head[:, None] * q.h + row.to(tl.int64)[:, None] * q.n
    mask = own[:, None] & (offs_d[None, :] < F.head_dim)
    tile_q = tl.load(pointers + offs_d[None, :] * q.d, mask=mask, other=0.0)
    slope2 = tl.zeros([BLOCK_M], dtype=tl.float32)
    batch_head = at.b * shape.kv_heads * shape.group_size
    if F.slopes:
        slope2 = tl.load(scores.slope + batch_head + head, mask=in_range, other=0.0) * LOG2E
    index = batch_head * shape.num_rows + (head * shape.num_rows + row)
    rows = PackedRows(tile_q, position, own, index, head, row, in_range)
    return rows, Scores(scores.factor, scores.softcap2, slope2[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _row_mass_fwd_kernel(
    q, k, v, out, mass, lse, labels, positions, sinks, scores, sequences, counts, n_k, blocks_per_split, key_offset,
    F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS_PAD: tl.constexpr = F.groups_pad
    split = tl.program_id(1)
    shape = _row_shape(counts, n_k, blocks_per_split, key_offset)
    num_tiles = tl.cdiv(shape.group_size * shape.num_rows, BLOCK_M)
    at = locate(shape.kv_heads, num_tiles, BLOCK_M, False)
    keys = sequence_keys(sequences, at.b, shape.n_k, F)
    rows, scores_here = _packed_tile(q, positions, scores, at, at.start, keys, shape, F)
    k_rows = one_head(k, at.b, at.h)
    v_rows = k_rows
    if F.v:
        v_rows = one_head(v, at.b, at.h)
    labels = sample_labels(labels, 0 if F.packed else at.b, shape.n_k, 1, F)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    lo, hi = key_reach(rows.position, rows.own, keys, F)
    lo = tl.maximum(split * shape.blocks_per_split, lo // BLOCK_N) * BLOCK_N
    hi = tl.minimum((split + 1) * shape.blocks_per_split * BLOCK_N, hi)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        row, col = rows.position[:, None], offs_n[None, :]
        k_tile = load_tile(k_rows, start_n, offs_n, tl.arange(0, BLOCK_D), keys.start, keys.end, F.head_dim, True)
        s, factor, _ = base2_scores(scores_here, rows.q, k_tile, row, col, F)  # [BLOCK_M, BLOCK_N]
        s = tl.where(seen_keys(row, col, keys, F, False) & rows.own[:, None], s, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(s, factor, m_i, l_i, True)
        if F.v:
            offs_dv = tl.arange(0, BLOCK_DV)
            v_tile = load_tile(v_rows, start_n, offs_n, offs_dv, keys.start, keys.end, F.head_dim_v, True)
            acc = matmul(rounded(p, v_tile.dtype), v_tile, acc * alpha[:, None])
        if F.groups > 0:
            sums = add_masses(sums * alpha[:, None], p, labels, offs_n, keys, F)

    present = ~(l_i == 0.0)  # a NaN sum must show
    acc, sums, lse2 = finish(acc, sums, m_i, l_i, present, sinks, rows.head, rows.in_range, F.final and F.sinks)
    if F.final:
        lse2 = lse2 * LN2
    part = rows.index * tl.num_programs(1) + split
    tl.store(lse + part, lse2, mask=rows.in_range)
    if F.groups > 0:
        scatter(mass + part * F.groups, 1, sums, rows.in_range, F.groups)
    if F.v:
        pointers, d = out.ptr + part * F.head_dim_v, 1
        if F.final:
            pointers, d = out.ptr + at.b * out.b + rows.head * out.h + rows.row * out.n, out.d
        scatter(pointers, d, acc, rows.in_range, F.head_dim_v)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _row_mass_bwd_kernel(
    q, k, labels, positions, lse, mass, dmass, dlse, dq, dk, dw, scale, scores, sequences, counts,
    n_k, blocks_per_split, key_offset, F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    GROUPS: tl.constexpr = F.groups
    GROUPS_PAD: tl.constexpr = F.groups_pad
    split = tl.program_id(1)
    shape = _row_shape(counts, n_k, blocks_per_split, key_offset)
    owners = tl.cdiv(tl.cdiv(shape.group_size * shape.num_rows, BLOCK_M), shape.tiles_per_program)
    at = locate(shape.kv_heads, owners, shape.tiles_per_program, False)  # `start` is a tile here
    off_keys = 0 if F.packed else at.b
    offs_d = tl.arange(0, BLOCK_D)
    keys = sequence_keys(sequences, at.b, shape.n_k, F)
    k_rows = one_head(k, at.b, at.h)
    labels = sample_labels(labels, off_keys, shape.n_k, 1, F)
    key_base = (off_keys * shape.kv_heads + at.h) * shape.n_k

    first_block = split * shape.blocks_per_split
    last_block = (split + 1) * shape.blocks_per_split
    first_out = 0
    limit_out = shape.n_k
    if F.packed:  # the other keys are other sequences'
        first_block = tl.maximum(first_block, keys.start // BLOCK_N)
        last_block = tl.minimum(last_block, tl.cdiv(keys.end, BLOCK_N))
        first_out = keys.start
        limit_out = keys.end
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for block in range(first_block, last_block):
        start_n = block * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_rows, start_n, offs_n, offs_d, keys.start, keys.end, F.head_dim, True)
        group = offs_n
        if F.groups > 0:
            group = load_groups(labels, offs_n, F)
        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dw_tile = tl.zeros([BLOCK_N, GROUPS_PAD], dtype=tl.float32)
        for tile in range(at.start, at.start + shape.tiles_per_program):
            rows, scores_here = _packed_tile(q, positions, scores, at, tile * BLOCK_M, keys, shape, F)
            row, col = rows.position[:, None], offs_n[None, :]
            lse_rows = tl.load(lse + rows.index, mask=rows.in_range, other=float("-inf"))
            lse2 = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows * LOG2E)
            p, capped = probabilities(scores_here, rows.q, k_tile, row, col, lse2[:, None], F)
            p = tl.where(seen_keys(row, col, keys, F, True) & rows.own[:, None], p, 0.0)
            slope = tl.zeros_like(p)
            # The incoming gradient of an absent row may be anything.
            wanted = rows.in_range & rows.own
            for g in tl.static_range(GROUPS):
                dm = tl.load(dmass + rows.index * GROUPS + g, mask=wanted, other=0.0)
                m = tl.load(mass + rows.index * GROUPS + g, mask=rows.in_range, other=0.0)
                w = group_weight(g, group, labels, offs_n, keys, F)
                slope += dm[:, None] * (w[None, :] - m[:, None])
                if F.dw:
                    dw_tile = add_column(dw_tile, g, tl.sum(p * dm[:, None], 0), GROUPS_PAD)
            if F.dlse:
                slope += tl.load(dlse + rows.index, mask=wanted, other=0.0)[:, None]
            ds = tl.where(p == 0.0, 0.0, p * slope)
            if F.softcap:
                ds = ds * (1.0 - capped * capped)
            ds = rounded(ds, rows.q.dtype)
            if F.dk:
                dk_tile = matmul(tl.trans(ds), rows.q, dk_tile)
            if F.dq:
                dq_tile = matmul(ds, k_tile, dq_tile)
        mine = (offs_n >= first_out) & (offs_n < limit_out)
        if F.dk:
            scatter(dk + (key_base + offs_n) * F.head_dim, 1, dk_tile * scale, mine, F.head_dim)
        if F.dw:
            scatter(dw + (key_base + offs_n) * GROUPS, 1, dw_tile, mine, GROUPS)
    if F.dq:
        packed = at.start * BLOCK_M + tl.arange(0, BLOCK_M)
        packed_rows = shape.group_size * shape.num_rows
        part = (at.bh * packed_rows + packed) * tl.num_programs(1) + split
        scatter(dq + part * F.head_dim, 1, dq_tile * scale, packed < packed_rows, F.head_dim)


class _Grid:
    """The grid of one call: packed row tiles × splits of the keys × (sequences · KV heads)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, call: Call):
        sequences, heads, num_rows, _ = q.shape
        kv_heads, n_k = k.shape[1], k.shape[2]
        kernel = "rows" if v is None else "decode"
        launch = launch_config(kernel, head_tile(q, v), q.element_size(), call.num_groups, q.device)
        packed = heads // kv_heads * num_rows
        block_m = min(launch.block_m, max(16, next_power_of_2(packed)))
        self.launch = launch._replace(block_m=block_m)
        self.tiles = triton.cdiv(packed, self.launch.block_m)
        self.programs = sequences * kv_heads
        blocks = triton.cdiv(n_k, launch.block_n)
        splits = row_splits(self.programs * self.tiles, blocks, _multiprocessors(q.device))
        per_split = triton.cdiv(blocks, splits)
        self.splits = triton.cdiv(blocks, per_split)
        self.counts = RowCounts(kv_heads, heads // kv_heads, num_rows, 1)
        self.sizes = RowSizes(n_k, per_split, call.key_offset)
        self.k = Heads.of(k)
        if call.packed:  # the sequences share the keys of one sample
            self.k = self.k._replace(b=0)


def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(q: Tensor, k: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return mass `(B, H, R, G)` and LSE `(B, H, R)`; arguments as in `abft_kernels.ops.row_mass_op`."""
    mass = torch.empty((*q.shape[:3], call.num_groups), dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or k.shape[2] == 0:
        return mass.zero_(), lse.fill_(float("-inf"))
    forward_into(None, mass, lse, q, k, None, positions, call)
    return mass, lse


def forward_into(
    out: Tensor | None, mass: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, call: Call
) -> None:
    """Launch the kernels; with v also write the output of the rows, into `out` `(B, H, R, D_v)` of any strides."""
    grid = _Grid(q, k, v, call)
    launch, part_out, part_mass, part_lse = grid.launch, Heads.of(out), mass, lse
    final = grid.splits == 1
    if not final:
        parts = (lse.numel(), grid.splits)
        part_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        part_mass = torch.empty((*parts, call.num_groups), dtype=torch.float32, device=q.device)
        if v is not None:
            part = torch.empty((*parts, v.shape[3]), dtype=torch.float32, device=q.device)
            part_out = Heads(part, 0, 0, 0, 0)
    sinks = call.sinks is not None
    of = features(q, v, call, launch, call.num_groups, sinks=sinks and final, final=final)
    inputs = (Heads.of(q), grid.k, Heads.of(v), part_out, part_mass, part_lse, key_labels(call, call.num_groups))
    of_call = (positions.contiguous(), call.sinks, Scores.of(call), Sequences.of(call), grid.counts)
    _row_mass_fwd_kernel[(grid.tiles * grid.programs, grid.splits)](
        *inputs, *of_call, *grid.sizes, of, **launch.options
    )
    if final:
        return
    block = 32 if v is None else 8
    keep = ("head_dim_v", "block_dv", "groups", "groups_pad", "v")
    of = Features(**{name: getattr(of, name) for name in keep}, block_m=block, sinks=sinks)
    results = (Heads.of(out), lse, mass, lse.numel(), q.shape[1], q.shape[2], grid.splits)
    row_mass_combine_kernel[(triton.cdiv(lse.numel(), block),)](
        part_out.ptr, part_lse, part_mass, call.sinks, *results, of, **SMALL._replace(num_warps=1).options
    )


def backward(
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    call: Call,
    mass: Tensor,
    lse: Tensor,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dweights and dsinks (the last two empty if not wanted); arguments as in
    `abft_kernels.ops.row_mass_backward_op`."""
    if call.num_groups == 0 or (call.groups is None and call.weights is None):
        dmass = None
    want_dw = weights_wanted and call.weights is not None and dmass is not None
    dsinks = torch.empty(0, dtype=torch.float32, device=q.device)
    fresh = torch.zeros if call.packed or q.numel() == 0 or k.numel() == 0 else torch.empty
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    dk = fresh(k.shape, dtype=k.dtype, device=k.device)
    dw_shape = (*k.shape[:3], call.num_groups) if want_dw else (0,)
    dw = fresh(dw_shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dw.sum(1) if want_dw else dw, dsinks
    grid = _Grid(q, k, None, call)
    launch, groups = grid.launch, 0 if dmass is None else call.num_groups
    part_dq = dq
    if grid.splits > 1:
        part_dq = torch.empty((lse.numel(), grid.splits, q.shape[3]), dtype=torch.float32, device=q.device)
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    of = features(q, None, call, launch, groups, dlse=dlse is not None, dq=True, dk=True, dw=want_dw)
    inputs = (Heads.of(q), grid.k, key_labels(call, groups), positions.contiguous(), lse, mass, dmass, dlse)
    of_call = (call.scale, Scores.of(call), Sequences.of(call))
    launches = [(1, grid.counts, of)]
    if grid.tiles > 1:  # dk sums over all tiles of rows, dq over all keys: an owner for each
        whole = grid.counts._replace(tiles_per_program=grid.tiles)
        launches = [(1, whole, of._replace(dq=False)), (grid.tiles, grid.counts, of._replace(dk=False, dw=False))]
    for owners, counts, chosen in launches:
        _row_mass_bwd_kernel[(owners * grid.programs, grid.splits)](
            *inputs, part_dq, dk, dw, *of_call, counts, *grid.sizes, chosen, **launch.options
        )
    if grid.splits > 1:
        block = max(1, 4096 // of.block_d)
        of = Features(head_dim=of.head_dim, block_d=of.block_d, block_m=block)
        programs = (triton.cdiv(lse.numel(), block),)
        row_mass_dq_kernel[programs](part_dq, dq, lse.numel(), grid.splits, of, **SMALL.options)
    if call.sinks is not None:
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        dsinks = sink_gradient(call.sinks, lse, delta if dmass is None else delta + (dmass * mass).sum(-1))
    return dq, dk, dw.sum(1) if want_dw else dw, dsinks
