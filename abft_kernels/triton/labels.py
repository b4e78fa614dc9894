"""Groups or weights of the keys: the map of blocks that hold any, w_jg of a block, and sums for each group."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.triton.structs import KeyLabels, Labels

# Where labelled keys come last: those of a tile, and the keys of a program that makes their index.
TILE = tl.constexpr(16)
INDEXED = tl.constexpr(1024)


def key_labels(call: Call, groups: int, block: int = 0) -> Labels:
    """Return the labels of the keys for `groups` groups; with `block`, the map of labelled blocks too."""
    keys = (call.groups if call.weights is None else call.weights) if groups else None
    return Labels(keys, _labelled_blocks(keys, block) if block and keys is not None else None)


def _labelled_blocks(labels: Tensor, block: int) -> Tensor:
    """Return `(B, ceil(N / block))` int8: 1 where a block of keys holds a key of any group, or of any weight."""
    labelled = labels >= 0 if labels.dim() == 2 else (labels != 0).any(-1)
    padding = -labelled.shape[1] % block
    if padding:
        labelled = F.pad(labelled, (0, padding), value=False)
    return labelled.view(labelled.shape[0], -1, block).any(-1).to(torch.int8)


@triton.jit
def sample_labels(labels, b, n_k, active, F: tl.constexpr):
    """Return the labels of one sample; the pointers stand for nothing without groups."""
    keys = b
    blocks = b
    positions = b
    if F.groups + F.deferred > 0:
        keys = labels.keys + b * n_k * (F.groups if F.weights else 1)
        if labels.positions is not None:
            blocks = labels.blocks + b * counts_of(n_k)
            positions = labels.positions + b * (n_k + TILE)
        elif labels.blocks is not None:
            blocks = labels.blocks + b * tl.cdiv(n_k, F.block_n)
    return KeyLabels(keys, blocks, positions, n_k, active)


@triton.jit
def counts_of(n_k):
    """Return how many counts the index of labelled keys holds for a sample."""
    return (n_k // INDEXED + 1) * (INDEXED // TILE) + 1


@triton.jit
def is_labelled(group, GROUPS: tl.constexpr):
    """Return which group ids are labels."""
    return (group >= 0) & (group < GROUPS)


@triton.jit
def any_label(labels, start_n, F: tl.constexpr):
    """Return whether the block of keys at `start_n` holds a label that the rows want."""
    found = labels.active
    if not F.gathered:
        found = tl.load(labels.blocks + start_n // F.block_n) * labels.active
    return found != 0


@triton.jit
def load_groups(labels, offs_n, F: tl.constexpr):
    """Load the group ids of a block of keys, −1 from the last key on; unused with weights."""
    group = offs_n
    if not F.weights:
        group = tl.load(labels.keys + offs_n, mask=offs_n < labels.n_k, other=-1).to(tl.int32)
    return group


@triton.jit
def group_weight(g, group, labels, offs_n, keys, F: tl.constexpr):
    """Return w_jg of a block of keys, float32: the indicator of group g, or the key's weight in it."""
    if F.weights:
        own = (offs_n >= keys.start) & (offs_n < keys.end)
        w = tl.load(labels.keys + offs_n.to(tl.int64) * F.groups + g, mask=own, other=0.0)
    else:
        w = tl.where(group == g, 1.0, 0.0)
    return w


@triton.jit
def add_column(tile, column, x, COLUMNS: tl.constexpr):
    """Return `tile` `[rows, COLUMNS]` with `x` added to one column."""
    return tile + tl.where((tl.arange(0, COLUMNS) == column)[None, :], x[:, None], 0.0)


@triton.jit
def add_masses(mass, p, labels, offs_n, keys, F: tl.constexpr):
    """Return `mass` plus the sums of a block's probabilities for each group."""
    GROUPS: tl.constexpr = F.groups
    group = load_groups(labels, offs_n, F)
    for g in tl.static_range(GROUPS):
        w = group_weight(g, group, labels, offs_n, keys, F)
        mass = add_column(mass, g, tl.sum(p * w[None, :], 1), F.groups_pad)
    return mass
