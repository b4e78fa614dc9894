"""Launch configurations: one frozen table by kernel, width of the head tile and element size.

No autotuning at run time: the same input gives the same launch, and so the same bits. The entries are the
largest tiles that compile without register spills and fit the shared memory of sm_80 (which
`tests/kernels/test_aot.py` checks ahead of time); they have not been tuned on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Launch", "launch_config", "preprocess_block", "row_splits"]


class Launch(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, element size, architecture) -> (widest head tile, launch); looked up by the first width that fits.
TABLE: dict[tuple[str, int, int], list[tuple[int, Launch]]] = {
("forward", 2, 80): [
        (64, Launch(128, 64, 4, 3)),
        (128, Launch(128, 64, 8, 2)),
        (256, Launch(64, 32, 4, 2)),
    ],
    ("forward", 4, 80): [
        (64, Launch(64, 32, 4, 2)),
        (128, Launch(32, 32, 4, 2)),
        (256, Launch(32, 16, 4, 1)),
    ],
    ("backward_kv", 2, 80): [
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(64, 64, 8, 2)),
        (256, Launch(32, 64, 8, 1)),
    ],
    ("backward_kv", 4, 80): [
        (64, Launch(32, 32, 4, 1)),
        (128, Launch(32, 32, 8, 1)),
        (256, Launch(16, 16, 8, 1)),
    ],
    ("backward_q", 2, 80): [
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(64, 64, 8, 2)),
        (256, Launch(64, 32, 8, 1)),
    ],
    ("backward_q", 4, 80): [
        (64, Launch(32, 32, 4, 1)),
        (128, Launch(32, 32, 8, 1)),
        (256, Launch(16, 16, 8, 1)),
    ],
    # block_m bounds the packed rows (query heads of a KV head × wanted rows).
    ("rows", 2, 80): [
        (64, Launch(32, 128, 4, 3)),
        (128, Launch(32, 64, 4, 3)),
        (256, Launch(32, 32, 4, 2)),
    ],
    ("rows", 4, 80): [
        (64, Launch(32, 64, 4, 2)),
        (128, Launch(16, 32, 4, 2)),
        (256, Launch(16, 16, 4, 2)),
    ],
("forward", 2, 90): [
        (64, Launch(128, 64, 4, 3)),
        (128, Launch(128, 64, 8, 2)),
        (256, Launch(64, 32, 4, 2)),
    ],
    ("forward", 4, 90): [
        (64, Launch(64, 32, 4, 2)),
        (128, Launch(32, 32, 4, 2)),
        (256, Launch(32, 16, 4, 1)),
    ],
    ("backward_kv", 2, 90): [
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(64, 64, 8, 2)),
        (256, Launch(32, 64, 8, 1)),
    ],
    ("backward_kv", 4, 90): [
        (64, Launch(32, 32, 4, 1)),
        (128, Launch(32, 32, 8, 1)),
        (256, Launch(16, 16, 8, 1)),
    ],
    ("backward_q", 2, 90): [
        (64, Launch(64, 64, 4, 2)),
        (128, Launch(64, 64, 8, 2)),
        (256, Launch(64, 32, 8, 1)),
    ],
    ("backward_q", 4, 90): [
        (64, Launch(32, 32, 4, 1)),
        (128, Launch(32, 32, 8, 1)),
        (256, Launch(16, 16, 8, 1)),
    ],
    # block_m bounds the packed rows (query heads of a KV head × wanted rows).
    ("rows", 2, 90): [
        (64, Launch(32, 128, 4, 3)),
        (128, Launch(32, 64, 4, 3)),
        (256, Launch(32, 32, 4, 2)),
    ],
    ("rows", 4, 90): [
        (64, Launch(32, 64, 4, 2)),
        (128, Launch(16, 32, 4, 2)),
        (256, Launch(16, 16, 4, 2)),
    ],
}


def launch_config(kernel: str, head_tile: int, element_size: int) -> Launch:
    """The launch of `kernel` for tiles `head_tile` wide of `element_size`-byte elements."""
    for width, launch in TABLE[kernel, element_size, 90]:
        if head_tile <= width:
            return launch
    raise NotImplementedError(f"no {kernel} launch for head tiles of {head_tile}; backend='torch' has no limit")


def preprocess_block(head_tile: int) -> int:
    """Rows per program of the backward preprocess: tiles of 4,096 elements at the most."""
    return max(16, min(64, 4096 // head_tile))


def row_splits(programs: int, num_blocks: int, multiprocessors: int) -> int:
    """Splits of the keys so that `programs` row tiles fill the GPU about twice, at least a block each."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, num_blocks))
