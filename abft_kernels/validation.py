"""Checks of the public arguments: :func:`make_call` makes the one `Call` of a public call, or raises.

Each error names the value received and the remedy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.masking import Masking, check_masking, check_sequences, values_readable

__all__ = ["DTYPES", "MAX_GROUPS", "Output", "check_rows", "make_call"]

MAX_GROUPS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Output(NamedTuple):
    """The arguments of :func:`abft_kernels.mass_attention` that concern consecutive rows and their output."""

    row_mask: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    sparse_labels: bool = False
    deterministic: bool = True


def make_call(
    heads: dict[str, Tensor],
    labels: tuple[Tensor, int] | None,
    masking: Masking,
    output: Output | None,
) -> tuple[Call, int]:
    """Check what one public call was given; return its `Call` and its number of sequences.

    `heads` holds q, k and perhaps v under the names that errors use, `labels` key_groups and num_groups. `output` None
    means that the rows have positions of their own.
    """
    (name, q), (_, k), *_ = heads.items()
    packed = masking.cu_seqlens is not None
    _check_heads(heads, packed)
    output_of = output or Output()
    _check_dropout(output_of)
    fields = check_masking(masking, q)
    groups, weights = (None, None) if labels is None else _check_groups(*labels, k)
    if weights is not None and output_of.sparse_labels:
        raise ValueError(
            "sparse_labels=True needs integer key_groups, and these are weights; every key may have one: leave it False"
        )
    n_k = k.shape[2]
    sequences = check_sequences(masking, q, None if output is None else q.shape[2], n_k)
    if packed and output is not None and q.shape[0] != 1:
        raise ValueError(
            f"with cu_seqlens q must have batch 1, its sequences concatenated along the sequence dimension; got "
            f"{q.shape[0]}"
        )
    if packed and output is None and q.shape[0] != sequences.number:
        raise ValueError(f"{name} has {q.shape[0]} samples but cu_seqlens holds {sequences.number} sequences")
    key_offset = masking.key_offset or 0
    seed = output_of.dropout_seed
    if output_of.dropout_p and seed is None:
        seed = int(torch.randint(1 << 62, ()).item())
    call = Call(
        groups=groups,
        weights=weights,
        starts=sequences.starts,
        ends=sequences.ends,
        reach=sequences.reach,
        row_mask=_check_row_mask(output_of.row_mask, q),
        num_groups=0 if labels is None else labels[1],
        row_offset=n_k - q.shape[2] if masking.query_offset is None else masking.query_offset - key_offset,
        key_offset=key_offset,
        packed=packed,
        sparse_labels=bool(output_of.sparse_labels),
        deterministic=output_of.deterministic,
        seed=seed if output_of.dropout_p and seed is not None else 0,
        dropout_p=output_of.dropout_p,
        **fields,  # type: ignore[arg-type]
    )
    return call, sequences.number


def _check_heads(name_tensor: dict[str, Tensor], packed: bool) -> None:
    """Raise unless q, k (and v) agree in rank, batch, head_dim, dtype and device, and the heads form groups."""
    for name, x in name_tensor.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, length, head_dim), got {tuple(x.shape)}; "
                "transpose(1, 2) turns (batch, length, heads, head_dim) into it without a copy"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use float32, float16, bfloat16 or float64")
    (q_name, q), *others = name_tensor.items()
    for name, x in others:
        if x.dtype != q.dtype:
            raise TypeError(f"{q_name} is {q.dtype} but {name} is {x.dtype}; cast both to one dtype")
        if x.device != q.device:
            raise ValueError(f"{q_name} is on {q.device} but {name} is on {x.device}; move both to one device")
        if x.shape[0] != (1 if packed else q.shape[0]):
            raise ValueError(
                f"{q_name} {tuple(q.shape)} and {name} {tuple(x.shape)} differ in batch"
                if not packed
                else f"with cu_seqlens {name} must have batch 1, its sequences concatenated along the sequence "
                f"dimension; got {tuple(x.shape)}"
            )
        if name != "v" and x.shape[3] != q.shape[3]:
            raise ValueError(f"{q_name} {tuple(q.shape)} and {name} {tuple(x.shape)} differ in head_dim")
        if x.shape[1] == 0 or q.shape[1] % x.shape[1]:
            raise ValueError(
                f"{q_name} has {q.shape[1]} heads, not a multiple of the {x.shape[1]} heads of {name}; "
                "grouped-query attention needs heads_q = groups · heads_kv"
            )
    if "v" in name_tensor and name_tensor["v"].shape[1:3] != name_tensor["k"].shape[1:3]:
        raise ValueError(
            f"k {tuple(name_tensor['k'].shape)} and v {tuple(name_tensor['v'].shape)} differ in heads or length"
        )


def _check_groups(key_groups: Tensor, num_groups: int, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return group ids `(B, N_k)` and None, or None and weights `(B, N_k, G)` in the accumulation dtype."""
    if not isinstance(key_groups, Tensor):
        raise TypeError(f"key_groups must be a torch.Tensor, got {type(key_groups).__name__}")
    if key_groups.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, *DTYPES):
        raise TypeError(
            f"key_groups must hold signed integers (group ids) or floating-point weights, got {key_groups.dtype}"
        )
    weighted = key_groups.is_floating_point()
    if not isinstance(num_groups, int) or not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"num_groups must be an int from 1 to {MAX_GROUPS}, got {num_groups!r}")
    expected: tuple[int, ...] = (k.shape[0], k.shape[2], num_groups) if weighted else (k.shape[0], k.shape[2])
    if tuple(key_groups.shape) != expected:
        what = "weights must have shape (batch, keys, num_groups)" if weighted else "must have shape (batch, keys)"
        raise ValueError(f"key_groups {what} = {expected}, got {tuple(key_groups.shape)}")
    if key_groups.device != k.device:
        raise ValueError(f"key_groups is on {key_groups.device} but k is on {k.device}; move it there")
    if weighted:
        return None, key_groups.to(torch.promote_types(k.dtype, torch.float32)).contiguous()
    if values_readable(key_groups) and key_groups.numel():
        low, high = (x.item() for x in key_groups.aminmax())
        if low < -1 or high >= num_groups:
            raise ValueError(
                f"key_groups holds values from {low} to {high}; with num_groups={num_groups} a key is "
                f"-1 (no group) or 0 … {num_groups - 1}"
            )
    return key_groups.contiguous(), None


def _check_dropout(output: Output) -> None:
    p, seed = output.dropout_p, output.dropout_seed
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {p}")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"dropout_seed must be an int from 0 to 2**63 - 1, got {seed}")


def _check_row_mask(row_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return `(B, N_q)` as uint8."""
    if row_mask is None:
        return None
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be a bool tensor, got {getattr(row_mask, 'dtype', type(row_mask))}")
    if tuple(row_mask.shape) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"row_mask must have shape (batch, queries) = {(q.shape[0], q.shape[2])}, got {tuple(row_mask.shape)}"
        )
    return row_mask.to(torch.uint8).contiguous()


def check_rows(row_positions: Tensor, sequences: int, rows: int | None, first: int, last: int | None) -> Tensor:
    """Return `row_positions` `(S, R)`, contiguous.

    There are queries for the positions `first … last`; `last` None means that shards hold the rest.
    """
    if not isinstance(row_positions, Tensor) or row_positions.dtype not in (torch.int32, torch.int64):
        raise TypeError("row_positions must be an int32 or int64 tensor of key positions")
    if row_positions.dim() != 2 or row_positions.shape[0] != sequences:
        raise ValueError(
            f"row_positions must have shape (batch={sequences}, rows) (with cu_seqlens: as many as it has sequences), "
            f"got {tuple(row_positions.shape)}"
        )
    if rows is not None and row_positions.shape[1] != rows:
        raise ValueError(f"q_rows has {rows} rows but row_positions has {row_positions.shape[1]}")
    if values_readable(row_positions) and row_positions.numel():
        highest = row_positions.amax().item()
        if last is not None and highest > last:
            raise ValueError(
                f"row_positions reaches {highest} but there are {last + 1} keys; positions run "
                "from 0, and a negative one marks an absent row"
            )
        if first > 0 and ((row_positions >= 0) & (row_positions < first)).any():
            raise ValueError(
                f"row_positions asks for a row before position {first}, but q holds only the positions from "
                f"{first} on; pass the queries of the wanted rows to row_mass"
            )
    return row_positions.contiguous()
