"""Tensor descriptors (TMA): the GPU's copy engine loads whole tiles, and gives 0 outside of the rows described.

A program describes the rows of its own sequence, so that no tile shows padding or another sequence, NaN or not: blocks
that a mask cuts need no masked loads. Descriptors that the host makes would save a program some 128 bytes of writing,
but they know whole tensors only, and Triton before 3.8 takes none in a tuple.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.triton.common import INTERPRETED
from abft_kernels.triton.launch import Forms, Launch, gpu_of

# From 3.5 on an allocator belongs to a context, not to the process.
_SCOPED_ALLOCATOR = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)


@triton.jit
def tiles_of(x, b, heads, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MADE: tl.constexpr):
    """Return a descriptor of the tiles of BLOCK rows of a sample's heads, None if not MADE.

    It describes the rows `first … limit − 1`, those of one sequence.
    """
    tiles = None
    if MADE:
        base = x.ptr + b * x.b + tl.cast(first, tl.int64) * x.n
        rows = tl.maximum(limit - first, 1)  # a sequence without a row has no tile that is loaded
        tiles = tl.make_tensor_descriptor(
            base,
            shape=[heads, rows, HEAD_DIM],
            strides=[tl.cast(x.h, tl.int64), tl.cast(x.n, tl.int64), 1],
            block_shape=[1, BLOCK, HEAD_DIM],
        )
    return tiles


@triton.jit
def load_described(x, start, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load the tile of BLOCK rows from `start` on by a descriptor of one head.

    For a tile outside of the loop, which the compiler cuts into one part for each group of consumer warps: it takes no
    pointers there, and no descriptor of more dimensions than the tile.
    """
    base = x.ptr + tl.cast(first, tl.int64) * x.n
    rows = tl.maximum(limit - first, 1)
    tiles = tl.make_tensor_descriptor(
        base, shape=[rows, HEAD_DIM], strides=[tl.cast(x.n, tl.int64), 1], block_shape=[BLOCK, HEAD_DIM]
    )
    return tiles.load([start - first, 0])


def forms_of(*tensors: Tensor | None) -> Forms:
    """Return the forms in which a kernel can load `(B, H, N, D)` tensors, all on one device."""
    given = [x for x in tensors if x is not None]
    possible = _has_descriptors(given[0].device) and all(_can_be_described(x) for x in given)
    return Forms(descriptors=possible, specialized=possible)


def _has_descriptors(device: torch.device) -> bool:
    """Return True on NVIDIA GPUs from sm_90 on, and in the interpreter."""
    name = gpu_of(device).name
    return INTERPRETED or (_SCOPED_ALLOCATOR and name.startswith("sm_") and int(name[3:]) >= 90)


def _can_be_described(x: Tensor) -> bool:
    """Return True if a descriptor can hold the strides, and a tile over head_dim has no column too many."""
    _, heads, rows, columns = x.stride()
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    head_dim = x.shape[3]
    return aligned and heads > 0 and rows > 0 and columns == 1 and head_dim >= 16 and head_dim & (head_dim - 1) == 0


def with_scratch(run: Callable[..., Any], launch: Launch, device: torch.device) -> Callable[..., Any]:
    """Return `run`, a kernel's launch, with memory on `device` for the descriptors that its programs make.

    The allocator is set in a context of its own: the caller's stays as it is.
    """
    if INTERPRETED or not launch.descriptors:
        return run
    context = contextvars.copy_context()
    context.run(triton.set_allocator, functools.partial(_allocate, device))
    return functools.partial(context.run, run)


def _allocate(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    # PyTorch's blocks are aligned to 512 bytes, and are given again in the order of the current stream.
    return torch.empty(size, dtype=torch.int8, device=device)
