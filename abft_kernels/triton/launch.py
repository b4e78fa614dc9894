"""Launch configurations: how a call is cut, from one frozen table (`abft_kernels.triton.launch_table`).

No autotuning at run time: the same input gives the same launch, and so the same bits.
"""

from __future__ import annotations

import torch

from abft_kernels.triton.launch_table import ARCHITECTURES, TABLE, Launch


def table_architecture(capability: int) -> int:
    """The part of the table that serves a GPU of compute capability `capability` (10·major + minor)."""
    return max((arch for arch in ARCHITECTURES if arch <= capability), default=min(ARCHITECTURES))


def architecture(device: torch.device) -> int:
    """The part of the table for `device`; the interpreter takes Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return table_architecture(10 * major + minor)


# The kernels behind an operator; all must serve a call, the backward ones too.
_KERNELS = {"fused": ("forward", "backward_kv", "backward_q"), "rows": ("rows",)}


def widest_head_tile(operator: str, element_size: int, groups: int, device: torch.device) -> int:
    """The widest head tile that `operator` ("fused" or "rows") has launches for; 0 if none."""
    arch, widest = architecture(device), []
    for kernel in _KERNELS[operator]:  # in words that torch.compile traces
        widest.append(max([width for width, most, _ in TABLE[kernel, element_size, arch] if groups <= most] + [0]))
    return min(widest)


def launch_config(kernel: str, head_tile: int, element_size: int, groups: int, device: torch.device) -> Launch:
    """The launch of `kernel` for tiles `head_tile` wide of `element_size`-byte elements and `groups` key groups."""
    for width, most_groups, launch in TABLE[kernel, element_size, architecture(device)]:
        if head_tile <= width and groups <= most_groups:
            return launch
    raise NotImplementedError(f"no {kernel} launch for head tiles of {head_tile}; backend='torch' has no limit")


def decodes(n_q: int, group_size: int, n_k: int) -> bool:
    """Whether so few queries stand before so many keys that the keys must be split to fill the GPU."""
    return n_q * group_size <= 64 and n_q <= 16 and n_k >= 256


def preprocess_block(head_tile: int) -> int:
    """Rows per program of the backward preprocess: tiles of 4,096 elements at the most."""
    return max(16, min(64, 4096 // head_tile))


def row_splits(programs: int, num_blocks: int, multiprocessors: int) -> int:
    """Splits of the keys so that `programs` row tiles fill the GPU about twice, at least a block each."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, num_blocks))
