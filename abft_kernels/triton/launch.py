"""Launch configurations: how a call is cut, from one frozen table (`abft_kernels.triton.launch_table`).

No autotuning at run time: the same input on the same kind of GPU gives the same launch, and so the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from abft_kernels.triton.launch_table import TABLE, Entry, Launch

__all__ = [
    "GPU",
    "SMALL",
    "UNSPLIT_BLOCKS",
    "Forms",
    "Launch",
    "decodes",
    "family_of",
    "gpu_of",
    "launch_config",
    "preprocess_block",
    "refusal",
    "row_splits",
    "serves",
]

# Of keys in the row kernel: splitting so few takes longer, by the launch that merges the splits, than it saves.
UNSPLIT_BLOCKS = 8

# Of the kernels that only move data.
SMALL = Launch(0, 0, 4, 3)

_OLDEST = {"sm_": "sm_80", "gfx": "gfx90a (CDNA 2) or gfx1100 (RDNA 3)"}


class Forms(NamedTuple):
    """The forms that a call can take: without descriptors its tiles are loaded through pointers."""

    descriptors: bool
    specialized: bool


POINTERS = Forms(descriptors=False, specialized=False)


class GPU(NamedTuple):
    """What a launch is chosen by."""

    name: str  # sm_90, gfx942
    family: str | None  # the part of the table; None: no part serves it
    shared_memory: int  # bytes that one program may have

    @property
    def reason(self) -> str | None:
        """Return why no launch serves this GPU, or None."""
        if self.family is None:
            return f"this GPU is {self.name}; the kernels need {_OLDEST[self.name[:3]]} or newer"
        return None


def family_of(name: str) -> str | None:
    """Return the part of the table for an architecture such as "sm_90" or "gfx942"; None if it is too old.

    What is newer than this table takes entries that need no instruction of one generation and little shared memory.
    """
    if name.startswith("sm_"):
        major = int(name.removeprefix("sm_")) // 10
        if major < 8:
            return None
        # sm_12x has the matrix instructions of sm_80, and as little shared memory as sm_86.
        return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
    if name.startswith(("gfx90a", "gfx94", "gfx95")):
        return "cdna"
    return "rdna" if len(name) == 7 and name[3:] >= "1100" else None


# The interpreter takes Hopper's part of the table.
_INTERPRETER = GPU("sm_90", "sm_90", 227 << 10)


@torch.compiler.assume_constant_result
def gpu_of(device: torch.device) -> GPU:
    """Return what launches on `device` are chosen by."""
    if device.type != "cuda":
        return _INTERPRETER
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _properties(index: int) -> GPU:
    from triton.runtime import driver

    # The bytes that Triton itself compares with: all that a program may opt in to.
    shared_memory = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    name = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return GPU(name, family_of(name), shared_memory)


# The kernels of an operator; all must serve a call, the backward ones too.
_KERNELS = {"fused": ("forward", "backward_kv", "backward_q"), "rows": ("rows",)}


def _entries(kernel: str, element_size: int, groups: int, gpu: GPU) -> list[Entry]:
    """Return the entries that serve so many groups and fit this GPU; narrow head tiles first."""
    entries = []
    if gpu.family is not None:
        for entry in TABLE.get((kernel, element_size, gpu.family), []):  # an explicit loop, for torch.compile to trace
            if groups <= entry.groups and entry.shared_memory <= gpu.shared_memory:
                entries.append(entry)
    return entries


def _find(
    kernel: str, head_tile: int, element_size: int, groups: int, gpu: GPU, forms: Forms = POINTERS
) -> Launch | None:
    """Return the first launch whose form the call can take; if there is none, the first of all, in a form that it can
    take."""
    found = None
    for entry in _entries(kernel, element_size, groups, gpu):
        if head_tile <= entry.head_tile:
            launch = entry.launch
            descriptors = launch.descriptors and forms.descriptors
            specialized = launch.specialized and descriptors and forms.specialized
            possible = launch._replace(descriptors=descriptors, specialized=specialized)
            if possible == launch:
                return launch
            found = found or possible
    return found


def serves(kernel: str, head_tile: int, element_size: int, groups: int, device: torch.device) -> bool:
    """Return True if the table has a launch of `kernel` for this call."""
    return _find(kernel, head_tile, element_size, groups, gpu_of(device)) is not None


def refusal(operator: str, head_dim: int, element_size: int, groups: int, device: torch.device) -> str | None:
    """Return why no launch of `operator` ("fused" or "rows") serves this call on `device`, or None."""
    gpu = gpu_of(device)
    if gpu.reason:
        return gpu.reason
    for kernel in _KERNELS[operator]:
        if _find(kernel, head_dim, element_size, groups, gpu) is None:
            widest = max([0] + [entry.head_tile for entry in _entries(kernel, element_size, groups, gpu)])
            return (
                f"head_dim {head_dim} is over {widest}, the most of the {kernel} kernel in {8 * element_size} bits "
                f"with {groups} groups on {gpu.name} with {gpu.shared_memory >> 10} KiB of shared memory"
            )
    return None


def launch_config(
    kernel: str, head_tile: int, element_size: int, groups: int, device: torch.device, forms: Forms = POINTERS
) -> Launch:
    """Return the launch of `kernel` for head tiles of this width, elements of so many bytes, and G groups."""
    launch = _find(kernel, head_tile, element_size, groups, gpu_of(device), forms)
    if launch is None:
        raise NotImplementedError(
            f"no {kernel} launch for head tiles of {head_tile} on {gpu_of(device).name}; backend='torch' has no limit"
        )
    return launch


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
