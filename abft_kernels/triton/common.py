"""Tiles of matrices: where a program's tile lies, loads, stores and products."""

import triton
import triton.language as tl

from abft_kernels.triton.structs import Place, Rows


@triton.jit
def _nothing():
    pass


# Whether kernels run in Triton's interpreter, which takes CPU tensors. It multiplies the bit patterns of bfloat16 as
# integers and truncates instead of rounding: hence `matmul` and `rounded`, which are `tl.dot` and `.to` when compiled.
INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Arguments of the kernels for whose values Triton compiles nothing anew: they change from batch to batch.
UNSPECIALIZED = (
    *("seed_low", "seed_high", "n_q", "n_k", "offset", "num_tiles", "num_sequences"),
    *("blocks_per_split", "key_offset", "num_splits", "total_rows"),
)


@triton.jit
def matmul(a, b, acc):
    """Compute a @ b + acc in float32; acc may be None."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 x in `dtype`, to the nearest, ties to even."""
    if _INTERPRETED:  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def locate(heads, num_tiles, block, LAST_FIRST: tl.constexpr, skipped=0):
    """Return the place of this program's tile of `block` rows; the first `skipped` programs do something else.

    One grid dimension holds tiles, heads and samples: the others end at 65,535.
    """
    program = tl.program_id(0) - skipped
    bh = (program // num_tiles).to(tl.int64)
    tile = program % num_tiles
    b = bh // heads
    start = (num_tiles - 1 - tile if LAST_FIRST else tile) * block
    return Place(b, bh % heads, bh, b, start, 0)


@triton.jit
def locate_packed(sequences, num_sequences, heads, num_tiles, total, BLOCK: tl.constexpr, skipped=0):
    """Return the place of this program's tile of packed sequences; a tile lies within one of them.

    The tiles of sequence s begin with number start_s // BLOCK + s: no fewer than it fills, and known without the
    lengths of the others, so that no map of tiles has to be made. A tile that it does not fill begins at `total`,
    where it finds nothing to do. The last sequence's tiles go on to `total`: they write the zeros of tokens that no
    sequence holds. The last tiles come first.
    """
    at = locate(heads, num_tiles, 1, True, skipped)
    sequence = -1
    for first in range(0, num_sequences, 128):
        index = first + tl.arange(0, 128)
        starts = tl.load(sequences.starts + index, mask=index < num_sequences, other=0)
        begun = (index < num_sequences) & (starts // BLOCK + index <= at.start)
        sequence += tl.sum(begun.to(tl.int32), 0)
    first = tl.load(sequences.starts + sequence)
    start = first + (at.start - first // BLOCK - sequence) * BLOCK
    limit = tl.where(sequence == num_sequences - 1, total, tl.load(sequences.ends + sequence))
    start = tl.where(start < limit, start, total)
    return Place(at.b, at.h, at.bh, sequence, start, limit)


@triton.jit
def one_head(x, b, h, tiles=None):
    """Return the rows of one head of a `(B, H, N, D)` tensor; `tiles` is a descriptor of the sample's heads."""
    return Rows(x.ptr + b * x.b + h * x.h, x.n, x.d, tiles, h)


@triton.jit
def _pointers(x, start, offs, offs_d):
    """Return pointers to rows `offs` (from `start` on): one 64-bit product, and 32-bit offsets within the tile that a
    loop need not compute again."""
    return x.ptr + tl.cast(start, tl.int64) * x.n + ((offs - start)[:, None] * x.n + offs_d[None, :] * x.d)


@triton.jit
def load_tile(x, start, offs, offs_d, first, limit, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr):
    """Load a tile of the rows from `start` on; rows outside `first … limit − 1` and columns from HEAD_DIM on are 0.

    The caller vouches for the rows if not CHECKED. Padding is never read: what stands there, NaN too, has no effect.
    A descriptor begins with row `first` and ends before row `limit`.
    """
    pointers = _pointers(x, start, offs, offs_d)
    columns = offs_d[None, :] < HEAD_DIM
    if x.tiles is not None:
        tile = x.tiles.load([tl.cast(x.h, tl.int32), start - first, 0]).reshape(offs.shape[0], offs_d.shape[0])
    elif CHECKED:
        rows = (offs >= first) & (offs < limit)
        tile = tl.load(pointers, mask=rows[:, None] & columns, other=0.0)
    elif offs_d.shape[0] > HEAD_DIM:
        tile = tl.load(pointers, mask=columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(x, start, offs, offs_d, limit, tile, HEAD_DIM: tl.constexpr):
    """Store the rows before `limit` of a float32 tile, rounded."""
    mask = (offs[:, None] < limit) & (offs_d[None, :] < HEAD_DIM)
    tl.store(_pointers(x, start, offs, offs_d), rounded(tile, x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_tile(x, start, offs, offs_d, first, limit, tile, HEAD_DIM: tl.constexpr):
    """Add the rows `first … limit − 1` of a float32 tile to what is there, in no fixed order."""
    mask = ((offs >= first) & (offs < limit))[:, None] & (offs_d[None, :] < HEAD_DIM)
    tl.atomic_add(_pointers(x, start, offs, offs_d), tile, mask=mask, sem="relaxed")


@triton.jit
def scatter(rows, d, tile, written, COLUMNS: tl.constexpr, ADD: tl.constexpr = False):
    """Store a tile at pointers to its rows, whose elements are `d` apart, rounded; with ADD, add to what is there."""
    columns = tl.arange(0, tile.shape[1])
    pointers = rows[:, None] + columns[None, :] * d
    mask = written[:, None] & (columns < COLUMNS)[None, :]
    if ADD:
        tile += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, rounded(tile, rows.dtype.element_ty), mask=mask)
