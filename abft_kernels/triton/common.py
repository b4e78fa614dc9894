"""What the kernels share: tile loads, visibility, scores, groups of keys, the map of labelled blocks.

Every mask here gives a row one interval of keys. With r the row's position and start, end its sequence's bounds,

    max(start, r − window + 1) ≤ j < min(end, r + 1)

each bound where it is asked for; and so each key is seen by one interval of rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.spec import Options

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@triton.jit
def _nothing():
    pass


# Whether kernels run in Triton's interpreter, which takes CPU tensors. It multiplies the bit patterns of bfloat16 as
# integers and truncates instead of rounding: hence `matmul` and `rounded`, which are `tl.dot` and `.to` when compiled.
INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32; acc may be None."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to the nearest, ties to even."""
    if _INTERPRETED:  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(base, start, offs, offs_d, stride_m, stride_d):
    """Pointers to rows `offs` (from `start` on) of a matrix: one 64-bit product, and 32-bit offsets within the tile
    that a loop need not compute again."""
    return (
        base + tl.cast(start, tl.int64) * stride_m + ((offs - start)[:, None] * stride_m + offs_d[None, :] * stride_d)
    )


@triton.jit
def load_rows(
    base, start, offs, offs_d, stride_m, stride_d, first, limit, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr
):
    """A `[rows, BLOCK_D]` tile of the rows from `start` on; rows outside `first … limit − 1` and columns beyond
    HEAD_DIM are 0.

    The caller vouches for the rows if not CHECKED. Padding is never read: what stands there, NaN too, has no effect.
    """
    pointers = _tile(base, start, offs, offs_d, stride_m, stride_d)
    columns = offs_d[None, :] < HEAD_DIM
    if CHECKED:
        rows = (offs >= first) & (offs < limit)
        tile = tl.load(pointers, mask=rows[:, None] & columns, other=0.0)
    elif offs_d.shape[0] > HEAD_DIM:
        tile = tl.load(pointers, mask=columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, start, offs, offs_d, stride_m, stride_d, row_limit, value, HEAD_DIM: tl.constexpr):
    mask = (offs[:, None] < row_limit) & (offs_d[None, :] < HEAD_DIM)
    tl.store(_tile(base, start, offs, offs_d, stride_m, stride_d), rounded(value, base.dtype.element_ty), mask=mask)


@triton.jit
def sequence_bounds(Starts, Ends, sequence, n_k, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr):
    """First and one-past-last position of a sequence's tokens, counted from key 0 of this call.

    Of a shard of the keys they may lie outside 0 … n_k: its sequence begins before it, or goes on behind it.
    """
    start = 0
    end = n_k
    if HAS_STARTS:
        start = tl.load(Starts + sequence)
    if HAS_ENDS:
        end = tl.load(Ends + sequence)
    return start, end


@triton.jit
def query_bounds(start, end, n_q, offset, HAS_ENDS: tl.constexpr):
    """First and one-past-last query row that stands on one of its sequence's tokens."""
    first = 0
    limit = n_q
    if HAS_ENDS:
        first = tl.maximum(start - offset, 0)
        limit = tl.minimum(end - offset, n_q)
    return first, limit


@triton.jit
def phases(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Cuts `lo … hi − 1` into blocks: whole ones within `full_lo … full_hi`, and masked ones before and behind.

    Returns the first block, the range of the whole ones, and how many masked ones stand before and behind it.
    """
    hi = tl.maximum(hi, lo)
    first = (lo // BLOCK) * BLOCK
    full_lo = tl.minimum(tl.cdiv(tl.maximum(full_lo, lo), BLOCK) * BLOCK, hi)
    full_hi = tl.maximum((tl.minimum(full_hi, hi) // BLOCK) * BLOCK, full_lo)
    before = tl.cdiv(full_lo - first, BLOCK)
    behind = tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)
    before = tl.where(hi > lo, before, 0)
    return first, full_lo, full_hi, before, behind


@triton.jit
def key_phases(
    first_row, last_row, start, end, window, idle,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ENDS: tl.constexpr,
):  # fmt: skip
    """:func:`phases` of the keys `start … end − 1` that rows at positions `first_row … last_row` see.

    `idle`: none of these rows is the sequence's.
    """
    lo, full_lo, hi, full_hi = start, start, end, end
    if IS_CAUSAL:
        hi = tl.minimum(end, last_row + 1)
        full_hi = tl.minimum(end, first_row + 1)
    if HAS_WINDOW:
        lo = tl.maximum(start, first_row - window + 1)
        full_lo = tl.maximum(start, last_row - window + 1)
    if HAS_ENDS:
        hi = tl.where(idle, lo, hi)
    return phases(lo, full_lo, full_hi, hi, BLOCK_N)


@triton.jit
def row_phases(
    start_n, start, end, first_m, limit_m, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """:func:`phases` of the rows that see keys `start_n … start_n + BLOCK_N − 1`: the same, seen from the keys."""
    lo, full_lo, hi, full_hi = first_m, first_m, limit_m, limit_m
    if IS_CAUSAL:
        lo = tl.maximum(first_m, start_n - offset)
        full_lo = tl.maximum(first_m, start_n + BLOCK_N - 1 - offset)
    if HAS_WINDOW:
        hi = tl.minimum(limit_m, start_n + BLOCK_N - 1 + window - offset)
        full_hi = tl.minimum(limit_m, start_n + window - offset)
    # A block of keys cut by the sequence's bounds is masked throughout, one outside them seen by none.
    cut = (start_n < start) | (start_n + BLOCK_N > end)
    full_hi = tl.where(cut, full_lo, full_hi)
    hi = tl.where((start_n >= end) | (start_n + BLOCK_N <= start), lo, hi)
    return phases(lo, full_lo, full_hi, hi, BLOCK_M)


@triton.jit
def masked_block(block, first, full_hi, before, BLOCK: tl.constexpr):
    """Where the `block`-th masked block of :func:`phases` begins: one loop serves both ends."""
    return tl.where(block < before, first + block * BLOCK, full_hi + (block - before) * BLOCK)


@triton.jit
def seen_keys(rows, keys, start, end, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys of the sequence are not behind the row, and within its window.

    Here and below `rows` (positions) and `keys` broadcast: `[rows, 1]` and `[1, keys]`, or transposed.
    """
    seen = (keys >= start) & (keys < end)
    if IS_CAUSAL:
        seen = seen & (keys <= rows)
    if HAS_WINDOW:
        seen = seen & (keys > rows - window)
    return seen


@triton.jit
def any_key(rows, start, end, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether a row at each position sees a key at all."""
    lo = tl.zeros_like(rows) + start
    hi = tl.zeros_like(rows) + end
    if IS_CAUSAL:
        hi = tl.minimum(hi, rows + 1)
    if HAS_WINDOW:
        lo = tl.maximum(lo, rows - window + 1)
    return lo < hi


@triton.jit
def tanh(x):
    """To about one unit in the last place: by its series near 0, where the exponential form cancels."""
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = x + x * square * (((series * square + 2.0 / 15) * square) - 1.0 / 3)
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def base2_scores(
    a, b, rows, keys, slope2, qk_scale, softcap2,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores a·bᵀ, the factor that takes them to base 2, and the soft cap's tanh, whose square their gradient needs.

    a is the tile of queries and b that of keys, or the other way round, which transposes the scores. `qk_scale` is
    scale·log2(e) > 0, or scale/softcap with a soft cap; `softcap2` and `slope2` carry the log2(e) then. The factor is
    left to the caller because the multiplication then costs nothing: s·factor − m is one instruction.
    """
    s = matmul(a, tl.trans(b), None, PRECISION)
    capped = s
    factor = qk_scale
    if HAS_SOFTCAP:
        capped = tanh(s * qk_scale)
        s = capped * softcap2
        factor = 1.0
    if HAS_SLOPES:
        s = s * factor - slope2 * tl.abs(rows - keys).to(tl.float32)
        factor = 1.0
    return s, factor, capped


@triton.jit
def load_groups(groups_base, offs_n, n_k, HAS_WEIGHTS: tl.constexpr):
    """Group ids of a block of keys, −1 beyond the last key; unused with weights."""
    group = offs_n
    if not HAS_WEIGHTS:
        group = tl.load(groups_base + offs_n, mask=offs_n < n_k, other=-1).to(tl.int32)
    return group


@triton.jit
def group_weight(g, group, groups_base, offs_n, start, end, GROUPS: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """w_jg of a block of keys, float32: the indicator of group g, or the key's weight in it."""
    if HAS_WEIGHTS:
        w = tl.load(groups_base + offs_n * GROUPS + g, mask=(offs_n >= start) & (offs_n < end), other=0.0)
    else:
        w = tl.where(group == g, 1.0, 0.0)
    return w


@triton.jit
def add_column(tile, column, values, COLUMNS: tl.constexpr):
    """`tile` `[rows, COLUMNS]` with `values` added to one column."""
    return tile + tl.where((tl.arange(0, COLUMNS) == column)[None, :], values[:, None], 0.0)


@triton.jit
def dropout_keep(seed, rows, keys, stream, threshold):
    """Which probabilities dropout keeps; the counter is (key, row index, stream), whatever the tiles.

    `threshold` is dropout_p·2³¹.
    """
    zeros = (rows + keys) * 0
    bits, _, _, _ = tl.philox(seed, zeros + keys, zeros + rows, zeros + stream.to(tl.int32), zeros)
    return (bits >> 1).to(tl.int32) >= threshold


def labelled_blocks(groups: Tensor, block: int) -> Tensor:
    """`(B, ceil(N / block))` int8: 1 where a block of keys holds a key of any group, or of any weight."""
    labelled = groups >= 0 if groups.dim() == 2 else (groups != 0).any(-1)
    padding = -labelled.shape[1] % block
    if padding:
        labelled = F.pad(labelled, (0, padding), value=False)
    return labelled.view(labelled.shape[0], -1, block).any(-1).to(torch.int8)


def sequence_tiles(starts: Tensor, ends: Tensor, total: int, block: int) -> Tensor:
    """`(T, 2)` int32: sequence and first token of every tile of `block` tokens of packed sequences.

    T counts a tile more for each sequence than `total` tokens fill, so that no length has to be read back; the
    surplus tiles begin at `total`, where they find nothing to do. Later tiles come first: they are the longest.
    """
    tiles = -(-total // block) + starts.shape[0]
    behind = ((ends - starts + block - 1) // block).cumsum(0)
    index = torch.arange(tiles, device=starts.device)
    sequence = torch.searchsorted(behind, index, right=True)
    unused = sequence >= starts.shape[0]
    sequence = sequence.clamp(max=starts.shape[0] - 1)
    first_tile = behind[sequence] - (ends[sequence] - starts[sequence] + block - 1) // block
    first = starts[sequence] + (index - first_tile) * block
    first = torch.where(unused, torch.full_like(first, total), first)
    return torch.stack([sequence, first], 1).to(torch.int32).flip(0).contiguous()


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def head_block(head_dim: int) -> int:
    """Width of a tile over head_dim: a power of two, and no less than a matrix instruction takes."""
    return max(16, next_power_of_2(head_dim))


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())


def score_factors(options: Options) -> tuple[float, float]:
    """`qk_scale` and `softcap2` of :func:`base2_scores`."""
    if options.softcap > 0:
        return options.scale / options.softcap, options.softcap * LOG2E
    return options.scale * LOG2E, 0.0
