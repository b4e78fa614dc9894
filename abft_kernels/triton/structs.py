"""The arguments of the kernels in groups: what is known at compile time, and what a launch brings.

`Features` is the one constexpr argument of every kernel. The other tuples hold tensors and numbers; the kernels make
smaller ones of them, for one tile.

Three rules keep them working from Triton 3.4 on: no field is called `values`, shapes and strings are bound to a local
`X: tl.constexpr = F.x` before use, and a tuple made inside a kernel holds no constant that must stay one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.masking import Reach
from abft_kernels.triton.launch import Launch

_LOG2E = 1.4426950408889634


class Features(NamedTuple):
    """Everything known at compile time. A kernel leaves what it does not read at its default: one more compilation
    saved for every value."""

    head_dim: int = 0
    head_dim_v: int = 0
    block_d: int = 1  # width of a tile over head_dim
    block_dv: int = 1
    block_m: int = 0  # rows of a tile
    block_n: int = 0  # keys of a tile
    groups: int = 0  # 0: no mass, or in backward no gradient of it
    groups_pad: int = 1
    precision: str = "tf32"
    causal: bool = False
    reach: Reach = Reach()  # 1 for the limits that there are
    starts: bool = False
    ends: bool = False
    packed: bool = False
    v: bool = False  # values take part; in backward, the gradient of the output
    weights: bool = False
    sinks: bool = False
    slopes: bool = False
    softcap: bool = False
    row_mask: bool = False
    dropout: bool = False
    dlse: bool = False
    dq: bool = False  # the gradients that the row kernel writes
    dk: bool = False
    dw: bool = False
    final: bool = False  # the row kernel writes results, not parts of them


class Heads(NamedTuple):
    """A `(B, H, N, D)` tensor and its strides."""

    ptr: Tensor | None
    b: int
    h: int
    n: int
    d: int

    @classmethod
    def of(cls, x: Tensor | None) -> Heads:
        return cls(None, 0, 0, 0, 0) if x is None else cls(x, *x.stride())


class Shape(NamedTuple):
    """Sizes of a fused call; query row i stands at position i + offset."""

    heads: int
    group_size: int
    n_q: int
    n_k: int
    num_tiles: int
    offset: int


class RowShape(NamedTuple):
    """Sizes of a call of the row kernel."""

    kv_heads: int
    group_size: int
    num_rows: int
    n_k: int
    blocks_per_split: int
    tiles_per_program: int  # of the backward pass
    key_offset: int


class Sequences(NamedTuple):
    """Bounds of the sequences, how far back their rows see, and where each tile of packed ones begins."""

    starts: Tensor | None
    ends: Tensor | None
    reach: Reach
    tiles: Tensor | None = None

    @classmethod
    def of(cls, call: Call) -> Sequences:
        return cls(call.starts, call.ends, call.reach)

    @classmethod
    def tiled(cls, call: Call, length: int, block: int) -> tuple[Sequences, int]:
        """Return also how many tiles of `block` tokens there are."""
        if not call.packed or call.starts is None or call.ends is None:
            return cls.of(call), -(-length // block)
        tiles = _sequence_tiles(call.starts, call.ends, length, block)
        return cls.of(call)._replace(tiles=tiles), tiles.shape[0]


class Labels(NamedTuple):
    """Groups or weights of the keys, and the blocks of keys that hold any."""

    keys: Tensor | None
    blocks: Tensor | None
    num_blocks: int


class Scores(NamedTuple):
    """`factor` is scale·log2(e), or scale/softcap with a soft cap; `softcap2` is softcap·log2(e)."""

    factor: float
    softcap2: float
    slope: Tensor | float | None  # of every head; in a kernel that of its head, in base 2

    @classmethod
    def of(cls, call: Call) -> Scores:
        if call.softcap > 0:
            return cls(call.scale / call.softcap, call.softcap * _LOG2E, call.slopes)
        return cls(call.scale * _LOG2E, 0.0, call.slopes)


class Dropout(NamedTuple):
    """`threshold` is dropout_p·2³¹, `scale` the factor of what is kept."""

    seed: int
    threshold: int
    scale: float
    stream: int = 0  # of random numbers: in a kernel, the index of its head

    @classmethod
    def of(cls, call: Call) -> Dropout:
        return cls(call.seed, int(call.dropout_p * (1 << 31)), 1.0 / (1.0 - call.dropout_p))


class Place(NamedTuple):
    """A program's sample, head, their index, sequence, and the first row or key of its tile."""

    b: tl.tensor
    h: tl.tensor
    bh: tl.tensor
    sequence: tl.tensor
    start: tl.tensor


class Rows(NamedTuple):
    """One head of a `(B, H, N, D)` tensor."""

    ptr: tl.tensor
    n: tl.tensor
    d: tl.tensor


class KeyLabels(NamedTuple):
    """`Labels` of one sample; `active` is 0 where the mass has no work."""

    keys: tl.tensor
    blocks: tl.tensor
    n_k: tl.tensor
    active: tl.tensor


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def head_block(head_dim: int) -> int:
    """Return the width of a tile over head_dim: a power of two, and no less than a matrix instruction takes."""
    return max(16, next_power_of_2(head_dim))


def head_tile(q: Tensor, v: Tensor | None) -> int:
    """Return the width of the wider head tile, by which the launch is chosen."""
    return head_block(max(q.shape[-1], 0 if v is None else v.shape[-1]))


def features(q: Tensor, v: Tensor | None, call: Call, launch: Launch, groups: int, **others: Any) -> Features:
    """Return the features of a kernel over tiles of scores; `others` are those that not all of them read."""
    head_dim, head_dim_v = q.shape[-1], 0 if v is None else v.shape[-1]
    block_dv = 1 if v is None else head_block(head_dim_v)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    sizes = (head_dim, head_dim_v, head_block(head_dim), block_dv, launch.block_m, launch.block_n)
    weights, reach = groups > 0 and call.weights is not None, Reach(*(int(limit > 0) for limit in call.reach))
    return Features(
        *(*sizes, groups, next_power_of_2(max(1, groups)), precision),
        *(call.causal, reach, call.starts is not None, call.ends is not None, call.packed, v is not None, weights),
        slopes=call.slopes is not None,
        softcap=call.softcap > 0,
        row_mask=groups > 0 and call.row_mask is not None,
        dropout=v is not None and call.dropout_p > 0,
        **others,
    )


def _sequence_tiles(starts: Tensor, ends: Tensor, total: int, block: int) -> Tensor:
    """Return `(T, 2)` int32: sequence and first token of every tile of `block` tokens of packed sequences.

    T counts a tile more for each sequence than `total` tokens fill, so that no length has to be read back; the
    surplus tiles begin at `total`, where they find nothing to do. Later tiles come first: they are the longest.
    """
    tiles = -(-total // block) + starts.shape[0]
    counts = (ends - starts + block - 1) // block
    after = counts.cumsum(0)
    index = torch.arange(tiles, device=starts.device)
    sequence = torch.searchsorted(after, index, right=True)
    unused = sequence >= starts.shape[0]
    sequence = sequence.clamp(max=starts.shape[0] - 1)
    first = starts[sequence] + (index - (after[sequence] - counts[sequence])) * block
    first = torch.where(unused, torch.full_like(first, total), first)
    return torch.stack([sequence, first], 1).to(torch.int32).flip(0).contiguous()
