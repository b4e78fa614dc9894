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
        Entry(64, 16, Launch(128, 64, 8, 3), 49152),
        Entry(128, 16, Launch(128, 32, 8, 3), 65536),
        Entry(256, 16, Launch(64, 32, 8, 2), 69632),
        Entry(512, 16, Launch(32, 16, 8, 2), 66560),
    ],
    ("forward", 2, "sm_90"): [
        Entry(64, 0, Launch(128, 128, 8, 3), 114688),
        Entry(64, 2, Launch(128, 64, 8, 3), 65536),
        Entry(64, 16, Launch(64, 32, 4, 3), 32768),
        Entry(128, 2, Launch(128, 64, 8, 3), 131072),
        Entry(128, 16, Launch(128, 32, 8, 3), 81920),
        Entry(256, 2, Launch(128, 32, 8, 2), 131072),
        Entry(256, 16, Launch(32, 32, 8, 2), 51200),
        Entry(512, 16, Launch(32, 16, 8, 2), 66560),
    ],
    ("forward", 2, "sm_100"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 66080),
        Entry(128, 2, Launch(128, 64, 8, 3), 131616),
        Entry(128, 16, Launch(64, 64, 4, 2), 81952),
        Entry(256, 16, Launch(64, 64, 8, 2), 164384),
        Entry(512, 16, Launch(32, 16, 8, 2), 66560),
    ],
    ("forward", 2, "cdna"): [
        Entry(64, 16, Launch(128, 64, 4, 2), 33728),
        Entry(128, 16, Launch(128, 64, 4, 1), 32768),
        Entry(256, 16, Launch(64, 32, 4, 1), 32768),
        Entry(512, 16, Launch(32, 16, 8, 1), 32768),
    ],
    ("forward", 2, "rdna"): [
        Entry(64, 16, Launch(64, 32, 4, 1), 8192),
        Entry(128, 2, Launch(64, 16, 8, 1), 16384),
        Entry(128, 16, Launch(16, 16, 4, 1), 4096),
    ],
    ("forward", 4, "sm_80"): [
        Entry(64, 16, Launch(64, 32, 8, 1), 32768),
        Entry(128, 16, Launch(32, 32, 8, 1), 36864),
    ],
    ("forward", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 20480),
        Entry(128, 2, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(16, 32, 8, 1), 26624),
    ],
    ("forward", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 20480),
        Entry(128, 2, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(16, 32, 8, 1), 26624),
    ],
    ("forward", 4, "cdna"): [],
    ("forward", 4, "rdna"): [],
    ("backward_kv", 2, "sm_80"): [
        Entry(64, 0, Launch(32, 128, 8, 2), 45056),
        Entry(64, 16, Launch(32, 64, 8, 2), 28672),
        Entry(128, 0, Launch(64, 64, 8, 2), 81920),
        Entry(128, 2, Launch(64, 64, 8, 1), 81920),
        Entry(128, 16, Launch(32, 32, 8, 1), 40960),
        Entry(256, 2, Launch(32, 32, 8, 1), 81920),
        Entry(256, 16, Launch(16, 16, 8, 1), 40960),
        Entry(512, 2, Launch(16, 16, 8, 1), 81920),
    ],
    ("backward_kv", 2, "sm_90"): [
        Entry(64, 0, Launch(64, 128, 8, 2), 65792),
        Entry(64, 16, Launch(32, 128, 8, 2), 51328),
        Entry(128, 0, Launch(32, 128, 8, 2), 98432),
        Entry(128, 2, Launch(16, 128, 8, 2), 82112),
        Entry(128, 16, Launch(32, 32, 8, 1), 40960),
        Entry(256, 16, Launch(32, 32, 8, 1), 81920),
        Entry(512, 16, Launch(16, 16, 8, 1), 81920),
    ],
    ("backward_kv", 2, "sm_100"): [
        Entry(64, 0, Launch(64, 64, 8, 2), 66112),
        Entry(64, 2, Launch(32, 128, 8, 2), 59968),
        Entry(64, 16, Launch(32, 64, 8, 1), 24584),
        Entry(128, 0, Launch(32, 64, 8, 2), 82240),
        Entry(128, 2, Launch(32, 64, 8, 1), 49160),
        Entry(128, 16, Launch(32, 32, 8, 1), 40960),
        Entry(256, 16, Launch(32, 32, 8, 1), 81920),
        Entry(512, 16, Launch(16, 16, 8, 1), 81920),
    ],
    ("backward_kv", 2, "cdna"): [
        Entry(64, 16, Launch(64, 64, 4, 1), 8192),
        Entry(128, 16, Launch(32, 64, 4, 1), 16384),
        Entry(256, 2, Launch(32, 32, 4, 1), 16384),
        Entry(256, 16, Launch(16, 32, 8, 1), 16384),
        Entry(512, 16, Launch(16, 16, 4, 1), 16384),
    ],
    ("backward_kv", 2, "rdna"): [
        Entry(64, 16, Launch(16, 32, 8, 1), 4096),
        Entry(128, 16, Launch(16, 16, 8, 1), 4096),
    ],
    ("backward_kv", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 32, 8, 1), 26624),
        Entry(64, 16, Launch(16, 16, 8, 1), 17408),
        Entry(128, 16, Launch(16, 32, 8, 1), 51200),
    ],
    ("backward_kv", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(32, 32, 8, 1), 69632),
    ],
    ("backward_kv", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(32, 32, 8, 1), 69632),
    ],
    ("backward_kv", 4, "cdna"): [],
    ("backward_kv", 4, "rdna"): [],
    ("backward_q", 2, "sm_80"): [
        Entry(64, 16, Launch(128, 64, 8, 3), 81920),
        Entry(128, 0, Launch(64, 64, 8, 2), 73728),
        Entry(128, 16, Launch(128, 32, 8, 2), 90112),
        Entry(256, 16, Launch(64, 32, 8, 1), 98304),
        Entry(512, 16, Launch(32, 16, 8, 1), 98304),
    ],
    ("backward_q", 2, "sm_90"): [
        Entry(64, 0, Launch(128, 128, 8, 2), 98304),
        Entry(64, 2, Launch(128, 64, 8, 3), 81920),
        Entry(64, 16, Launch(64, 64, 8, 2), 57344),
        Entry(128, 0, Launch(128, 64, 8, 3), 163840),
        Entry(128, 2, Launch(128, 64, 8, 2), 131072),
        Entry(128, 16, Launch(128, 32, 8, 3), 114688),
        Entry(256, 16, Launch(64, 16, 8, 2), 102400),
        Entry(512, 16, Launch(16, 16, 8, 1), 65536),
    ],
    ("backward_q", 2, "sm_100"): [
        Entry(64, 0, Launch(128, 128, 8, 2), 114736),
        Entry(64, 16, Launch(128, 64, 8, 3), 90160),
        Entry(128, 16, Launch(128, 64, 8, 2), 147504),
        Entry(256, 16, Launch(64, 32, 8, 2), 147504),
        Entry(512, 16, Launch(16, 16, 16, 1), 65536),
    ],
    ("backward_q", 2, "cdna"): [
        Entry(64, 16, Launch(128, 32, 4, 1), 16384),
        Entry(128, 16, Launch(64, 64, 4, 1), 16384),
        Entry(256, 16, Launch(32, 16, 8, 1), 16384),
        Entry(512, 16, Launch(16, 16, 4, 1), 16384),
    ],
    ("backward_q", 2, "rdna"): [
        Entry(64, 2, Launch(64, 32, 8, 1), 8192),
        Entry(64, 16, Launch(32, 32, 8, 1), 4096),
        Entry(128, 16, Launch(32, 16, 8, 1), 8192),
    ],
    ("backward_q", 4, "sm_80"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 32768),
    ],
    ("backward_q", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 32768),
        Entry(128, 16, Launch(16, 16, 8, 1), 32768),
    ],
    ("backward_q", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 32768),
        Entry(128, 16, Launch(16, 16, 8, 1), 32768),
    ],
    ("backward_q", 4, "cdna"): [],
    ("backward_q", 4, "rdna"): [],
    ("backward_atomic", 2, "sm_80"): [
        Entry(128, 2, Launch(32, 32, 8, 1), 40960),
    ],
    ("backward_atomic", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 128, 8, 2), 73856),
        Entry(128, 2, Launch(16, 128, 8, 2), 122944),
        Entry(128, 16, Launch(32, 32, 8, 1), 40960),
    ],
    ("backward_atomic", 2, "sm_100"): [
        Entry(64, 2, Launch(32, 128, 8, 2), 65792),
        Entry(128, 2, Launch(32, 64, 8, 1), 65544),
        Entry(128, 16, Launch(32, 32, 8, 1), 40960),
    ],
    ("backward_atomic", 2, "cdna"): [],
    ("backward_atomic", 2, "rdna"): [],
    ("backward_atomic", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 32, 8, 1), 26624),
    ],
    ("backward_atomic", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(32, 32, 8, 1), 69632),
    ],
    ("backward_atomic", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 32, 8, 1), 36864),
        Entry(128, 16, Launch(32, 32, 8, 1), 69632),
    ],
    ("backward_atomic", 4, "cdna"): [],
    ("backward_atomic", 4, "rdna"): [],
    ("rows", 2, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 22976),
        Entry(64, 16, Launch(16, 32, 4, 2), 14528),
        Entry(128, 16, Launch(32, 64, 8, 3), 53760),
        Entry(256, 16, Launch(32, 32, 8, 2), 57728),
        Entry(512, 16, Launch(16, 16, 8, 2), 52416),
    ],
    ("rows", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 4, 3), 33280),
        Entry(128, 16, Launch(32, 64, 8, 3), 53760),
        Entry(256, 16, Launch(32, 32, 8, 2), 57728),
        Entry(512, 2, Launch(16, 32, 8, 2), 84416),
        Entry(512, 16, Launch(16, 16, 8, 2), 52416),
    ],
    ("rows", 2, "sm_100"): [
        Entry(64, 16, Launch(32, 128, 8, 3), 50688),
        Entry(128, 16, Launch(32, 128, 8, 3), 86544),
        Entry(256, 16, Launch(32, 32, 8, 2), 57728),
        Entry(512, 16, Launch(16, 16, 8, 2), 52416),
    ],
    ("rows", 2, "cdna"): [
        Entry(64, 16, Launch(32, 64, 4, 2), 16384),
        Entry(128, 16, Launch(32, 64, 4, 1), 16384),
        Entry(256, 16, Launch(16, 64, 4, 1), 32768),
        Entry(512, 2, Launch(16, 32, 8, 1), 32768),
        Entry(512, 16, Launch(16, 16, 4, 1), 16384),
    ],
    ("rows", 2, "rdna"): [
        Entry(64, 2, Launch(16, 32, 4, 1), 4096),
        Entry(64, 16, Launch(16, 16, 4, 1), 2048),
        Entry(128, 16, Launch(16, 16, 4, 1), 4096),
    ],
    ("rows", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 25024),
        Entry(64, 16, Launch(16, 32, 4, 2), 16576),
        Entry(128, 2, Launch(16, 64, 8, 2), 45504),
        Entry(128, 16, Launch(16, 32, 8, 2), 28864),
        Entry(256, 16, Launch(16, 32, 8, 1), 51200),
        Entry(512, 16, Launch(16, 16, 8, 1), 66560),
    ],
    ("rows", 4, "sm_90"): [
        Entry(64, 16, Launch(16, 64, 4, 2), 29120),
        Entry(128, 2, Launch(16, 32, 8, 2), 41408),
        Entry(128, 16, Launch(16, 16, 4, 1), 17408),
        Entry(256, 16, Launch(16, 16, 8, 2), 36032),
        Entry(512, 16, Launch(16, 16, 8, 1), 66560),
    ],
    ("rows", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 37248),
        Entry(128, 16, Launch(16, 64, 8, 2), 47296),
        Entry(256, 16, Launch(16, 32, 8, 1), 51200),
        Entry(512, 16, Launch(16, 16, 8, 1), 66560),
    ],
    ("rows", 4, "cdna"): [],
    ("rows", 4, "rdna"): [],
    ("decode", 2, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 20480),
        Entry(64, 16, Launch(16, 32, 4, 2), 11264),
        Entry(128, 16, Launch(32, 64, 8, 3), 77824),
        Entry(256, 16, Launch(32, 32, 8, 2), 51200),
        Entry(512, 16, Launch(16, 16, 8, 2), 49664),
    ],
    ("decode", 2, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 4, 3), 40960),
        Entry(128, 16, Launch(32, 64, 8, 3), 77824),
        Entry(256, 16, Launch(32, 32, 8, 2), 51200),
        Entry(512, 2, Launch(16, 32, 8, 2), 82944),
        Entry(512, 16, Launch(16, 16, 8, 2), 49664),
    ],
    ("decode", 2, "sm_100"): [
        Entry(64, 16, Launch(32, 128, 4, 3), 77824),
        Entry(128, 16, Launch(32, 64, 8, 3), 77824),
        Entry(256, 16, Launch(32, 32, 8, 2), 51200),
        Entry(512, 16, Launch(16, 16, 8, 2), 49664),
    ],
    ("decode", 2, "cdna"): [
        Entry(64, 16, Launch(32, 64, 4, 2), 33728),
        Entry(128, 16, Launch(32, 64, 4, 1), 16384),
        Entry(256, 16, Launch(16, 64, 4, 1), 32768),
        Entry(512, 16, Launch(16, 32, 8, 1), 32768),
    ],
    ("decode", 2, "rdna"): [
        Entry(64, 2, Launch(16, 64, 4, 1), 8192),
        Entry(64, 16, Launch(16, 32, 4, 1), 4096),
    ],
    ("decode", 4, "sm_80"): [
        Entry(64, 2, Launch(16, 64, 4, 2), 40960),
        Entry(64, 16, Launch(16, 32, 4, 2), 22592),
        Entry(128, 2, Launch(16, 64, 8, 2), 77888),
        Entry(128, 16, Launch(16, 32, 8, 2), 43072),
        Entry(256, 16, Launch(16, 32, 8, 1), 51264),
        Entry(512, 16, Launch(16, 16, 8, 1), 66624),
    ],
    ("decode", 4, "sm_90"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 49152),
        Entry(128, 2, Launch(16, 64, 8, 2), 77888),
        Entry(128, 16, Launch(16, 16, 4, 1), 17472),
        Entry(256, 16, Launch(16, 16, 8, 2), 50240),
        Entry(512, 16, Launch(16, 16, 8, 1), 66624),
    ],
    ("decode", 4, "sm_100"): [
        Entry(64, 16, Launch(32, 64, 8, 2), 49152),
        Entry(128, 16, Launch(16, 64, 8, 2), 77888),
        Entry(256, 16, Launch(16, 32, 8, 1), 51264),
        Entry(512, 16, Launch(16, 16, 8, 1), 66624),
    ],
    ("decode", 4, "cdna"): [],
    ("decode", 4, "rdna"): [],
}
