"""The shards of the kernel tests, and the suites whose figures stand on each.

A shard runs in a process of its own with its own time limit. The first ones test what is timed; features that no suite
times come last. A shard that covers no suite limits no figure by its absence, but its failure refuses the file.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KERNEL_TESTS", "SHARDS", "TINY_SHARDS", "Shard"]

KERNEL_TESTS = "tests/abft_kernels"
_PACKED = "packed:"  # the id of the feature's cases begins so


class Shard(NamedTuple):
    """One part of a file of tests, and the suites that its result covers."""

    file: str
    part: int = 1
    parts: int = 1
    covers: tuple[str, ...] = ()
    keyword: str = ""  # pytest's -k
    seconds: float = 140.0

    @property
    def name(self) -> str:
        """Return the file's stem, keyword and part."""
        keyword = f"[{self.keyword}]" if self.keyword else ""
        return f"{self.file.removesuffix('.py')}{keyword} {self.part}/{self.parts}"


def _split(file: str, parts: int, covers: tuple[str, ...] = (), keyword: str = "") -> tuple[Shard, ...]:
    return tuple(Shard(file, part + 1, parts, covers, keyword) for part in range(parts))


SHARDS = (
    *_split("test_mass_attention.py", 8, ("kernels", "memory", "flex", "training")),
    *_split("test_row_mass.py", 6, ("rows", "training", "precision")),
    *_split("test_features.py", 1, ("training",), _PACKED),
    *_split("test_saturation.py", 1, ("precision",)),
    *_split("test_robustness.py", 2),
    *_split("test_identities.py", 2),
    *_split("test_ops.py", 3),
    *_split("test_features.py", 12, (), f"not {_PACKED}"),
    *_split("test_properties.py", 4),
    *_split("test_torch_backend.py", 1),
    *_split("test_validation.py", 1),
    *_split("test_forms.py", 4),
    *_split("test_sparse_labels.py", 2),
    *_split("test_devices.py", 1),
    *_split("test_launches.py", 1),
)
# For a dry run, which interprets the kernels.
TINY_SHARDS = _split("test_validation.py", 2, ("kernels", "memory", "flex", "training", "rows", "precision"))
