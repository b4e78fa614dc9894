"""Launch configurations: one frozen table by kernel, element size, architecture, width of the head tile and groups.

No autotuning at run time: the same input gives the same launch, and so the same bits. Each entry is the largest tile
of those tried (`python -m bench.aot --sweep`) that compiles without register spills for both 2 and 8 groups, or for
as many as it says; the entries for sm_80 fit the 99 KiB of shared memory of its smaller relatives too. They have been
chosen from what the compiler reports, and not tuned on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["TABLE", "Launch", "architecture", "launch_config", "preprocess_block", "row_splits", "widest_head_tile"]


class Launch(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, element size, architecture) -> (widest head tile, most groups, launch): the first that fits is taken.
# float32 tiles 256 wide are missing from the fused kernels: none was found that does not spill.
TABLE: dict[tuple[str, int, int], list[tuple[int, int, Launch]]] = {
    ("forward", 2, 90): [
        (64, 8, Launch(128, 64, 8, 3)),
        (128, 2, Launch(128, 64, 8, 3)),
        (128, 8, Launch(128, 32, 8, 3)),
        (256, 8, Launch(64, 32, 8, 3)),
    ],
    ("forward", 2, 80): [
        (64, 8, Launch(128, 64, 8, 3)),
        (128, 2, Launch(128, 64, 8, 3)),
        (128, 8, Launch(128, 32, 8, 3)),
        (256, 8, Launch(64, 32, 8, 2)),
    ],
    ("forward", 4, 90): [
        (64, 8, Launch(64, 32, 8, 2)),
        (128, 8, Launch(32, 32, 8, 1)),
    ],
    ("forward", 4, 80): [
        (64, 8, Launch(64, 32, 8, 2)),
        (128, 8, Launch(32, 32, 8, 1)),
    ],
    ("backward_kv", 2, 90): [
        (64, 8, Launch(64, 64, 8, 2)),
        (128, 8, Launch(64, 32, 8, 1)),
        (256, 8, Launch(32, 64, 8, 1)),
    ],
    ("backward_kv", 2, 80): [
        (64, 8, Launch(64, 32, 4, 2)),
        (128, 8, Launch(64, 64, 8, 1)),
        (256, 8, Launch(32, 32, 8, 1)),
    ],
    ("backward_kv", 4, 90): [
        (64, 8, Launch(32, 64, 8, 1)),
        (128, 2, Launch(32, 32, 8, 1)),
        (128, 8, Launch(16, 32, 8, 1)),
    ],
    ("backward_kv", 4, 80): [
        (64, 8, Launch(32, 64, 8, 1)),
        (128, 8, Launch(32, 32, 8, 1)),
    ],
    ("backward_q", 2, 90): [
        (64, 2, Launch(128, 64, 8, 3)),
        (64, 8, Launch(64, 64, 8, 2)),
        (128, 2, Launch(128, 64, 8, 2)),
        (128, 8, Launch(64, 64, 8, 2)),
        (256, 8, Launch(64, 16, 8, 2)),
    ],
    ("backward_q", 2, 80): [
        (64, 8, Launch(128, 64, 8, 3)),
        (128, 8, Launch(64, 64, 8, 2)),
        (256, 8, Launch(64, 32, 8, 1)),
    ],
    ("backward_q", 4, 90): [
        (64, 8, Launch(32, 32, 8, 1)),
        (128, 8, Launch(16, 16, 8, 1)),
    ],
    ("backward_q", 4, 80): [
        (64, 8, Launch(32, 32, 8, 1)),
        (128, 8, Launch(16, 16, 8, 1)),
    ],
    # block_m bounds the packed rows (query heads of a KV head × wanted rows); fewer take tiles of 16.
    ("rows", 2, 90): [
        (64, 8, Launch(32, 128, 8, 3)),
        (128, 8, Launch(32, 64, 8, 3)),
        (256, 8, Launch(32, 32, 8, 2)),
    ],
    ("rows", 2, 80): [
        (64, 2, Launch(32, 64, 4, 2)),
        (64, 8, Launch(32, 64, 8, 3)),
        (128, 8, Launch(32, 64, 8, 3)),
        (256, 8, Launch(32, 32, 8, 2)),
    ],
    ("rows", 4, 90): [
        (64, 8, Launch(32, 64, 8, 2)),
        (128, 8, Launch(16, 64, 8, 2)),
        (256, 8, Launch(16, 16, 8, 1)),
    ],
    ("rows", 4, 80): [
        (64, 8, Launch(32, 64, 8, 2)),
        (128, 8, Launch(16, 64, 8, 2)),
        (256, 8, Launch(16, 16, 8, 1)),
    ],
}


def architecture(device: torch.device) -> int:
    """The half of the table for `device`: 90 from Hopper on (and in the interpreter), else 80."""
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device)[0] >= 9 else 80


def widest_head_tile(kernel: str, element_size: int) -> int:
    """The widest head tile that `kernel` has launches for."""
    return max(entries[-1][0] for key, entries in TABLE.items() if key[:2] == (kernel, element_size))


def launch_config(kernel: str, head_tile: int, element_size: int, groups: int, device: torch.device) -> Launch:
    """The launch of `kernel` for tiles `head_tile` wide of `element_size`-byte elements and `groups` key groups."""
    for width, most_groups, launch in TABLE[kernel, element_size, architecture(device)]:
        if head_tile <= width and groups <= most_groups:
            return launch
    raise NotImplementedError(f"no {kernel} launch for head tiles of {head_tile}; backend='torch' has no limit")


def preprocess_block(head_tile: int) -> int:
    """Rows per program of the backward preprocess: tiles of 4,096 elements at the most."""
    return max(16, min(64, 4096 // head_tile))


def row_splits(programs: int, num_blocks: int, multiprocessors: int) -> int:
    """Splits of the keys so that `programs` row tiles fill the GPU about twice, at least a block each."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, num_blocks))
