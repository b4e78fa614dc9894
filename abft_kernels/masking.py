"""The masking arguments that the public functions share, and their checks.

A new limit on the keys that a row sees starts here: its argument in :class:`Masking`, its meaning in `LIMITS` and its
field in :class:`Reach`. Another kind of mask needs a check in :func:`check_masking` and a field in
:class:`abft_kernels.call.Call`. Errors name the value received and the remedy.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

__all__ = [
    "LIMITS",
    "MAX_POSITIONS",
    "Keywords",
    "Masking",
    "Reach",
    "SeenKeys",
    "Sequences",
    "check_masking",
    "check_sequences",
    "values_readable",
]


class Masking(NamedTuple):
    """The shared arguments as the caller gave them; :func:`abft_kernels.mass_attention` documents them."""

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seq_lens: Tensor | None = None
    seq_starts: Tensor | None = None
    seq_ends: Tensor | None = None
    cu_seqlens: Tensor | None = None
    key_offset: int | None = None
    query_offset: int | None = None

    @property
    def sharded(self) -> bool:
        return self.key_offset is not None or self.query_offset is not None

    @property
    def padded(self) -> bool:
        return self.seq_lens is not None or self.seq_ends is not None


class Keywords(TypedDict, total=False):
    """The same arguments for overloads, whose signatures would repeat them."""

    causal: bool
    scale: float | None
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    seq_lens: Tensor | None
    seq_starts: Tensor | None
    seq_ends: Tensor | None
    cu_seqlens: Tensor | None
    key_offset: int | None
    query_offset: int | None


class SeenKeys(NamedTuple):
    """The keywords that say which keys of all, no shard, each row sees."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    seq_lens: Tensor | None = None
    seq_starts: Tensor | None = None
    seq_ends: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Reach(NamedTuple):
    """The limits on how far back a row sees, named as their keywords; 0: no limit."""

    window: int = 0  # keys that a row sees, its own included
    chunk: int = 0  # keys of a chunk; a row sees those of its own


# What errors call each limit, and why it needs the causal mask.
LIMITS = {
    "window": ("keys that a row sees, its own included", "it ends at the row's own position"),
    "chunk": (
        "keys of a chunk, of which a row sees its own",
        "rows see their chunk up to their own position",
    ),
}
MAX_POSITIONS = 2**30  # the kernels add and subtract two positions in 32 bits


class Sequences(NamedTuple):
    """The sequences among the keys of a call, and how far back their rows see."""

    number: int
    reach: Reach
    starts: Tensor | None = None  # (number,) int32, from key 0 of this call; None: 0
    ends: Tensor | None = None  # (number,) int32: one past the last position; None: all keys


def values_readable(tensor: Tensor) -> bool:
    """Return True if values can be checked: reading those of a CUDA tensor would stall the stream in every layer."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def check_masking(masking: Masking, q: Tensor) -> dict[str, float | bool | Tensor | None]:
    """Return the fields of `Call` that say how a row scores keys, and whether it sees those after it."""
    causal, scale, softcap = masking.causal, masking.scale, masking.softcap
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; None means 1/sqrt(head_dim)")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a finite number > 0 or None, got {softcap!r}")
    return {
        "causal": causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
        "softcap": float(softcap or 0.0),
        "sinks": _check_sinks(masking.sinks, q),
        "slopes": _check_slopes(masking.alibi_slopes, q),
    }


def _check_reach(masking: Masking, n_k: int) -> Reach:
    """Return the limits; one that covers all keys is none."""
    limits = {name: getattr(masking, name) for name in Reach._fields}
    for name, limit in limits.items():
        if limit is None:
            continue
        meaning, reason = LIMITS[name]
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"{name} must be an int ≥ 1 ({meaning}) or None, got {limit!r}")
        if not masking.causal:
            raise ValueError(f"{name}={limit} needs causal=True: {reason}")
    all_keys = MAX_POSITIONS if masking.sharded else n_k
    return Reach(**{name: 0 if limit is None or limit >= all_keys else limit for name, limit in limits.items()})


def _check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or tuple(sinks.shape) != (q.shape[1],):
        got = tuple(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks must be a floating-point tensor of shape (heads,) = ({q.shape[1]},), got {got}")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device} but the queries are on {q.device}; move it there")
    return sinks.contiguous()


def _check_slopes(slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """Return `(B, H)` in the accumulation dtype."""
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


def check_sequences(masking: Masking, q: Tensor, n_q: int | None, n_k: int) -> Sequences:
    """Return the sequences among the keys; `n_q` None: the rows of q have positions of their own."""
    _check_positions(masking, n_q, n_k)
    reach = _check_reach(masking, n_k)
    if masking.cu_seqlens is not None:
        starts, ends = _check_packed(masking, masking.cu_seqlens, n_q, n_k)
        return Sequences(starts.shape[0], reach, starts, ends)
    if masking.padded:
        return Sequences(q.shape[0], reach, *_check_padded(masking, q.shape[0], n_q, n_k))
    if masking.seq_starts is not None:
        raise ValueError("seq_starts needs seq_lens or seq_ends: pass the number of tokens of each sample too")
    if reach.chunk and masking.key_offset:  # chunks are counted from position 0 of all keys
        first = torch.full((q.shape[0],), -masking.key_offset, dtype=torch.int32, device=q.device)
        return Sequences(q.shape[0], reach, first)
    return Sequences(q.shape[0], reach)


def _check_positions(masking: Masking, n_q: int | None, n_k: int) -> None:
    """Raise unless all positions are at least 0 and fit the kernels' integers."""
    for name, offset, length, of in (
        ("key_offset", masking.key_offset, n_k, "keys"),
        ("query_offset", masking.query_offset, n_q or 0, "queries"),
    ):
        if offset is not None and not (isinstance(offset, int) and offset >= 0):
            raise ValueError(f"{name} must be an int ≥ 0 (position of the first of the {of}) or None, got {offset!r}")
        if (offset or 0) + length > MAX_POSITIONS:
            raise ValueError(
                f"{name}={offset or 0} with {length} {of} goes beyond position {MAX_POSITIONS}, the last that the "
                "kernels count to; cut the sequence"
            )


def _check_packed(masking: Masking, cu_seqlens: Tensor, n_q: int | None, n_k: int) -> tuple[Tensor, Tensor]:
    """Return first and one-past-last token of each sequence."""
    for name in ("seq_lens", "seq_starts", "seq_ends", "key_offset", "query_offset"):
        if getattr(masking, name) is not None:
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
    if values_readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > n_k:
            raise ValueError(f"cu_seqlens must start at 0, never fall and end within the {n_k} tokens, got {bounds}")
    edges = cu_seqlens.to(torch.int32)
    return edges[:-1].contiguous(), edges[1:].contiguous()


def _check_padded(masking: Masking, batch: int, n_q: int | None, n_k: int) -> tuple[Tensor | None, Tensor]:
    """Return first and one-past-last token of each sample, from key 0 of this call; None: all begin there."""
    starts, lengths, ends = masking.seq_starts, masking.seq_lens, masking.seq_ends
    if lengths is not None and ends is not None:
        raise ValueError("seq_lens and seq_ends both say where the samples end; pass one of them")
    for name, x in (("seq_lens", lengths), ("seq_starts", starts), ("seq_ends", ends)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x))}")
        if tuple(x.shape) != (batch,):
            raise ValueError(f"{name} must have shape (batch={batch},), got {tuple(x.shape)}")
    if not masking.causal and not masking.sharded and n_q is not None and n_q != n_k:
        raise ValueError(
            f"seq_lens with causal=False needs as many queries as keys, got {n_q} and {n_k}: padded query "
            "rows are told by their position"
        )
    if lengths is not None:
        ends = lengths if starts is None else starts + lengths
    assert ends is not None
    if values_readable(ends) and batch:
        first, end = [0] * batch if starts is None else starts.tolist(), ends.tolist()
        fits = min(first) >= 0 and all(low <= high for low, high in zip(first, end, strict=True))
        if not fits or (not masking.sharded and max(end) > n_k):
            name, given = ("seq_ends", end) if lengths is None else ("seq_lens", lengths.tolist())
            raise ValueError(
                f"{name} {given} (from seq_starts {0 if starts is None else first}) must lie within the {n_k} keys"
            )
    if masking.key_offset:
        starts = -masking.key_offset + (torch.zeros_like(ends) if starts is None else starts)
        ends = ends - masking.key_offset
    starts = None if starts is None else starts.to(torch.int32).contiguous()
    return starts, ends.to(torch.int32).contiguous()
