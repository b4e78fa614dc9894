"""Published speeds of other attention kernels: causal, bf16, head_dim 128, TFLOP/s of useful operations by length.

Our kernels are deterministic: a backward pass is compared with the deterministic column where the source has one, and
`column` says which one it is. The figures are of other machines and other numbers of heads than ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["PUBLISHED", "Published", "card_of", "published_for"]

_ALONE = "backward, not deterministic: no deterministic column is published"


class Published(NamedTuple):
    """One column of a published table."""

    card: str
    source: str
    way: str  # forward or backward
    column: str
    tflops: dict[int, float]


def _by_length(first: int, *values: float) -> dict[int, float]:
    """Return the values by length, which doubles from `first` on."""
    return {first << i: value for i, value in enumerate(values)}


_FA3, _TLX = "FlashAttention-3", "TLX (Meta's Triton fork)"
_CUDNN_H200 = "cuDNN 9.19 (cudnn-frontend, benchmark/sdpa_benchmark_training, h200_919_only_cudnn)"
_CUDNN_GB200 = "cuDNN 9.22 (cudnn-frontend, benchmark/sdpa_benchmark_training, llama3.1/gb200)"
_FA4 = "FlashAttention-4"
PUBLISHED = (
    Published("H100", _FA3, "forward", "forward", _by_length(1024, 364, 560, 667, 685)),
    Published("H100", _FA3, "backward", _ALONE, _by_length(1024, 182, 316, 444, 539)),
    Published("H100", _TLX, "forward", "forward", _by_length(1024, 367, 568, 637, 661)),
    Published("H100", _TLX, "backward", _ALONE, _by_length(1024, 219, 347, 468, 539)),
    Published("H200", _CUDNN_H200, "forward", "forward", _by_length(2048, 484, 591, 644, 673, 688)),
    Published("H200", _CUDNN_H200, "backward", _ALONE, _by_length(2048, 370, 474, 541, 579, 581)),
    Published("GB200", _CUDNN_GB200, "forward", "forward", _by_length(2048, 1097, 1408, 1574, 1708, 1622)),
    Published(
        "GB200", _CUDNN_GB200, "backward", "backward, deterministic", _by_length(2048, 797, 1017, 1157, 1157, 1068)
    ),
    Published("B200", _FA4, "forward", "forward", {8192: 1418}),
    Published("B200", _FA4, "backward", "backward, deterministic", {8192: 1097}),
)


def card_of(name: str) -> str | None:
    """Return the card that a device name stands for; None for one without figures, as PCIe and partitioned cards."""
    found = re.search(r"\b(H100|H200|GB200|B200)\b", name)
    return None if found is None or re.search(r"\b(PCIe|NVL|MIG)\b", name) else found[1]


def published_for(name: str) -> list[Published]:
    """Return the columns published for the card of this device name."""
    card = card_of(name)
    return [column for column in PUBLISHED if column.card == card]
