"""Launch configurations: how a call is cut, from one frozen table (`abft_kernels.triton.launch_table`).

No autotuning at run time: the same input gives the same launch, and so the same bits.
"""

from __future__ import annotations

import torch

from abft_kernels.triton.launch_table import ARCHITECTURES, TABLE, Launch


def table_architecture(capability: int) -> int:
    """Return the part of the table that serves a GPU of compute capability `capability` (10·major + minor)."""
    return max((arch for arch in ARCHITECTURES if arch <= capability), default=min(ARCHITECTURES))


def architecture(device: torch.device) -> int:
    """Return the part of the table for `device`; the interpreter takes Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return table_architecture(10 * major + minor)


# The kernels of an operator; all must serve a call, the backward ones too.
_KERNELS = {"fused": ("forward", "backward_kv", "backward_q"), "rows": ("rows",)}


def widest_head_tile(operator: str, element_size: int, groups: int, device: torch.device) -> int:
    """Return the widest head tile that `operator` ("fused" or "rows") has launches for; 0 if none."""
    arch, widest = architecture(device), []
    for kernel in _KERNELS[operator]:  # an explicit loop: torch.compile must be able to trace it
        widest.append(max([width for width, most, _ in TABLE[kernel, element_size, arch] if groups <= most] + [0]))
    return min(widest)


def launch_config(kernel: str, head_tile: int, element_size: int, groups: int, device: torch.device) -> Launch:
    """Return the launch of `kernel` for head tiles of this width, elements of so many bytes, and G groups."""
    for width, most_groups, launch in TABLE[kernel, element_size, architecture(device)]:
        if head_tile <= width and groups <= most_groups:
            return launch
    raise NotImplementedError(f"no {kernel} launch for head tiles of {head_tile}; backend='torch' has no limit")


def decodes(n_q: int, group_size: int, n_k: int) -> bool:
    """Return True if the query tiles alone cannot fill the GPU, so that keys are split (split-K)."""
    return n_q * group_size <= 64 and n_q <= 16 and n_k >= 256


def preprocess_block(head_tile: int) -> int:
    """Return the rows per program of the backward preprocess: tiles of at most 4,096 elements."""
    return max(16, min(64, 4096 // head_tile))


def row_splits(programs: int, num_blocks: int, multiprocessors: int) -> int:
    """Return the splits of the keys that make `programs` row tiles fill the GPU twice, each at least one block."""
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, num_blocks))
