"""Labelled keys last: the form of the fused kernels for sparse labels.

Softmax does not mind the order of keys. So the main loops run as without mass, and the few labelled keys are met after
them, gathered in tiles of `TILE` keys with the float32 formula of all labels:

    forward   the loop meets every key; with its final m, mass_g = Σ_j 2^(s_ij − m_i) w_jg over the labelled keys alone
    dQ        the loop leaves the labelled keys out of dS; the last tiles add theirs, with the term dmass_g w_jg
    dK, dV    the owners of blocks of keys store no labelled key; further programs own the labelled ones

No dS is rounded in two parts: in a saturated row the part of dP − δ and that of dmass cancel. The scores are computed
alike in the loop and in the last tiles: 2^(s − m) of a key in mass and in l differ by float32 rounding at most.

The index of a sample is the sorted list of its labelled keys, and how many of them stand before each block of `TILE`
keys: the bounds, in the list, of any range of keys. The host never reads how many there are.
"""

import torch
import triton
import triton.language as tl

from abft_kernels.call import Call
from abft_kernels.triton.common import UNSPECIALIZED, load_tile
from abft_kernels.triton.labels import INDEXED, TILE, add_masses, counts_of, is_labelled, load_groups
from abft_kernels.triton.launch import SMALL
from abft_kernels.triton.masks import seen_keys
from abft_kernels.triton.softmax import base2_scores
from abft_kernels.triton.structs import Features, Labels, Rows

# Keys for each program that owns labelled ones: there are enough programs where one key in 32 is labelled.
STRETCH = tl.constexpr(512)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def label_index_kernel(groups, positions, before, n_k, num_tiles, F: tl.constexpr):
    """Write the index of one sample, for `INDEXED` keys."""
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    keys = groups + b * n_k
    listed = positions + b * (n_k + TILE)
    before += b * counts_of(n_k)
    offs = tl.arange(0, INDEXED)
    earlier = tl.zeros([INDEXED], dtype=tl.int32)
    for start in range(0, tile * INDEXED, INDEXED):
        group = tl.load(keys + start + offs).to(tl.int32)
        earlier += is_labelled(group, F.groups).to(tl.int32)
    offs += tile * INDEXED
    group = tl.load(keys + offs, mask=offs < n_k, other=-1).to(tl.int32)
    found = is_labelled(group, F.groups)
    place = tl.sum(earlier, 0) + tl.cumsum(found.to(tl.int32), 0) - found.to(tl.int32)
    tl.store(listed + place, offs, mask=found)
    tl.store(before + offs // TILE, place, mask=offs % TILE == 0)
    if tile == num_tiles - 1:  # the last tile of the list ends with keys that no row sees
        total = tl.sum(earlier, 0) + tl.sum(found.to(tl.int32), 0)
        tl.store(before + num_tiles * (INDEXED // TILE), total)
        tl.store(listed + total + tl.arange(0, TILE), tl.zeros([TILE], dtype=tl.int32) + n_k)


def index_labels(call: Call, num_groups: int) -> Labels:
    """Return the group ids of the keys with their index."""
    groups = call.groups
    assert groups is not None  # of sparse labels
    batch, n_k = groups.shape
    tiles = n_k // INDEXED.value + 1
    positions = torch.empty((batch, n_k + TILE.value), dtype=torch.int32, device=groups.device)
    before = torch.empty((batch, tiles * (INDEXED.value // TILE.value) + 1), dtype=torch.int32, device=groups.device)
    label_index_kernel[(batch * tiles,)](
        groups, positions, before, n_k, tiles, Features(groups=num_groups), **SMALL.options
    )
    return Labels(groups, before, positions)


def defer(of: Features, call: Call) -> Features:
    """Return the features of a kernel; with sparse labels its loop has no mass, and `last` is for the last tiles."""
    if call.loop_groups(of.groups) == of.groups:
        return of
    # Fewer keys leave room for more rows in the same shared memory.
    last = of._replace(block_m=max(of.block_m, of.block_n // 2), block_n=TILE.value, gathered=True)
    return of._replace(groups=0, groups_pad=1, deferred=of.groups, last=last)


@triton.jit
def label_range(labels, phases, F: tl.constexpr):
    """Return the bounds, in the list, of the labelled keys in a program's blocks of keys; none if no row wants mass."""
    most = counts_of(labels.n_k) - 1
    end = phases.whole_end + (phases.masked - phases.before) * F.block_n
    first = tl.load(labels.blocks + tl.minimum(phases.first // TILE, most))
    end = tl.load(labels.blocks + tl.minimum(tl.cdiv(end, TILE), most))
    return first, tl.where(labels.active != 0, end, first)


@triton.jit
def first_upcoming(labels):
    """Return a position before every block of keys, or after all if no row wants mass."""
    return tl.where(labels.active != 0, -1, 0x7FFFFFFF)


@triton.jit
def block_labels(labels, start_n, F: tl.constexpr):
    """Return the bounds, in the list, of the labelled keys in a block of keys."""
    first = labels.blocks + start_n // TILE
    return tl.load(first), tl.load(first + F.block_n // TILE)


@triton.jit
def labelled_masses(m_i, q, k_rows, phases, rows, keys, labels, scores, F: tl.constexpr):
    """Return the masses of a tile of rows whose running maximum is final, before the division by l."""
    L: tl.constexpr = F.last
    BLOCK_M: tl.constexpr = F.block_m
    BLOCK_D: tl.constexpr = F.block_d
    GROUPS_PAD: tl.constexpr = L.groups_pad
    mass = tl.zeros([BLOCK_M, GROUPS_PAD], dtype=tl.float32)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)[:, None]
    first, end = label_range(labels, phases, F)
    k_rows = scattered(k_rows)
    for entry in tl.range(first, end, TILE, num_stages=1):
        offs_n = key_offsets(labels, entry, L)
        cols = offs_n.to(tl.int32)[None, :]
        k = load_tile(k_rows, entry, offs_n, tl.arange(0, BLOCK_D), keys.start, keys.end, F.head_dim, True)
        s, factor, _ = base2_scores(scores, q, k, rows, cols, F)  # [BLOCK_M, TILE]
        s = tl.where(seen_keys(rows, cols, keys, F, False), s, float("-inf"))
        mass = add_masses(mass, tl.exp2(s * factor - shift), labels, offs_n, keys, L)
    return mass


@triton.jit
def scattered(rows):
    """Return the rows of a head without their descriptor, which loads neighbours alone."""
    return Rows(rows.ptr, rows.n, rows.d)


@triton.jit
def key_offsets(labels, start_n, F: tl.constexpr):
    """Return the keys of the tile at `start_n`: consecutive, or the labelled ones from this place of the list on, as
    int64 because they may lie far apart in memory."""
    BLOCK_N: tl.constexpr = F.block_n
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if F.gathered:
        offs_n = tl.load(labels.positions + offs_n).to(tl.int64)
    return offs_n


@triton.jit
def key_bounds(start_n, offs_n, keys, F: tl.constexpr):
    """Return the first and the last key of a tile; of labelled ones, among those of this sequence."""
    first = start_n
    last = start_n + F.block_n - 1
    if F.gathered:
        places = offs_n.to(tl.int32)
        own = (places >= keys.start) & (places < keys.end)
        first = tl.min(tl.where(own, places, keys.end), 0)
        last = tl.max(tl.where(own, places, keys.start - 1), 0)
    return first, last


@triton.jit
def stored_keys(labels, offs_n, keys, limit, F: tl.constexpr):
    """Return the keys of a tile that its program stores; `limit` stands for those that it does not."""
    if F.deferred > 0:
        labelled = is_labelled(load_groups(labels, offs_n, F), F.deferred)
        if F.packed:  # tokens after the last sequence are no program's of labelled keys
            labelled = labelled & (offs_n < keys.end)
        offs_n = tl.where(labelled, limit, offs_n)
    if F.gathered and F.packed:  # a tile may begin with keys of the sequence before
        offs_n = tl.where(offs_n < keys.start, limit, offs_n)
    return offs_n


@triton.jit
def label_programs(n_k, num_sequences, F: tl.constexpr):
    """Return how many programs of each head own labelled keys."""
    number = tl.cdiv(n_k, STRETCH)
    if F.packed:
        number += num_sequences
    return number


@triton.jit
def label_tiles(labels, at, keys, n_k, F: tl.constexpr):
    """Return the tiles of the list that one of the `label_programs` owns: the first, the end, and the step."""
    start = 0
    end = n_k
    if F.packed:  # after its sequence, a program owns none
        start = keys.start
        end = tl.where(at.start < keys.end, keys.end, start)
    first = tl.load(labels.blocks + start // TILE)
    last = tl.where(start < end, tl.load(labels.blocks + tl.cdiv(end, TILE)), first)
    return first + (at.start - start) // STRETCH * TILE, last, tl.maximum(tl.cdiv(end - start, STRETCH), 1) * TILE
