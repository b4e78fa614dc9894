"""The keys that a row sees. Every mask gives a row one interval of keys, and so each key one interval of rows.

With r the row's position and start, end the bounds of its sequence,

    max(start, r − window + 1, r − (r − start) mod chunk) ≤ j < min(end, r + 1)

each bound where it is asked for. Both bounds grow with r: rows r₀ … r₁ together see the keys from the lower bound of
r₀ to the upper bound of r₁, and all of them see those from the lower bound of r₁ to the upper bound of r₀. Everything
here follows from :func:`row_interval` and its transpose :func:`key_interval`; a new kind of mask changes these two.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from abft_kernels.masking import Reach


class Keys(NamedTuple):
    """The keys of one sequence in this call, `start … end − 1`, and how far back its rows see.

    The sequence's tokens are `origin … limit − 1`: a shard of the keys holds part of them.
    """

    start: tl.tensor
    end: tl.tensor
    origin: tl.tensor
    limit: tl.tensor
    reach: Reach


class Queries(NamedTuple):
    """The query rows of one sequence, `first … limit − 1`; row i stands at position i + offset."""

    first: tl.tensor
    limit: tl.tensor
    offset: tl.tensor


class Phases(NamedTuple):
    """The blocks that a program meets: whole ones, and masked ones before and after them, met in one loop."""

    whole: tl.tensor
    whole_end: tl.tensor
    first: tl.tensor  # where the first masked block begins
    before: tl.tensor  # masked blocks before the whole ones
    masked: tl.tensor  # masked blocks


@triton.jit
def row_interval(rows, keys, F: tl.constexpr):
    """Return the bounds of the keys that the mask shows to a row at each position, of whatever sequence; where it has
    none, the sequence's."""
    lo = keys.start
    hi = keys.end
    if F.causal:
        hi = rows + 1
    if F.reach.window:
        lo = rows - keys.reach.window + 1
    if F.reach.chunk:
        lo = tl.maximum(lo, rows - _place_in_chunk(rows, keys))
    return lo, hi


@triton.jit
def own_interval(rows, keys, F: tl.constexpr):
    """Return the first and one past the last key that a row at each position sees; a bound may be one for all."""
    lo, hi = row_interval(rows, keys, F)
    return tl.maximum(keys.start, lo), tl.minimum(keys.end, hi)


@triton.jit
def key_interval(key, keys, queries, F: tl.constexpr):
    """Return the first and one past the last query row that sees a key."""
    row = key - queries.offset
    lo = queries.first
    hi = queries.limit  # differences to it come first: a sum with a large limit would overflow
    if F.causal:
        lo = tl.maximum(queries.first, row)
    if F.reach.window:
        hi = row + tl.minimum(hi - row, keys.reach.window)
    if F.reach.chunk:
        hi = row + tl.minimum(hi - row, keys.reach.chunk - _place_in_chunk(key, keys))
    return lo, hi


@triton.jit
def _place_in_chunk(positions, keys):
    """Return how many keys of its chunk come before each position; 0 before the sequence, where no key is seen."""
    return tl.maximum(positions - keys.origin, 0) % keys.reach.chunk


@triton.jit
def sequence_keys(sequences, index, n_k, F: tl.constexpr):
    """Return the keys of a sequence; all positions are counted from key 0 of this call."""
    origin = 0
    limit = n_k
    if F.starts:
        origin = tl.load(sequences.starts + index)
    if F.ends:
        limit = tl.load(sequences.ends + index)
    return Keys(tl.maximum(origin, 0), tl.minimum(limit, n_k), origin, limit, sequences.reach)


@triton.jit
def keys_and_queries(sequences, index, shape, F: tl.constexpr):
    """Return the keys of a sequence, and the query rows that stand on its tokens."""
    keys = sequence_keys(sequences, index, shape.n_k, F)
    first = 0
    limit = shape.n_q
    if F.ends:
        first = tl.maximum(keys.origin - shape.offset, 0)
        limit = tl.minimum(keys.limit - shape.offset, shape.n_q)
    return keys, Queries(first, limit, shape.offset)


@triton.jit
def seen_keys(rows, cols, keys, F: tl.constexpr, ROWS_VARY: tl.constexpr):
    """Return which keys each row sees. `rows` (positions) and `cols` broadcast: `[rows, 1]` and `[1, keys]`, or
    transposed.

    Loops over keys hold the bounds of their rows in registers. Where ROWS_VARY, the sequence's part is compared with
    the keys, which stay, and the rest costs one comparison for each element.
    """
    if ROWS_VARY:
        lo, hi = row_interval(rows, keys, F)
        seen = (cols >= keys.start) & (cols < keys.end) & (cols >= lo) & (cols < hi)
    else:
        lo, hi = own_interval(rows, keys, F)
        seen = (cols >= lo) & (cols < hi)
    return seen


@triton.jit
def any_key(rows, keys, F: tl.constexpr):
    """Return whether a row at each position sees a key at all."""
    lo, hi = own_interval(rows, keys, F)
    return lo < hi


@triton.jit
def key_reach(rows, present, keys, F: tl.constexpr):
    """Return the first and one past the last key that any of the present rows sees."""
    lo, hi = own_interval(rows, keys, F)
    hi = tl.max(tl.where(present, hi, keys.start), 0)
    if F.reach.window or F.reach.chunk:
        lo = tl.min(tl.where(present, lo, keys.end), 0)
    return lo, hi


@triton.jit
def key_phases(start_m, keys, queries, F: tl.constexpr):
    """Return the phases of the keys that the rows `start_m … start_m + block_m − 1` see."""
    lo, full_hi = own_interval(start_m + queries.offset, keys, F)
    full_lo, hi = own_interval(start_m + F.block_m - 1 + queries.offset, keys, F)
    if F.ends:  # no row of the tile is the sequence's
        hi = tl.where((start_m >= queries.limit) | (start_m + F.block_m <= queries.first), lo, hi)
    if F.specialized:  # one loop: all blocks are masked
        full_hi = lo
    return _phases(lo, full_lo, full_hi, hi, F.block_n)


@triton.jit
def row_phases(first_n, last_n, keys, queries, F: tl.constexpr):
    """Return the phases of the rows that see the keys `first_n … last_n`; all are masked for gathered ones."""
    lo, full_hi = key_interval(first_n, keys, queries, F)
    full_lo, hi = key_interval(last_n, keys, queries, F)
    # A block of keys cut by the sequence's bounds is masked throughout, one outside them seen by none.
    cut = (first_n < keys.start) | (last_n >= keys.end) | F.gathered
    full_hi = tl.where(cut, full_lo, full_hi)
    hi = tl.where((first_n >= keys.end) | (last_n < keys.start), lo, hi)
    return _phases(lo, full_lo, full_hi, hi, F.block_m)


@triton.jit
def _phases(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Cut `lo … hi − 1` into blocks, whole ones within `full_lo … full_hi − 1`."""
    hi = tl.maximum(hi, lo)
    first = (lo // BLOCK) * BLOCK
    full_lo = tl.minimum(tl.cdiv(tl.maximum(full_lo, lo), BLOCK) * BLOCK, hi)
    full_hi = tl.maximum((tl.minimum(full_hi, hi) // BLOCK) * BLOCK, full_lo)
    before = tl.where(hi > lo, tl.cdiv(full_lo - first, BLOCK), 0)
    after = tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)
    return Phases(full_lo, full_hi, first, before, before + after)


@triton.jit
def phase_range(phases, MASKED: tl.constexpr):
    """Return the bounds of the loop over the masked blocks, by number, or over the whole ones, by position."""
    if MASKED:
        lo, hi = 0, phases.masked
    else:
        lo, hi = phases.whole, phases.whole_end
    return lo, hi


@triton.jit
def block_start(at, phases, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return where the block begins that the loop meets at `at`."""
    if MASKED:
        before, after = phases.first + at * BLOCK, phases.whole_end + (at - phases.before) * BLOCK
        at = tl.where(at < phases.before, before, after)
    return at
