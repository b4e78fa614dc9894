"""The candidates of the launch table: (block_m, block_n, num_warps, num_stages), the best guess first.

`python -m bench.compile.derive` chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping

from abft_kernels.triton.launch_table import Launch

__all__ = ["candidates", "measured_candidates"]

Launches = list[tuple[int, int, int, int]]

# By kernel, element size and head tile. For Hopper:
# 128 rows to two warpgroups, deep pipelines; the backward kernels hold two accumulators and take smaller tiles. The
# fused kernels have no float32 tiles 256 wide: in backward none was found that does not spill.
_NVIDIA: dict[tuple[str, int], dict[int, Launches]] = {
    ("forward", 2): {
        64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3),
             (64, 32, 4, 2)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
              (128, 32, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 8, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 3),
              (64, 16, 8, 2), (32, 32, 8, 2)],
        512: [(64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)],
    },
    ("forward", 4): {
        64: [(64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        128: [(64, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_kv", 2): {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 1),
             (32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 4, 2)],
        128: [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2),
              (64, 64, 8, 1), (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 4, 1), (16, 64, 4, 2), (16, 128, 8, 2),
              (16, 64, 8, 2), (32, 32, 8, 1), (16, 32, 4, 1)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 8, 2), (16, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1),
              (16, 16, 8, 1)],
        512: [(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("backward_kv", 4): {
        64: [(32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        128: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_q", 2): {
        64: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2),
             (64, 32, 8, 2)],
        128: [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2),
              (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2)],
        256: [(64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2), (64, 16, 8, 1), (32, 32, 8, 1),
              (32, 16, 8, 1)],
        512: [(32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1), (32, 16, 16, 1), (16, 32, 16, 1), (16, 16, 4, 1)],
    },
    ("backward_q", 4): {
        64: [(64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
        128: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    # block_m bounds the packed rows (query heads of a KV head × wanted rows); fewer take tiles of 16.
    ("rows", 2): {
        64: [(32, 128, 8, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 8, 3), (16, 64, 4, 2),
             (16, 32, 4, 2)],
        128: [(32, 128, 8, 3), (32, 64, 8, 3), (32, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 2)],
        256: [(32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2)],
        512: [(16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)],
    },
    ("rows", 4): {
        64: [(32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 4, 2), (16, 32, 4, 2)],
        128: [(16, 64, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 4, 2)],
        512: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
}  # fmt: skip

# Without the mass in the loop. sm_80 has 99 KiB on most of its cards, and so two stages where sm_90 takes three.
_NVIDIA_NO_MASS: dict[tuple[str, int], dict[int, Launches]] = {
    ("forward", 2): {
        64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 3)],
    },
    ("backward_kv", 2): {
        64: [(64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)],
        128: [(64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 2), (32, 128, 8, 1), (64, 64, 8, 2), (64, 64, 8, 1),
              (16, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)],
    },
    ("backward_q", 2): {
        64: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)],
    },
}  # fmt: skip

# MFMA tiles are 16 or 32 wide, a wave has 64 lanes and 512 vector registers, a program 64 KiB of LDS. One stage takes
# tiles through registers; two prefetch the next one there.
_CDNA: dict[tuple[str, int], dict[int, Launches]] = {
    ("forward", 2): {
        64: [(128, 64, 4, 2), (128, 64, 4, 1), (128, 32, 4, 2), (128, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
        128: [(128, 64, 4, 1), (128, 64, 8, 1), (128, 32, 4, 1), (128, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
        256: [(64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1)],
        512: [(32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
    },
    ("forward", 4): {
        64: [(64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)],
        128: [(64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)],
    },
    ("backward_kv", 2): {
        64: [(64, 64, 4, 1), (32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        128: [(32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
        256: [(32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
        512: [(16, 16, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
    },
    ("backward_kv", 4): {
        64: [(32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
        128: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    ("backward_q", 2): {
        64: [(128, 32, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
        128: [(64, 64, 4, 1), (128, 32, 8, 1), (64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
        256: [(64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        512: [(32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    ("backward_q", 4): {
        64: [(64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)],
        128: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    ("rows", 2): {
        64: [(32, 64, 4, 2), (32, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)],
        128: [(32, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)],
        256: [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
        512: [(16, 32, 8, 1), (16, 16, 4, 1)],
    },
    ("rows", 4): {
        64: [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
        128: [(16, 32, 4, 1), (16, 16, 4, 1)],
        256: [(16, 32, 8, 1), (16, 16, 4, 1)],
        512: [(16, 16, 8, 1), (16, 16, 4, 1)],
    },
}  # fmt: skip

# WMMA tiles are 16 wide, a wave has 32 lanes and 256 vector registers, a program 64 KiB of LDS; float32 has no matrix
# instruction.
_RDNA: dict[tuple[str, int], dict[int, Launches]] = {
    ("forward", 2): {
        64: [(64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)],
        128: [(64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        256: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
        512: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("forward", 4): {
        64: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
        128: [(32, 16, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_kv", 2): {
        64: [(32, 64, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
        128: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
        512: [(16, 16, 16, 1), (16, 16, 8, 1)],
    },
    ("backward_kv", 4): {
        64: [(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
        128: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("backward_q", 2): {
        64: [(64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1)],
        128: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
        256: [(32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
        512: [(16, 16, 16, 1), (16, 16, 8, 1)],
    },
    ("backward_q", 4): {
        64: [(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
        128: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("rows", 2): {
        64: [(16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
        128: [(16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 1)],
        512: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("rows", 4): {
        64: [(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
        128: [(16, 16, 8, 1), (16, 16, 16, 1)],
        256: [(16, 16, 8, 1), (16, 16, 16, 1)],
        512: [(16, 16, 16, 1)],
    },
}  # fmt: skip

# Beside the rows' own: the values share the memory, so fewer stages and narrower blocks follow.
_DECODE_TOO: dict[int, dict[int, Launches]] = {
    2: {
        64: [(16, 64, 4, 1), (16, 32, 4, 1)],
        128: [(32, 64, 8, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 1)],
        512: [(16, 16, 16, 1)],
    },
    4: {
        64: [(16, 32, 4, 1), (16, 16, 4, 1)],
        128: [(16, 16, 8, 1)],
        256: [(16, 16, 8, 1), (16, 16, 4, 1)],
        512: [(16, 16, 16, 1)],
    },
}
_FAMILIES: Mapping[str, dict[tuple[str, int], dict[int, Launches]]] = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _NVIDIA),
    "cdna": _CDNA,
    "rdna": _RDNA,
}
FAMILIES = tuple(_FAMILIES)
KERNELS = ("forward", "backward_kv", "backward_q", "backward_atomic", "rows", "decode")


# Forms that only a clock may choose: tiles by tensor descriptors, and with them masked blocks in two stages. What they
# spill stands outside of their main loops. Producer and consumer warps are left out: their results come first.
_BY_DESCRIPTORS: dict[tuple[str, str, int], dict[int, list[Launch]]] = {
    ("sm_90", "forward", 2): {
        64: [Launch(128, 128, 8, 3, masked_stages=2, descriptors=True)],
        128: [Launch(128, 64, 8, 3, masked_stages=2, descriptors=True),
              Launch(128, 128, 8, 2, masked_stages=2, descriptors=True)],
    },
    ("sm_90", "backward_kv", 2): {
        64: [Launch(64, 128, 8, 2, descriptors=True), Launch(32, 128, 8, 2, masked_stages=2, descriptors=True)],
        128: [Launch(32, 128, 8, 2, masked_stages=2, descriptors=True), Launch(64, 128, 8, 2, descriptors=True)],
    },
    ("sm_90", "backward_q", 2): {
        64: [Launch(128, 128, 8, 2, masked_stages=2, descriptors=True),
             Launch(128, 64, 8, 3, masked_stages=2, descriptors=True)],
        128: [Launch(128, 64, 8, 2, masked_stages=2, descriptors=True)],
    },
    ("sm_100", "backward_q", 2): {128: [Launch(128, 64, 8, 2, masked_stages=2, descriptors=True)]},
}  # fmt: skip


def measured_candidates(family: str, kernel: str, element_size: int, head_tile: int) -> list[Launch]:
    """Return the launches that are candidates where they can be timed, and nowhere else."""
    return _BY_DESCRIPTORS.get((family, kernel, element_size), {}).get(head_tile, [])


def candidates(family: str, kernel: str, element_size: int, groups: int) -> dict[int, Launches]:
    """Return the candidates of each head tile that a kernel has with so many groups; none without entries of its own.

    Without the mass the fused kernels of NVIDIA GPUs have entries in 16 bits; AMD's share those of the mass.
    """
    table = _FAMILIES[family]
    if groups == 0:
        return _NVIDIA_NO_MASS.get((kernel, element_size), {}) if table is _NVIDIA else {}
    if kernel == "backward_atomic":  # elsewhere dQ has its own kernel
        of_keys = table["backward_kv", element_size]
        return {tile: of_keys[tile] for tile in (64, 128)} if table is _NVIDIA else {}
    if kernel != "decode":
        return table[kernel, element_size]
    of_rows = table["rows", element_size]
    return {tile: [*of_rows[tile], *_DECODE_TOO[element_size][tile]] for tile in of_rows}
