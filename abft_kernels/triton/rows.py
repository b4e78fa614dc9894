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

The queries are those of the rows alone, or all of them (`Call.whole`), which the kernels read at the rows' positions.
Then dq has a place for every query, and dq and dk may be added to the gradients of the attention beside the rows: dk
here, dq here or, where several rows or splits may meet in a place, by `row_mass_dq_kernel`.

Of packed sequences the rows are a batch, one entry a sequence, over the keys of one batch.
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
from abft_kernels.triton.launch import SMALL, UNSPLIT_BLOCKS, launch_config, row_splits
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
    place: tl.tensor  # among the queries
    index: tl.tensor  # into (B, H, R)
    head: tl.tensor
    row: tl.tensor
    in_range: tl.tensor


@triton.jit
def _row_shape(counts, n_k, blocks_per_split, key_offset, n_q, offset):
    return RowShape(
        counts.kv_heads,
        counts.group_size,
        counts.num_rows,
        counts.tiles_per_program,
        n_k,
        blocks_per_split,
        key_offset,
        n_q,
        offset,
    )


@triton.jit
def _split_blocks(split, keys, end, shape, F: tl.constexpr):
    """Return the first block of keys of a split, and one past its last.

    Packed sequences, whose lengths are not known on the host, are split one by one, up to the key `end`.
    """
    BLOCK_N: tl.constexpr = F.block_n
    first = split * shape.blocks_per_split
    last = first + shape.blocks_per_split
    if F.packed:
        begin = keys.start // BLOCK_N
        last_of_all = tl.cdiv(end, BLOCK_N)
        each = tl.cdiv(last_of_all - begin, tl.num_programs(1))
        first = begin + split * each
        last = tl.minimum(first + each, last_of_all)
    return first, last


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
    place = row
    if F.whole:
        place = position - shape.offset
        own = own & (place >= 0) & (place < shape.n_q)
    if F.ends:
        own = own & (position >= keys.origin) & (position < keys.limit)
    pointers = q.ptr + at.b * q.b + head[:, None] * q.h + place.to(tl.int64)[:, None] * q.n
    mask = own[:, None] & (offs_d[None, :] < F.head_dim)
    tile_q = tl.load(pointers + offs_d[None, :] * q.d, mask=mask, other=0.0)
    slope2 = tl.zeros([BLOCK_M], dtype=tl.float32)
    heads = shape.kv_heads * shape.group_size
    if F.slopes:
        sample = 0 if F.packed and F.whole else at.b
        slope2 = tl.load(scores.slope + sample * heads + head, mask=in_range, other=0.0) * LOG2E
    index = at.b * heads * shape.num_rows + (head * shape.num_rows + row)
    rows = PackedRows(tile_q, position, own, place, index, head, row, in_range)
    return rows, Scores(scores.factor, scores.softcap2, slope2[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _row_mass_fwd_kernel(
    q, k, v, out, mass, lse, labels, positions, sinks, scores, sequences, counts, n_k, blocks_per_split, key_offset,
    n_q, offset, F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    GROUPS_PAD: tl.constexpr = F.groups_pad
    split = tl.program_id(1)
    shape = _row_shape(counts, n_k, blocks_per_split, key_offset, n_q, offset)
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
    first_block, last_block = _split_blocks(split, keys, keys.end, shape, F)
    lo = tl.maximum(first_block, lo // BLOCK_N) * BLOCK_N
    hi = tl.minimum(last_block * BLOCK_N, hi)
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
    n_k, blocks_per_split, key_offset, n_q, offset, F: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_N: tl.constexpr = F.block_n
    BLOCK_D: tl.constexpr = F.block_d
    GROUPS: tl.constexpr = F.groups
    GROUPS_PAD: tl.constexpr = F.groups_pad
    split = tl.program_id(1)
    shape = _row_shape(counts, n_k, blocks_per_split, key_offset, n_q, offset)
    owners = tl.cdiv(tl.cdiv(shape.group_size * shape.num_rows, BLOCK_M), shape.tiles_per_program)
    at = locate(shape.kv_heads, owners, shape.tiles_per_program, False)  # `start` is a tile here
    off_keys = 0 if F.packed else at.b
    offs_d = tl.arange(0, BLOCK_D)
    keys = sequence_keys(sequences, at.b, shape.n_k, F)
    k_rows = one_head(k, at.b, at.h)
    labels = sample_labels(labels, off_keys, shape.n_k, 1, F)
    key_base = (off_keys * shape.kv_heads + at.h) * shape.n_k

    first_out = 0
    limit_out = shape.n_k
    if F.packed:  # the other keys are other sequences', but for those of none after the last
        first_out = keys.start
        last_one = at.b == tl.num_programs(0) // (shape.kv_heads * owners) - 1
        limit_out = tl.where(last_one, shape.n_k, keys.end)
    first_block, last_block = _split_blocks(split, keys, limit_out, shape, F)
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
            rows_dk = one_head(dk, off_keys, at.h)
            pointers = rows_dk.ptr + offs_n.to(tl.int64) * rows_dk.n
            scatter(pointers, rows_dk.d, dk_tile * scale, mine, F.head_dim, F.add)
        if F.dw:
            scatter(dw + (key_base + offs_n) * GROUPS, 1, dw_tile, mine, GROUPS)
    if F.dq:
        rows, _ = _packed_tile(q, positions, scores, at, at.start * BLOCK_M, keys, shape, F)
        written = rows.in_range
        pointers, d = dq.ptr + (rows.index * tl.num_programs(1) + split) * F.head_dim, 1
        if F.final:
            pointers, d = dq.ptr + at.b * dq.b + rows.head * dq.h + rows.place.to(tl.int64) * dq.n, dq.d
            if F.add:
                written = rows.own
        scatter(pointers, d, dq_tile * scale, written, F.head_dim, F.add and F.final)


class _Grid:
    """The grid of one call: packed row tiles × splits of the keys × (sequences · KV heads)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, call: Call):
        sequences, num_rows = positions.shape
        heads, kv_heads, n_k = q.shape[1], k.shape[1], k.shape[2]
        kernel = "rows" if v is None else "decode"
        launch = launch_config(kernel, head_tile(q, v), q.element_size(), call.num_groups, q.device)
        packed = heads // kv_heads * num_rows
        block_m = min(launch.block_m, max(16, next_power_of_2(packed)))
        self.launch = launch._replace(block_m=block_m)
        self.tiles = triton.cdiv(packed, self.launch.block_m)
        self.programs = sequences * kv_heads
        # The kernel divides each packed sequence: their mean length tells whether that pays.
        blocks = triton.cdiv(triton.cdiv(n_k, sequences) if call.packed else n_k, launch.block_n)
        splits = 1
        if v is not None or blocks > UNSPLIT_BLOCKS:
            splits = row_splits(self.programs * self.tiles, blocks, _multiprocessors(q.device))
        per_split = triton.cdiv(blocks, splits)
        self.splits = triton.cdiv(blocks, per_split)
        self.counts = RowCounts(kv_heads, heads // kv_heads, num_rows, 1)
        self.sizes = RowSizes(n_k, per_split, call.key_offset, q.shape[2], call.row_offset)
        self.k = _shared(k, call.packed)
        self.q = _shared(q, call.packed and call.whole)


def _shared(x: Tensor, shared: bool) -> Heads:
    """Return `x` `(B, H, N, D)` for a kernel; packed sequences share one sample of it."""
    return Heads.of(x)._replace(b=0) if shared else Heads.of(x)


def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(q: Tensor, k: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return mass `(B, H, R, G)` and LSE `(B, H, R)`; arguments as in `abft_kernels.ops.row_mass_op`."""
    shape = (positions.shape[0], q.shape[1], positions.shape[1])
    mass = torch.empty((*shape, call.num_groups), dtype=torch.float32, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or k.shape[2] == 0:
        return mass.zero_(), lse.fill_(float("-inf"))
    forward_into(None, mass, lse, q, k, None, positions, call)
    return mass, lse


def forward_into(
    out: Tensor | None, mass: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor | None, positions: Tensor, call: Call
) -> None:
    """Launch the kernels; with v also write the output of the rows, into `out` `(B, H, R, D_v)` of any strides."""
    grid = _Grid(q, k, v, positions, call)
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
    of = features(q, v, call, launch, call.num_groups, sinks=sinks and final, final=final, whole=call.whole)
    inputs = (grid.q, grid.k, Heads.of(v), part_out, part_mass, part_lse, key_labels(call, call.num_groups))
    of_call = (positions.contiguous(), call.sinks, Scores.of(call), Sequences.of(call), grid.counts)
    _row_mass_fwd_kernel[(grid.tiles * grid.programs, grid.splits)](
        *inputs, *of_call, *grid.sizes, of, **launch.options
    )
    if final:
        return
    block = 32 if v is None else 8
    keep = ("head_dim_v", "block_dv", "groups", "groups_pad", "v")
    of = Features(**{name: getattr(of, name) for name in keep}, block_m=block, sinks=sinks)
    results = (Heads.of(out), lse, mass, lse.numel(), q.shape[1], lse.shape[2], grid.splits)
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
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dweights and dsinks (the last two empty if not wanted); arguments as in
    `abft_kernels.ops.row_mass_backward_op`. With `into`, a dq and a dk, they are added to these in place."""
    if call.num_groups == 0 or (call.groups is None and call.weights is None):
        dmass = None
    want_dw = weights_wanted and call.weights is not None and dmass is not None
    dsinks = torch.empty(0, dtype=torch.float32, device=q.device)
    nothing = q.numel() == 0 or k.numel() == 0 or positions.numel() == 0
    like = torch.zeros_like if nothing else torch.empty_like
    dq, dk = into or (like(q), like(k))  # in the layout of q and k, which spares the projections before them a copy
    dw = q.new_empty((*k.shape[:3], call.num_groups) if want_dw else (0,), dtype=torch.float32)
    if nothing:
        return dq, dk, dw.zero_().sum(1) if want_dw else dw, dsinks
    grid = _Grid(q, k, None, positions, call)
    launch, groups, positions = grid.launch, 0 if dmass is None else call.num_groups, positions.contiguous()
    # Of all queries dq is written here where that adds to the one row of a tile; otherwise by a kernel that knows every
    # row of a query.
    alone = into is not None and grid.tiles == 1 and positions.shape[1] == 1
    final = grid.splits == 1 and (alone or not call.whole)
    part_dq = _shared(dq, call.packed and call.whole)
    if not final:
        part = torch.empty((lse.numel(), grid.splits, q.shape[3]), dtype=torch.float32, device=q.device)
        part_dq = Heads(part, 0, 0, 0, 0)
    dmass = None if dmass is None else dmass.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    chosen = {"dlse": dlse is not None, "dq": True, "dk": True, "dw": want_dw}
    of = features(q, None, call, launch, groups, **chosen, final=final, whole=call.whole, add=into is not None)
    inputs = (grid.q, grid.k, key_labels(call, groups), positions, lse, mass, dmass, dlse)
    of_call = (call.scale, Scores.of(call), Sequences.of(call))
    launches = [(1, grid.counts, of)]
    if grid.tiles > 1:  # dk sums over all tiles of rows, dq over all keys: an owner for each
        whole = grid.counts._replace(tiles_per_program=grid.tiles)
        launches = [(1, whole, of._replace(dq=False)), (grid.tiles, grid.counts, of._replace(dk=False, dw=False))]
    for owners, counts, features_here in launches:
        _row_mass_bwd_kernel[(owners * grid.programs, grid.splits)](
            *inputs, part_dq, Heads.of(dk), dw, *of_call, counts, *grid.sizes, features_here, **launch.options
        )
    if not final:
        _write_dq(part_dq.ptr, dq, positions, call, grid, of)
    if call.sinks is not None:
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        dsinks = sink_gradient(call.sinks, lse, delta if dmass is None else delta + (dmass * mass).sum(-1))
    return dq, dk, dw.sum(1) if want_dw else dw, dsinks


def _write_dq(part_dq: Tensor | None, dq: Tensor, positions: Tensor, call: Call, grid: _Grid, of: Features) -> None:
    """Launch the kernel that sums the parts of dq, of splits and of rows at one position."""
    batch, heads, n_q, _ = dq.shape
    block = max(1, 4096 // of.block_d)
    of = Features(
        head_dim=of.head_dim,
        block_d=of.block_d,
        block_m=block,
        block_n=64,
        packed=of.packed and of.whole,
        whole=of.whole,
        add=of.add,
    )
    tiles = triton.cdiv(n_q, block)
    sequences, num_rows = positions.shape
    row_mass_dq_kernel[(tiles * batch * heads,)](
        *(part_dq, Heads.of(dq), positions, heads, num_rows, n_q, tiles, sequences, grid.splits),
        *(call.key_offset + call.row_offset, of),
        **SMALL.options,
    )
