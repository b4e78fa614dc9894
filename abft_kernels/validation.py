"""Checks of the public arguments: each error names the value received and the remedy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_GROUPS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _values_readable(tensor: Tensor) -> bool:
    # Reading values of a CUDA tensor would stall the stream on every layer; on a CPU it is free.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def check_heads(name_tensor: dict[str, Tensor], packed: bool = False) -> None:
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
        if x.shape[0] != (1 if packed else q.shape[0]):
            raise ValueError(
                f"{q_name} {tuple(q.shape)} and {name} {tuple(x.shape)} differ in batch"
                if not packed
                else f"with cu_seqlens {name} must have batch 1, its sequences one behind the other; got "
                f"{tuple(x.shape)}"
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


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; None means 1/sqrt(head_dim)")
    return float(scale)


class Labels(NamedTuple):
    groups: Tensor | None  # (B, N_k) integers
    weights: Tensor | None  # (B, N_k, G), the accumulation dtype, with the caller's gradient


def check_groups(key_groups: Tensor, num_groups: int, k: Tensor) -> Labels:
    """Group ids `(B, N_k)`, or weights `(B, N_k, G)`."""
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
        return Labels(None, key_groups.to(torch.promote_types(k.dtype, torch.float32)).contiguous())
    if _values_readable(key_groups) and key_groups.numel():
        low, high = key_groups.amin().item(), key_groups.amax().item()
        if low < -1 or high >= num_groups:
            raise ValueError(
                f"key_groups holds values from {low} to {high}; with num_groups={num_groups} a key is "
                f"-1 (no group) or 0 … {num_groups - 1}"
            )
    return Labels(key_groups.contiguous(), None)


def check_window(window: int | None, causal: bool) -> int:
    if window is None:
        return 0
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an int ≥ 1 (keys that a row sees, its own included) or None, got {window!r}")
    if not causal:
        raise ValueError(f"window={window} needs causal=True: it ends at the row's own position")
    return window


def check_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a finite number > 0 or None, got {softcap!r}")
    return float(softcap)


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """One score for each query head."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or tuple(sinks.shape) != (q.shape[1],):
        got = tuple(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks must be a floating-point tensor of shape (heads,) = ({q.shape[1]},), got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device} but the queries are on {q.device}; move it there")
    return sinks.contiguous()


def check_slopes(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """`(B, H)` in the accumulation dtype."""
    if slopes is None:
        return None
    expected = ((q.shape[1],), (q.shape[0], q.shape[1]))
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point() or tuple(slopes.shape) not in expected:
        got = tuple(slopes.shape) if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(
            f"alibi_slopes must be a floating-point tensor of shape {expected[0]} or {expected[1]}, got {got}"
        )
    if slopes.requires_grad:
        raise ValueError("alibi_slopes has no gradient here; pass alibi_slopes.detach()")
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes is on {slopes.device} but the queries are on {q.device}; move it there")
    dtype = torch.promote_types(q.dtype, torch.float32)
    return slopes.to(dtype).expand(q.shape[0], q.shape[1]).contiguous()


def check_dropout(dropout_p: float, dropout_seed: int | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if dropout_seed is not None and not 0 <= dropout_seed < 1 << 63:
        raise ValueError(f"dropout_seed must be an int from 0 to 2**63 - 1, got {dropout_seed}")


def check_row_mask(row_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """`(B, N_q)` as uint8."""
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
    """`row_positions` `(S, R)`, contiguous.

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
    if _values_readable(row_positions) and row_positions.numel():
        highest = row_positions.amax().item()
        if last is not None and highest > last:
            raise ValueError(
                f"row_positions reaches {highest} but there are {last + 1} keys; positions run "
                "from 0, and a negative one marks an absent row"
            )
        if ((row_positions >= 0) & (row_positions < first)).any():
            raise ValueError(
                f"row_positions asks for a row before position {first}, but q holds only the positions from "
                f"{first} on; pass the queries of the wanted rows to row_mass"
            )
    return row_positions.contiguous()


def check_packed(cu_seqlens: Tensor, n_k: int, n_q: int | None, taken: dict[str, bool]) -> tuple[Tensor, Tensor]:
    """First and one-past-last token of each packed sequence, int32 `(S,)`."""
    for name, given in taken.items():
        if given:
            raise ValueError(
                f"cu_seqlens and {name} exclude each other: packed sequences have no padding and no shards"
            )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be an int32 or int64 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens))}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if n_q is not None and n_q != n_k:
        raise ValueError(f"cu_seqlens packs queries and keys alike, got {n_q} queries and {n_k} keys")
    if _values_readable(cu_seqlens):
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or (steps < 0).any() or cu_seqlens[-1] > n_k:
            raise ValueError(
                f"cu_seqlens must start at 0, never fall and end within the {n_k} tokens, got {cu_seqlens.tolist()}"
            )
    bounds = cu_seqlens.to(torch.int32)
    return bounds[:-1].contiguous(), bounds[1:].contiguous()


def check_bounds(
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    batch: int,
    n_q: int | None,
    n_k: int,
    causal: bool,
    key_offset: int = 0,
    sharded: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """First and one-past-last position of each sample, counted from key 0, int32 `(B,)`; `starts` None means 0."""
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
    if not causal and not sharded and n_q is not None and n_q != n_k:
        raise ValueError(
            f"seq_lens with causal=False needs as many queries as keys, got {n_q} and {n_k}: padded query "
            "rows are told by their position"
        )
    ends = seq_lens if seq_starts is None else seq_starts + seq_lens
    if _values_readable(ends) and batch:
        low = min(seq_lens.amin().item(), 0 if seq_starts is None else seq_starts.amin().item())
        if low < 0 or (not sharded and ends.amax().item() > n_k):
            raise ValueError(
                f"seq_lens {seq_lens.tolist()} (from seq_starts "
                f"{0 if seq_starts is None else seq_starts.tolist()}) must lie within the {n_k} keys"
            )
    if key_offset:
        seq_starts = torch.zeros_like(ends) if seq_starts is None else seq_starts
        seq_starts, ends = seq_starts - key_offset, ends - key_offset
    starts = None if seq_starts is None else seq_starts.to(torch.int32).contiguous()
    return starts, ends.to(torch.int32).contiguous()
