"""The launch table. Written by `python -m bench.compile.derive`: change its candidates, not this file.

No register spills and within shared memory by the compiler's report; not tuned on a GPU.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    """Tiles of rows and keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


ARCHITECTURES = (80, 90, 100)

# (kernel, element size, architecture) -> (widest head tile, most groups, launch): the first that fits.
TABLE: dict[tuple[str, int, int], list[tuple[int, int, Launch]]] = {
    ("forward", 2, 80): [
        (64, 16, Launch(128, 64, 8, 3)),
        (128, 16, Launch(128, 32, 8, 3)),
        (256, 16, Launch(64, 32, 8, 2)),
        (512, 16, Launch(32, 16, 8, 2)),
    ],
    ("forward", 2, 90): [
        (64, 2, Launch(128, 64, 8, 3)),
        (64, 16, Launch(64, 32, 4, 3)),
        (128, 2, Launch(128, 64, 8, 3)),
        (128, 16, Launch(128, 32, 8, 3)),
        (256, 2, Launch(128, 32, 8, 2)),
        (256, 16, Launch(32, 32, 8, 2)),
        (512, 16, Launch(32, 16, 8, 2)),
    ],
    ("forward", 2, 100): [
        (64, 16, Launch(128, 64, 8, 3)),
        (128, 2, Launch(128, 64, 8, 3)),
        (128, 16, Launch(64, 64, 4, 2)),
        (256, 16, Launch(64, 64, 8, 2)),
        (512, 16, Launch(32, 16, 8, 2)),
    ],
    ("forward", 4, 80): [
        (64, 16, Launch(64, 32, 8, 1)),
        (128, 16, Launch(32, 32, 8, 1)),
    ],
    ("forward", 4, 90): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 2, Launch(32, 32, 8, 1)),
        (128, 16, Launch(16, 32, 8, 1)),
    ],
    ("forward", 4, 100): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 2, Launch(32, 32, 8, 1)),
        (128, 16, Launch(16, 32, 8, 1)),
    ],
    ("backward_kv", 2, 80): [
        (64, 16, Launch(32, 64, 8, 2)),
        (128, 2, Launch(64, 64, 8, 1)),
        (128, 16, Launch(32, 32, 8, 1)),
        (256, 2, Launch(32, 32, 8, 1)),
        (256, 16, Launch(16, 16, 8, 1)),
        (512, 2, Launch(16, 16, 8, 1)),
    ],
    ("backward_kv", 2, 90): [
        (64, 16, Launch(32, 128, 8, 2)),
        (128, 2, Launch(16, 128, 8, 2)),
        (128, 16, Launch(32, 32, 8, 1)),
        (256, 16, Launch(32, 32, 8, 1)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
    ("backward_kv", 2, 100): [
        (64, 2, Launch(32, 128, 8, 2)),
        (64, 16, Launch(32, 64, 8, 1)),
        (128, 2, Launch(32, 64, 8, 1)),
        (128, 16, Launch(32, 32, 8, 1)),
        (256, 16, Launch(32, 32, 8, 1)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
    ("backward_kv", 4, 80): [
        (64, 2, Launch(16, 32, 8, 1)),
        (64, 16, Launch(16, 16, 8, 1)),
        (128, 16, Launch(16, 32, 8, 1)),
    ],
    ("backward_kv", 4, 90): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 16, Launch(32, 32, 8, 1)),
    ],
    ("backward_kv", 4, 100): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 16, Launch(32, 32, 8, 1)),
    ],
    ("backward_q", 2, 80): [
        (64, 16, Launch(128, 64, 8, 3)),
        (128, 16, Launch(128, 32, 8, 2)),
        (256, 16, Launch(64, 32, 8, 1)),
        (512, 16, Launch(32, 16, 8, 1)),
    ],
    ("backward_q", 2, 90): [
        (64, 2, Launch(128, 64, 8, 3)),
        (64, 16, Launch(64, 64, 8, 2)),
        (128, 2, Launch(128, 64, 8, 2)),
        (128, 16, Launch(128, 32, 8, 3)),
        (256, 16, Launch(64, 16, 8, 2)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
    ("backward_q", 2, 100): [
        (64, 16, Launch(128, 64, 8, 3)),
        (128, 16, Launch(128, 64, 8, 2)),
        (256, 16, Launch(64, 32, 8, 2)),
        (512, 16, Launch(16, 16, 16, 1)),
    ],
    ("backward_q", 4, 80): [
        (64, 16, Launch(32, 32, 8, 1)),
    ],
    ("backward_q", 4, 90): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 16, Launch(16, 16, 8, 1)),
    ],
    ("backward_q", 4, 100): [
        (64, 16, Launch(32, 32, 8, 1)),
        (128, 16, Launch(16, 16, 8, 1)),
    ],
    ("rows", 2, 80): [
        (64, 2, Launch(16, 64, 4, 2)),
        (64, 16, Launch(16, 32, 4, 2)),
        (128, 16, Launch(32, 64, 8, 3)),
        (256, 16, Launch(32, 32, 8, 2)),
        (512, 16, Launch(16, 16, 8, 2)),
    ],
    ("rows", 2, 90): [
        (64, 16, Launch(32, 64, 4, 3)),
        (128, 16, Launch(32, 64, 8, 3)),
        (256, 16, Launch(32, 32, 8, 2)),
        (512, 2, Launch(16, 32, 8, 2)),
        (512, 16, Launch(16, 16, 8, 2)),
    ],
    ("rows", 2, 100): [
        (64, 16, Launch(32, 128, 8, 3)),
        (128, 16, Launch(32, 128, 8, 3)),
        (256, 16, Launch(32, 32, 8, 2)),
        (512, 16, Launch(16, 16, 8, 2)),
    ],
    ("rows", 4, 80): [
        (64, 2, Launch(16, 64, 4, 2)),
        (64, 16, Launch(16, 32, 4, 2)),
        (128, 2, Launch(16, 64, 8, 2)),
        (128, 16, Launch(16, 32, 8, 2)),
        (256, 16, Launch(16, 32, 8, 1)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
    ("rows", 4, 90): [
        (64, 16, Launch(32, 64, 8, 2)),
        (128, 2, Launch(16, 64, 8, 2)),
        (128, 16, Launch(16, 16, 4, 1)),
        (256, 16, Launch(16, 16, 8, 2)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
    ("rows", 4, 100): [
        (64, 16, Launch(32, 64, 8, 2)),
        (128, 16, Launch(16, 64, 8, 2)),
        (256, 16, Launch(16, 32, 8, 1)),
        (512, 16, Launch(16, 16, 8, 1)),
    ],
}
