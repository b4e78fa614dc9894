"""Checks of the public arguments: each error names the value received and the remedy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_GROUPS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _values_readable(tensor: Tensor) -> bool:
    # Reading values of a CUDA tensor would stall the stream on every layer; on a CPU it is free.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def check_heads(name_tensor: dict[str, Tensor]) -> None:
    """q, k (and v) agree in rank, batch, head_dim, dtype and device, and heads group."""
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
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3]:
            raise ValueError(f"{q_name} {tuple(q.shape)} and {name} {tuple(x.shape)} differ in batch or head_dim")
        if x.shape[1] == 0 or q.shape[1] % x.shape[1]:
            raise ValueError(
                f"{q_name} has {q.shape[1]} heads, not a multiple of the {x.shape[1]} heads of {name}; "
                "grouped-query attention needs heads_q = groups · heads_kv"
            )
    if "v" in name_tensor and name_tensor["v"].shape[1:3] != name_tensor["k"].shape[1:3]:
        raise ValueError(
            f"k {tuple(name_tensor['k'].shape)} and v {tuple(name_tensor['v'].shape)} differ in heads or length"
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; None means 1/sqrt(head_dim)")
    return float(scale)


def check_groups(key_groups: Tensor, num_groups: int, k: Tensor) -> Tensor:
    """`key_groups` as int8 `(B, N_k)`."""
    if not isinstance(key_groups, Tensor):
        raise TypeError(f"key_groups must be a torch.Tensor, got {type(key_groups).__name__}")
    if key_groups.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"key_groups must hold signed integers, got {key_groups.dtype}")
    expected = (k.shape[0], k.shape[2])
    if tuple(key_groups.shape) != expected:
        raise ValueError(f"key_groups must have shape (batch, keys) = {expected}, got {tuple(key_groups.shape)}")
    if key_groups.device != k.device:
        raise ValueError(f"key_groups is on {key_groups.device} but k is on {k.device}; move it there")
    if not isinstance(num_groups, int) or not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"num_groups must be an int from 1 to {MAX_GROUPS}, got {num_groups!r}")
    if _values_readable(key_groups) and key_groups.numel():
        low, high = key_groups.amin().item(), key_groups.amax().item()
        if low < -1 or high >= num_groups:
            raise ValueError(
                f"key_groups holds values from {low} to {high}; with num_groups={num_groups} a key is "
                f"-1 (no group) or 0 … {num_groups - 1}"
            )
    return key_groups.to(torch.int8)


def check_rows(row_positions: Tensor, batch: int, rows: int | None, n_k: int, first: int = 0) -> Tensor:
    """`row_positions` as int32 `(B, R)`; there are queries for the positions from `first` on."""
    if not isinstance(row_positions, Tensor) or row_positions.dtype not in (torch.int32, torch.int64):
        raise TypeError("row_positions must be an int32 or int64 tensor of key positions")
    if row_positions.dim() != 2 or row_positions.shape[0] != batch:
        raise ValueError(f"row_positions must have shape (batch={batch}, rows), got {tuple(row_positions.shape)}")
    if rows is not None and row_positions.shape[1] != rows:
        raise ValueError(f"q_rows has {rows} rows but row_positions has {row_positions.shape[1]}")
    if _values_readable(row_positions) and row_positions.numel() and row_positions.amax().item() >= n_k:
        raise ValueError(
            f"row_positions reaches {row_positions.amax().item()} but there are {n_k} keys; positions run "
            "from 0, and a negative one marks an absent row"
        )
    if _values_readable(row_positions) and ((row_positions >= 0) & (row_positions < first)).any():
        raise ValueError(
            f"row_positions asks for a row before position {first}, but q holds only the last {n_k - first} "
            "positions; pass the queries of the wanted rows to row_mass"
        )
    return row_positions.to(torch.int32)


def check_bounds(
    seq_lens: Tensor | None, seq_starts: Tensor | None, batch: int, n_q: int | None, n_k: int, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """First and one-past-last valid key of each sample, int32 `(B,)`; `starts` None means 0."""
    if seq_lens is None:
        if seq_starts is not None:
            raise ValueError("seq_starts needs seq_lens: pass the number of tokens of each sample too")
        return None, None
    for name, x in (("seq_lens", seq_lens), ("seq_starts", seq_starts)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x))}")
        if tuple(x.shape) != (batch,):
            raise ValueError(f"{name} must have shape (batch={batch},), got {tuple(x.shape)}")
    if not causal and n_q is not None and n_q != n_k:
        raise ValueError(
            f"seq_lens with causal=False needs as many queries as keys, got {n_q} and {n_k}: padded query "
            "rows are told by their position"
        )
    ends = seq_lens if seq_starts is None else seq_starts + seq_lens
    if _values_readable(ends) and batch:
        low = min(seq_lens.amin().item(), 0 if seq_starts is None else seq_starts.amin().item())
        if low < 0 or ends.amax().item() > n_k:
            raise ValueError(
                f"seq_lens {seq_lens.tolist()} (from seq_starts "
                f"{0 if seq_starts is None else seq_starts.tolist()}) must lie within the {n_k} keys"
            )
    starts = None if seq_starts is None else seq_starts.to(torch.int32).contiguous()
    return starts, ends.to(torch.int32).contiguous()
