"""The launch table. Written by `python -m bench.compile.derive`: change its candidates, not this file.

No register spills and within shared memory by the compiler's report; not tuned on a GPU.
"""

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """Tiles of rows and keys, warps and pipeline stages, and the form of the kernel (`Forms`)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    masked_stages: int = 1  # of the loop over masked blocks
    descriptors: bool = False  # the fused kernels load tiles by tensor descriptors
    specialized: bool = False  # the forward has producer and consumer warps

    @property
    def options(self) -> dict[str, Any]:
        """Options of the launch. Fused multiply-add is named: the compiler's default is off from Triton 3.10 on."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Entry(NamedTuple):
    """A launch, the widest head tile and the most groups that it serves, and the bytes of shared memory of its largest
    form."""

    head_tile: int
    groups: int
    launch: Launch
    shared_memory: int


# (kernel, element size, family of GPUs): the first entry that serves a call and fits the GPU is taken.
TABLE: dict[tuple[str, int, str], list[Entry]] = {
    ("forward", 2, "sm_80"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 0),
        Entry(128, 16, Launch(128, 32, 8, 3), 0),
        Entry(256, 16, Launch(64, 32, 8, 2), 0),
        Entry(512, 16, Launch(32, 16, 8, 2), 0),
    ],
    ("forward", 2, "sm_90"): [
        Entry(64, 2, Launch(128, 64, 8, 3), 0),
        Entry(64, 16, Launch(64, 32, 4, 3), 0),
        Entry(128, 2, Launch(128, 64, 8, 3), 0),
        Entry(128, 16, Launch(128, 32, 8, 3), 0),
        Entry(256, 2, Launch(128, 32, 8, 2), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 16, Launch(32, 16, 8, 2), 0),
    ],
    ("forward", 2, "sm_100"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 0),
        Entry(128, 2, Launch(128, 64, 8, 3), 0),
        Entry(128, 16, Launch(64, 64, 4, 2), 0),
        Entry(256, 16, Launch(64, 64, 8, 2), 0),
        Entry(512, 16, Launch(32, 16, 8, 2), 0),
    ],
    ("forward", 2, "cdna"): [],
    ("forward", 2, "rdna"): [],
    ("forward", 4, "sm_80"): [
        Entry(64, 16, Launch(64, 32, 8, 1), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
    ],
    ("forward", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 2, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(16, 32, 8, 1), 0),
    ],
    ("forward", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 2, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(16, 32, 8, 1), 0),
    ],
    ("forward", 4, "cdna"): [],
    ("forward", 4, "rdna"): [],
    ("backward_kv", 2, "sm_80"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 0),
        Entry(128, 2, Launch(64, 64, 8, 1), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
        Entry(256, 2, Launch(32, 32, 8, 1), 0),
        Entry(256, 16, Launch(16, 16, 8, 1), 0),
        Entry(512, 2, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_kv", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 128, 8, 2), 0),
        Entry(128, 2, Launch(16, 128, 8, 2), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
        Entry(256, 16, Launch(32, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_kv", 2, "sm_100"): [
        Entry(64, 2, Launch(32, 128, 8, 2), 0),
        Entry(64, 16, Launch(32, 64, 8, 1), 0),
        Entry(128, 2, Launch(32, 64, 8, 1), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
        Entry(256, 16, Launch(32, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_kv", 2, "cdna"): [],
    ("backward_kv", 2, "rdna"): [],
    ("backward_kv", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 32, 8, 1), 0),
        Entry(64, 16, Launch(16, 16, 8, 1), 0),
        Entry(128, 16, Launch(16, 32, 8, 1), 0),
    ],
    ("backward_kv", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
    ],
    ("backward_kv", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(32, 32, 8, 1), 0),
    ],
    ("backward_kv", 4, "cdna"): [],
    ("backward_kv", 4, "rdna"): [],
    ("backward_q", 2, "sm_80"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 0),
        Entry(128, 16, Launch(128, 32, 8, 2), 0),
        Entry(256, 16, Launch(64, 32, 8, 1), 0),
        Entry(512, 16, Launch(32, 16, 8, 1), 0),
    ],
    ("backward_q", 2, "sm_90"): [
        Entry(64, 2, Launch(128, 64, 8, 3), 0),
        Entry(64, 16, Launch(64, 64, 8, 2), 0),
        Entry(128, 2, Launch(128, 64, 8, 2), 0),
        Entry(128, 16, Launch(128, 32, 8, 3), 0),
        Entry(256, 16, Launch(64, 16, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_q", 2, "sm_100"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 0),
        Entry(128, 16, Launch(128, 64, 8, 2), 0),
        Entry(256, 16, Launch(64, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 16, 1), 0),
    ],
    ("backward_q", 2, "cdna"): [],
    ("backward_q", 2, "rdna"): [],
    ("backward_q", 4, "sm_80"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
    ],
    ("backward_q", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_q", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 0),
        Entry(128, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("backward_q", 4, "cdna"): [],
    ("backward_q", 4, "rdna"): [],
    ("rows", 2, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 0),
        Entry(64, 16, Launch(16, 32, 4, 2), 0),
        Entry(128, 16, Launch(32, 64, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("rows", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 4, 3), 0),
        Entry(128, 16, Launch(32, 64, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 2, Launch(16, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("rows", 2, "sm_100"): [
        Entry(64, 16, Launch(32, 128, 8, 3), 0),
        Entry(128, 16, Launch(32, 128, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("rows", 2, "cdna"): [],
    ("rows", 2, "rdna"): [],
    ("rows", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 0),
        Entry(64, 16, Launch(16, 32, 4, 2), 0),
        Entry(128, 2, Launch(16, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 32, 8, 2), 0),
        Entry(256, 16, Launch(16, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("rows", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 0),
        Entry(128, 2, Launch(16, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 16, 4, 1), 0),
        Entry(256, 16, Launch(16, 16, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("rows", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 64, 8, 2), 0),
        Entry(256, 16, Launch(16, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("rows", 4, "cdna"): [],
    ("rows", 4, "rdna"): [],
    ("decode", 2, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 0),
        Entry(64, 16, Launch(16, 32, 4, 2), 0),
        Entry(128, 16, Launch(32, 64, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("decode", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 4, 3), 0),
        Entry(128, 16, Launch(32, 64, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 2, Launch(16, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("decode", 2, "sm_100"): [
        Entry(64, 16, Launch(32, 128, 8, 3), 0),
        Entry(128, 16, Launch(32, 128, 8, 3), 0),
        Entry(256, 16, Launch(32, 32, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 2), 0),
    ],
    ("decode", 2, "cdna"): [],
    ("decode", 2, "rdna"): [],
    ("decode", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 0),
        Entry(64, 16, Launch(16, 32, 4, 2), 0),
        Entry(128, 2, Launch(16, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 32, 8, 2), 0),
        Entry(256, 16, Launch(16, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("decode", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 0),
        Entry(128, 2, Launch(16, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 16, 4, 1), 0),
        Entry(256, 16, Launch(16, 16, 8, 2), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("decode", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 0),
        Entry(128, 16, Launch(16, 64, 8, 2), 0),
        Entry(256, 16, Launch(16, 32, 8, 1), 0),
        Entry(512, 16, Launch(16, 16, 8, 1), 0),
    ],
    ("decode", 4, "cdna"): [],
    ("decode", 4, "rdna"): [],
}
