"""The arguments of the kernels in groups: what is known at compile time, and what a launch brings.

`Features` is the one constexpr argument of every kernel. The other tuples hold tensors and numbers; the kernels make
smaller ones of them, for one tile.

Three rules keep them working from Triton 3.4 on: no field is called `values`, shapes and strings are bound to a local
`X: tl.constexpr = F.x` before use, and a tuple made inside a kernel holds no constant that must stay one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    deferred: int = 0  # groups whose keys come last: 0 groups in the main loop, and these in `last`
    gathered: bool = False  # the keys of a tile are labelled ones, not consecutive
    last: Features | None = None  # of the tiles of labelled keys
    masked_stages: int = 1
    descriptors: bool = False
    specialized: bool = False
    atomic_dq: bool = False  # the kernel of dK and dV adds up dQ too
    whole: bool = False  # the row kernel reads its rows, and writes dq, at their places among all queries
    add: bool = False  # the row kernel adds dq and dk to what is there


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


class HeadCounts(NamedTuple):
    """Query heads, and how many of them share a KV head."""

    heads: int
    group_size: int


class Sizes(NamedTuple):
    """Sizes of a fused call; query row i stands at position i + offset. Kernels take them one by one: Triton compiles
    anew for a size in a tuple that is 1 or a multiple of 16."""

    n_q: int
    n_k: int
    offset: int
    num_tiles: int
    num_sequences: int

    @classmethod
    def of(cls, call: Call, n_q: int, n_k: int) -> Sizes:
        return cls(n_q, n_k, call.row_offset, 0, 1 if call.starts is None else call.starts.shape[0])

    def tiled(self, call: Call, length: int, block: int) -> Sizes:
        """Return the sizes for tiles of `block` of the `length` rows or keys.

        Packed sequences take up to one tile more for each: `abft_kernels.triton.common.locate` finds theirs.
        """
        tiles = -(-length // block)
        return self._replace(num_tiles=tiles + self.num_sequences if call.packed else tiles)


class Shape(NamedTuple):
    """`HeadCounts` and `Sizes` in a kernel."""

    heads: int
    group_size: tl.tensor
    n_q: tl.tensor
    n_k: tl.tensor
    offset: tl.tensor


class RowCounts(NamedTuple):
    """Counts of a call of the row kernel. Triton compiles anew where one is 1: most calls have one row and tile."""

    kv_heads: int
    group_size: int
    num_rows: int
    tiles_per_program: int  # of the backward pass


class RowSizes(NamedTuple):
    """Sizes of a call of the row kernel, which its kernels take one by one."""

    n_k: int
    blocks_per_split: int
    key_offset: int
    n_q: int  # of all queries, with `Features.whole`
    offset: int  # position of the first of them


class RowShape(NamedTuple):
    """`RowCounts` and `RowSizes` in a kernel."""

    kv_heads: int
    group_size: int
    num_rows: int
    tiles_per_program: int
    n_k: tl.tensor
    blocks_per_split: tl.tensor
    key_offset: tl.tensor
    n_q: tl.tensor
    offset: tl.tensor


class Sequences(NamedTuple):
    """Bounds of the sequences, and how far back their rows see."""

    starts: Tensor | None
    ends: Tensor | None
    reach: Reach

    @classmethod
    def of(cls, call: Call) -> Sequences:
        return cls(call.starts, call.ends, call.reach)


class Labels(NamedTuple):
    """Groups or weights of the keys, and the blocks of keys that hold any.

    Where labelled keys come last, the index of `abft_kernels.triton.labelled`: counts in `blocks`, and the list.
    """

    keys: Tensor | None
    blocks: Tensor | None
    positions: Tensor | None = None


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

    threshold: int
    scale: float
    seed: tl.tensor | int = 0  # in a kernel: the seed, and the stream of random numbers, its head's index
    stream: tl.tensor | int = 0

    @classmethod
    def of(cls, call: Call) -> Dropout:
        return cls(int(call.dropout_p * (1 << 31)), 1.0 / (1.0 - call.dropout_p))


def seed_halves(call: Call) -> tuple[int, int]:
    """Return the low and the high half of the seed of dropout as int32: one type, whatever the seed."""
    low, high = call.seed & 0xFFFFFFFF, call.seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


class Place(NamedTuple):
    """A program's sample, head, their index, sequence, and the first row or key of its tile."""

    b: tl.tensor
    h: tl.tensor
    bh: tl.tensor
    sequence: tl.tensor
    start: tl.tensor
    limit: tl.tensor | int = 0  # of packed sequences: one past the last row or key that its tiles write


class Rows(NamedTuple):
    """One head of a `(B, H, N, D)` tensor, and perhaps a descriptor of its tiles in the sample's heads."""

    ptr: tl.tensor
    n: tl.tensor
    d: tl.tensor
    tiles: tl.tensor_descriptor | None = None
    h: tl.tensor | int = 0


class KeyLabels(NamedTuple):
    """`Labels` of one sample; `active` is 0 where the mass has no work."""

    keys: tl.tensor
    blocks: tl.tensor
    positions: tl.tensor
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
    sizes = (head_dim, head_dim_v, head_block(head_dim), block_dv, launch.block_m, launch.block_n)
    weights, reach = groups > 0 and call.weights is not None, Reach(*(int(limit > 0) for limit in call.reach))
    return Features(
        *(*sizes, groups, next_power_of_2(max(1, groups))),
        *(call.causal, reach, call.starts is not None, call.ends is not None, call.packed, v is not None, weights),
        slopes=call.slopes is not None,
        softcap=call.softcap > 0,
        row_mask=groups > 0 and call.row_mask is not None,
        dropout=v is not None and call.dropout_p > 0,
        masked_stages=launch.masked_stages,
        descriptors=launch.descriptors,
        **others,
    )
