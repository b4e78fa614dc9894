"""What the kernels share: constants, tile loads, visibility, the labelled-block map."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

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
def load_rows(base, offs_m, offs_d, stride_m, stride_d, first, limit, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr):
    """A `[rows, BLOCK_D]` tile; rows outside `first … limit − 1` and columns beyond HEAD_DIM are 0.

    The caller vouches for the rows if not CHECKED. Padding is never read: what stands there, NaN too, has no effect.
    """
    pointers = base + offs_m.to(tl.int64)[:, None] * stride_m + offs_d[None, :] * stride_d
    columns = offs_d[None, :] < HEAD_DIM
    if CHECKED:
        rows = (offs_m >= first) & (offs_m < limit)
        tile = tl.load(pointers, mask=rows[:, None] & columns, other=0.0)
    elif offs_d.shape[0] > HEAD_DIM:
        tile = tl.load(pointers, mask=columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, offs_m, offs_d, stride_m, stride_d, row_limit, value, HEAD_DIM: tl.constexpr):
    pointers = base + offs_m.to(tl.int64)[:, None] * stride_m + offs_d[None, :] * stride_d
    mask = (offs_m[:, None] < row_limit) & (offs_d[None, :] < HEAD_DIM)
    tl.store(pointers, rounded(value, base.dtype.element_ty), mask=mask)


@triton.jit
def sample_bounds(Starts, Ends, off_b, n_k, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr):
    """First and one-past-last valid key of sample `off_b`."""
    start = 0
    end = n_k
    if HAS_STARTS:
        start = tl.maximum(tl.load(Starts + off_b), 0)
    if HAS_ENDS:
        end = tl.minimum(tl.load(Ends + off_b), n_k)
    return start, end


@triton.jit
def query_bounds(start, end, n_q, n_k, HAS_ENDS: tl.constexpr):
    """First and one-past-last query row that stands on one of its sample's tokens."""
    first = 0
    limit = n_q
    if HAS_ENDS:
        first = tl.maximum(start - (n_k - n_q), 0)
        limit = tl.minimum(end - (n_k - n_q), n_q)
    return first, limit


@triton.jit
def key_range(
    first_row, start, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_ENDS: tl.constexpr,
):  # fmt: skip
    """Blocks of keys that rows `first_row … first_row + BLOCK_M − 1` (key positions) see.

    Returns `full_lo`, `full_hi` (keys between them are seen by every row), and for the blocks that need a mask
    `lo` and their number before and behind: those cut by the sample's first token start at `lo`, those cut by the
    diagonal or by the sample's end at `full_hi`.
    """
    hi = end
    full_hi = end
    if IS_CAUSAL:
        hi = tl.minimum(end, first_row + BLOCK_M)
        full_hi = tl.minimum(end, first_row + 1)
    if HAS_ENDS:  # nothing to do for a block of padded rows
        hi = tl.where((first_row >= end) | (first_row + BLOCK_M <= start), start, hi)
    hi = tl.maximum(hi, start)
    lo = (start // BLOCK_N) * BLOCK_N
    full_lo = tl.minimum(tl.cdiv(start, BLOCK_N) * BLOCK_N, hi)
    full_hi = tl.maximum((tl.minimum(full_hi, hi) // BLOCK_N) * BLOCK_N, full_lo)
    head_blocks = tl.cdiv(full_lo - lo, BLOCK_N)
    tail_blocks = tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK_N)
    return lo, full_lo, full_hi, head_blocks, tail_blocks


@triton.jit
def masked_block(block, lo, full_hi, head_blocks, BLOCK_N: tl.constexpr):
    """First key of the `block`-th masked block of :func:`key_range`: one loop serves both ends."""
    return tl.where(block < head_blocks, lo + block * BLOCK_N, full_hi + (block - head_blocks) * BLOCK_N)


def labelled_blocks(groups: Tensor, block: int) -> Tensor:
    """`(B, ceil(N / block))` int8: 1 where a block of keys holds a key of any group."""
    if groups.shape[1] == 0:
        return groups.new_zeros((groups.shape[0], 0))
    padding = -groups.shape[1] % block
    if padding:
        groups = F.pad(groups, (0, padding), value=-1)
    return (groups.view(groups.shape[0], -1, block).amax(-1) >= 0).to(torch.int8)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def head_block(head_dim: int) -> int:
    """Width of a tile over head_dim: a power of two, and no less than a matrix instruction takes."""
    return max(16, next_power_of_2(head_dim))


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())
