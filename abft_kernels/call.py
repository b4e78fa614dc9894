"""One checked call of an operator, beside q, k and v: made once, handed unchanged to every backend.

PyTorch's operators take plain arguments. :func:`pack` turns a call into the optional tensors one by one, one list of
integers and one list of floats; `SCHEMA` is that part of an operator's schema, and :func:`unpack` makes the call
again. All three are written from the fields below: a new field needs no other line here.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from abft_kernels.masking import Reach

__all__ = ["PACKED_ARGUMENTS", "SCHEMA", "TENSORS", "Call", "Gradients", "pack", "unpack"]


class Call(NamedTuple):
    """S is the number of sequences: B, unless they are packed. Positions are counted from key 0 of this call."""

    groups: Tensor | None = None  # (B, N_k) integers: group of each key, −1 for none
    weights: Tensor | None = None  # (B, N_k, G) in the accumulation dtype, in place of groups
    sinks: Tensor | None = None  # (H,): a score in each head's denominator
    slopes: Tensor | None = None  # (B, H) in the accumulation dtype: ALiBi
    starts: Tensor | None = None  # (S,) int32: first position of each sequence; None: 0
    ends: Tensor | None = None  # (S,) int32: one past its last position; None: N_k
    row_mask: Tensor | None = None  # (B, N_q) uint8: rows whose mass is wanted; None: all
    reach: Reach = Reach()
    num_groups: int = 0
    causal: bool = True
    row_offset: int = 0  # position of query row 0, where rows are consecutive
    key_offset: int = 0  # what to subtract from the positions of chosen rows: they count all keys, this call a shard
    packed: bool = False  # the sequences are concatenated along the sequence dimension (batch size 1)
    sparse_labels: bool = False  # few keys have a group: the fused kernels meet those last, in tiles of their own
    deterministic: bool = True  # the same input gives the same bits; False lets a backward pass add in any order
    whole: bool = False  # of chosen rows: q holds all queries, and they are read at their positions
    seed: int = 0  # of dropout
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0

    def loop_groups(self, groups: int) -> int:
        """Return how many of `groups` groups the main loops of the fused kernels count: 0 where labelled keys are met
        last."""
        return 0 if self.sparse_labels and self.groups is not None else groups


class Gradients(NamedTuple):
    """Of the operator that gives the output too; empty tensors stand for gradients that nothing asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dweights: Tensor  # (B, N_k, G) in the accumulation dtype
    dsinks: Tensor  # (H,) in the accumulation dtype


_HINTS = typing.get_type_hints(Call)
TENSORS = tuple(name for name in Call._fields if _HINTS[name] not in (Reach, int, bool, float))
_INTEGERS = tuple(name for name in Call._fields if _HINTS[name] in (int, bool))
_FLOATS = tuple(name for name in Call._fields if _HINTS[name] is float)
if Call._fields != (*TENSORS, "reach", *_INTEGERS, *_FLOATS):
    raise TypeError("the fields of Call must be ordered: tensors, reach, integers, floats")

SCHEMA = ", ".join([f"Tensor? {name}" for name in TENSORS] + ["SymInt[] integers", "float[] floats"])
PACKED_ARGUMENTS = len(TENSORS) + 2
_BOOLEANS = tuple(i for i, name in enumerate(_INTEGERS) if _HINTS[name] is bool)


def pack(call: Call) -> tuple[Any, ...]:
    """Return the operator arguments that `SCHEMA` describes."""
    integers: list[Any] = list(call[len(TENSORS) + 1 : -len(_FLOATS)])
    for i in _BOOLEANS:  # beside a symbolic integer PyTorch takes no bool
        integers[i] = int(integers[i])
    floats: Sequence[Any] = call[-len(_FLOATS) :]
    # float() makes a symbolic one, of a dynamic head_dim, a number: lists of floats have no symbolic form.
    return (*call[: len(TENSORS)], [*integers, *call.reach], [float(x) for x in floats])


def unpack(arguments: Sequence[Any]) -> Call:
    """Return the call whose :func:`pack` gave `arguments`, `PACKED_ARGUMENTS` of them."""
    *tensors, integers, floats = arguments
    integers, reach = list(integers[: len(_INTEGERS)]), Reach(*integers[len(_INTEGERS) :])
    for i in _BOOLEANS:
        integers[i] = bool(integers[i])
    return Call(*[*tensors, reach, *integers, *floats])
