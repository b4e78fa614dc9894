"""What one call of an operator asks for beside q, k and v: tensors that it may have, and plain numbers.

Both travel flat through the operators' schemas, in the order of their fields.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Extras", "Options"]


class Extras(NamedTuple):
    """Optional tensors; S is the number of sequences, B unless they are packed."""

    groups: Tensor | None = None  # (B, N_k) integers: group of each key, −1 for none
    weights: Tensor | None = None  # (B, N_k, G) float32 in place of groups
    sinks: Tensor | None = None  # (H,): a score in each head's denominator
    slopes: Tensor | None = None  # (B, H) float32: ALiBi
    starts: Tensor | None = None  # (S,) int32: first position of each sequence; None: 0
    ends: Tensor | None = None  # (S,) int32: one past its last position; None: N_k
    row_mask: Tensor | None = None  # (B, N_q) uint8: rows whose mass is wanted; None: all


class Options(NamedTuple):
    """Plain numbers."""

    num_groups: int = 0
    causal: bool = True
    scale: float = 1.0
    window: int = 0  # keys that a row sees, its own included; 0: all
    softcap: float = 0.0  # 0: none
    # Position of query row 0 counted from key 0; for the row operator, whose rows carry positions, that of key 0.
    offset: int = 0
    packed: bool = False  # the sequences stand one behind the other in a batch of 1
    dropout_p: float = 0.0
    seed: int = 0
