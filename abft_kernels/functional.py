"""Public operations: checks, choice of backend, and nothing else."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from abft_kernels import ops, reference, sdpa
from abft_kernels.launch import widest_head_tile
from abft_kernels.merging import merge_masses
from abft_kernels.spec import Extras, Options
from abft_kernels.validation import (
    check_bounds,
    check_dropout,
    check_groups,
    check_heads,
    check_packed,
    check_row_mask,
    check_rows,
    check_scale,
    check_sinks,
    check_slopes,
    check_softcap,
    check_window,
)

__all__ = ["Backend", "attention", "available_backends", "mass_attention", "merge_masses", "row_mass"]

Backend = Literal["auto", "triton", "torch", "reference"]
_BACKENDS = ("auto", "triton", "torch", "reference")


def _triton_interpreted() -> bool:
    from abft_kernels.triton.common import INTERPRETED

    return INTERPRETED


def _triton_reason(
    operator: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1
) -> str | None:
    """Why the Triton kernels cannot run here, or None if they can; `operator` is "fused" or "rows"."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    widest = widest_head_tile(operator, dtype.itemsize, groups, device)
    if head_dim > widest:
        return (
            f"head_dim {head_dim} is over {widest}, the most in {str(dtype).removeprefix('torch.')} with {groups} "
            "groups on this GPU"
        )
    if device.type != "cuda" and not _triton_interpreted():
        return f"the tensors are on {device.type}; set TRITON_INTERPRET=1 before Python starts to interpret"
    return None


def available_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """Backend → `"available"`, or the reason why it is not, for bf16 tensors of head_dim 128 on `device`."""
    reason = _triton_reason("fused", torch.device(device), torch.bfloat16, 128)
    return {"triton": reason or "available", "torch": "available", "reference": "available"}


def _choose(backend: Backend, q: Tensor, v: Tensor | None, operator: str, groups: int) -> Backend:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    widest = max(q.shape[-1], 0 if v is None else v.shape[-1])
    if backend == "auto":
        on_gpu = q.device.type == "cuda"
        reason = _triton_reason(operator, q.device, q.dtype, widest, groups) if on_gpu else "no GPU"
        return "torch" if reason else "triton"
    if backend == "triton" and (reason := _triton_reason(operator, q.device, q.dtype, widest, groups)):
        raise NotImplementedError(f"backend 'triton' cannot run this: {reason}; backend='torch' can")
    return backend


def _with_positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """The kernels (and PyTorch's) scale after they take the maximum of the scores."""
    if scale is None or not isinstance(q, Tensor) or scale > 0 or scale != scale:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


class _Call(NamedTuple):
    """One checked call."""

    extras: Extras
    options: Options
    seeded: bool  # the caller gave the seed of dropout
    sequences: int
    sharded: bool


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_groups: Tensor | None,
    num_groups: int,
    *,
    rows_name: str = "q",
    all_rows: bool = True,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seq_lens: Tensor | None,
    seq_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    key_offset: int | None,
    query_offset: int | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> _Call:
    """`all_rows`: q holds consecutive queries, and not rows with positions of their own."""
    packed = cu_seqlens is not None
    check_heads({rows_name: q, "k": k} | ({} if v is None else {"v": v}), packed)
    check_dropout(dropout_p, dropout_seed)
    scale = check_scale(scale, q.shape[-1])
    labels = check_groups(key_groups, num_groups, k) if key_groups is not None else None
    n_q, n_k = q.shape[2] if all_rows else None, k.shape[2]
    sharded = key_offset is not None or query_offset is not None
    sequences = q.shape[0]
    starts, ends = None, None
    if cu_seqlens is not None:
        taken = {"seq_lens": seq_lens is not None, "seq_starts": seq_starts is not None,
                 "key_offset": key_offset is not None, "query_offset": query_offset is not None}  # fmt: skip
        starts, ends = check_packed(cu_seqlens, n_k, n_q, taken)
        sequences = starts.shape[0]
        if all_rows and q.shape[0] != 1:
            raise ValueError(
                f"with cu_seqlens q must have batch 1, its sequences one behind the other; got {q.shape[0]}"
            )
        if not all_rows and q.shape[0] != sequences:
            raise ValueError(f"{rows_name} has {q.shape[0]} samples but cu_seqlens holds {sequences} sequences")
    else:
        starts, ends = check_bounds(seq_lens, seq_starts, q.shape[0], n_q, n_k, causal, key_offset or 0, sharded)
    extras = Extras(
        groups=labels.groups if labels else None,
        weights=labels.weights if labels else None,
        sinks=check_sinks(sinks, q),
        slopes=check_slopes(alibi_slopes, q),
        starts=starts,
        ends=ends,
        row_mask=check_row_mask(row_mask, q),
    )
    seed = 0
    if dropout_p:
        seed = int(torch.randint(1 << 62, ()).item()) if dropout_seed is None else dropout_seed
    offset = n_k - q.shape[2] if query_offset is None else query_offset - (key_offset or 0)
    options = Options(
        num_groups=num_groups if labels else 0, causal=causal, scale=scale, window=check_window(window, causal),
        softcap=check_softcap(softcap), offset=offset if all_rows else key_offset or 0, packed=packed,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return _Call(extras, options, dropout_seed is not None, sequences, sharded)


def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention mass of query rows on groups of keys: no values, no output; differentiable in `q_rows` and `k`.

    .. math:: \mathrm{mass}_{rg} = \sum_j \mathrm{softmax}_j(scale \cdot q_r k_j) \, w_{jg}

    A few rows take one pass over K forward and one backward: O(R·N·D) time and O(R + N·D) memory. All rows
    (`row_positions` None) take the fused kernel without its values: two products less backward than with them.

    Args:
        q_rows: queries `(B, H, R, D)`, any strides; float32, float16 or bfloat16 (float64 in PyTorch backends).
        k: keys `(B, H_kv, N, D)`, any strides; `H` a multiple of `H_kv` (grouped-query attention).
        key_groups: integers `(B, N)`: −1 for no group, else 0 … `num_groups` − 1. On a GPU the values are not
            read back to be checked; one outside the range counts as −1. Or weights w `(B, N, G)` of any floating
            dtype, differentiable too.
        num_groups: number of groups G, 1 … 16.
        row_positions: key position of each row `(B, R)`, int32 or int64. With `causal`, row r sees keys up to and
            including it. A negative position marks an absent row: mass 0, LSE −inf, no gradient. None: `q_rows`
            are consecutive, the last one aligned with the last key.
        causal: hide keys behind the row's position.
        scale: factor on the scores; `1/sqrt(D)` if None.
        window: a row sees its last `window` keys only, its own included; needs `causal`.
        softcap: scores become `softcap·tanh(score / softcap)`.
        sinks: a score per head `(H,)` that joins the denominator and carries no mass; differentiable.
        alibi_slopes: `(H,)` or `(B, H)`: scores lose slope·|row − key|. No gradient.
        seq_lens: tokens of each sample `(B,)`; other keys are hidden, and rows on them absent. None: all N.
        seq_starts: first token of each sample `(B,)`, for left padding; None: 0.
        cu_seqlens: bounds `(S + 1,)` of S sequences packed one behind the other in k, whose batch is 1; starts at
            0. Then `q_rows` and `row_positions` are batches of S, row s of sequence s, at positions in the packed
            order (or `q_rows` is packed as k is, with `row_positions` None).
        key_offset: position of the first key: k is a shard of the keys, to be merged by :func:`merge_masses`.
            Positions, `seq_lens` and `seq_starts` count all keys. 0 is the first shard, None the whole.
        query_offset: position of the first row where `row_positions` is None.
        return_lse: also return the natural-log LSE of each row's scores, differentiable too.
        backend: `"triton"`, `"torch"`, `"reference"`, or `"auto"`: Triton on a GPU, else PyTorch.

    Returns:
        mass `(B, H, R, G)`, float32 (float64 for float64 input); with `return_lse` also lse `(B, H, R)`.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    few = row_positions is not None
    q_rows, scale = _with_positive_scale(q_rows, scale)
    shared: dict[str, Any] = {
        "causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks,
        "alibi_slopes": alibi_slopes, "seq_lens": seq_lens, "seq_starts": seq_starts, "cu_seqlens": cu_seqlens,
        "key_offset": key_offset, "query_offset": query_offset,
    }  # fmt: skip
    call = _check(q_rows, k, None, key_groups, num_groups, rows_name="q_rows", all_rows=not few, **shared)
    if row_positions is not None:
        last = None if call.sharded else k.shape[2] - 1
        positions = check_rows(row_positions, call.sequences, q_rows.shape[2], 0, last)
    chosen = _choose(backend, q_rows, None, "rows" if few else "fused", num_groups)
    if chosen == "reference":
        mass, lse = reference.row_mass_reference(
            q_rows, k, key_groups, num_groups, row_positions=row_positions, return_lse=True, **shared
        )
    elif few:
        mass, lse = ops.row_mass_op(q_rows, k, positions, *call.extras, *call.options, chosen)
    else:
        mass, lse = ops.mass_attention_op(q_rows, k, None, *call.extras, *call.options, chosen)[1:]
    return (mass, lse) if return_lse else mass


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Plain attention under the masks of :func:`mass_attention`, with no N × N mask for any of them.

    Arguments as there. `"auto"` takes PyTorch's fastest kernel where it can compute this (causal or full, padded, and
    packed on a CPU), and otherwise Triton on a GPU and rows a few at a time elsewhere. Returns out `(B, H, N_q, D_v)`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mass_attention`.
    """
    q, scale = _with_positive_scale(q, scale)
    shared: dict[str, Any] = {
        "causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks,
        "alibi_slopes": alibi_slopes, "seq_lens": seq_lens, "seq_starts": seq_starts, "cu_seqlens": cu_seqlens,
        "key_offset": key_offset, "query_offset": query_offset, "dropout_p": dropout_p,
    }  # fmt: skip
    call = _check(q, k, v, None, 0, dropout_seed=dropout_seed, **shared)
    chosen = _choose(backend, q, v, "fused", 1)
    if chosen == "reference":
        no_group = torch.full((k.shape[0], k.shape[2]), -1, device=k.device)
        return reference.mass_attention_reference(q, k, v, no_group, 0, dropout_seed=call.options.seed, **shared)[0]
    # Packed sequences reach PyTorch's attention padded or one by one; the Triton kernel takes them as they are.
    through_pytorch = backend == "torch" or (backend == "auto" and not (chosen == "triton" and call.options.packed))
    if through_pytorch and sdpa.is_plain(q.shape[2], k.shape[2], call.extras, call.options, call.seeded):
        return sdpa.attention_output(q, k, v, call.extras, call.options)
    return ops.mass_attention_op(q, k, v, *call.extras, *call.options, chosen)[0]


def mass_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    row_positions: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Attention output, and the attention mass of every query row on groups of keys.

    .. math:: P = \mathrm{softmax}(scale \cdot Q K^T + mask), \quad out = P V, \quad
              \mathrm{mass}_{ig} = \sum_j P_{ij} \, w_{jg}

    w_jg is 1 if key j is in group g, else 0, or the key's weight. Differentiable in q, k and v (and in sinks and
    weights) through every result; a result that the loss does not use costs nothing in the backward pass. No
    backend but `"reference"` holds an N × N tensor. With fewer queries than keys the last query is aligned with the
    last key; a few queries on many keys, as in decoding, split the keys over the GPU.

    Args:
        q: queries `(B, H, N_q, D)`, any strides; float32, float16 or bfloat16 (float64 in PyTorch backends).
        k: keys `(B, H_kv, N_k, D)`; `H` a multiple of `H_kv`.
        v: values `(B, H_kv, N_k, D_v)`; D_v may differ from D.
        key_groups: integers `(B, N_k)` or weights `(B, N_k, G)`, as in :func:`row_mass`.
        num_groups: number of groups G, 1 … 16.
        causal: query i sees keys up to its own position.
        scale, window, softcap, sinks, alibi_slopes: as in :func:`row_mass`.
        seq_lens: tokens of each sample `(B,)`, for padded batches; None: all `N_k`. Keys outside are hidden, and
            query rows that stand outside give output 0, mass 0, LSE −inf and no gradient.
        seq_starts: first token of each sample `(B,)`, for left padding; None: 0.
        cu_seqlens: bounds `(S + 1,)` of S sequences packed in a batch of 1, queries and keys alike.
        key_offset, query_offset: positions of the first key and of the first query, if k and v are a shard of the
            keys (see :func:`merge_masses`); `query_offset` None aligns the last query with the last key.
        row_positions: positions `(B, R)`, or `(S, R)` with `cu_seqlens`, of the only rows whose mass is wanted
            (negative: absent). Then the main attention runs on PyTorch's fastest kernel with :func:`row_mass`
            beside it.
        row_mask: bool `(B, N_q)`: rows whose mass is wanted, in the fused kernel; the others have mass 0, and tiles
            without a wanted row do no work for it.
        dropout_p: dropout on the probabilities that make `out`, never on mass or LSE.
        dropout_seed: makes dropout reproducible: the same on every backend and for every tile size, and slower in
            PyTorch's backend. None draws from PyTorch's generator.
        return_lse: also return the natural-log LSE of the scores (sinks included).
        backend: `"triton"` (fused kernel), `"torch"`, `"reference"`, or `"auto"`: Triton on a GPU, else PyTorch;
            with `row_positions`, PyTorch's attention and on a GPU the Triton row kernel.

    Returns:
        out `(B, H, N_q, D_v)` in q's dtype and mass `(B, H, N_q, G)`, or `(B or S, H, R, G)` with `row_positions`,
        float32 (float64 for float64 input); with `return_lse` also lse, mass's shape without G.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    q, scale = _with_positive_scale(q, scale)
    shared: dict[str, Any] = {
        "causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks,
        "alibi_slopes": alibi_slopes, "seq_lens": seq_lens, "seq_starts": seq_starts, "cu_seqlens": cu_seqlens,
        "key_offset": key_offset,
    }  # fmt: skip
    of_output: dict[str, Any] = {"query_offset": query_offset, "dropout_p": dropout_p}
    call = _check(q, k, v, key_groups, num_groups, row_mask=row_mask, dropout_seed=dropout_seed, **of_output, **shared)
    first = call.options.offset + (key_offset or 0)
    if row_positions is not None:
        if row_mask is not None:
            raise ValueError("row_positions and row_mask both choose rows; pass one of them")
        last = None if call.sharded else k.shape[2] - 1
        check_rows(row_positions, call.sequences, None, max(0, first), last)
    chosen = _choose(backend, q, v, "fused" if row_positions is None else "rows", num_groups)
    if chosen == "reference":
        results = reference.mass_attention_reference(
            q, k, v, key_groups, num_groups, row_positions=row_positions, row_mask=row_mask,
            dropout_seed=call.options.seed, return_lse=True, **of_output, **shared,
        )  # fmt: skip
        return results if return_lse else results[:2]
    if row_positions is not None:
        out = attention(q, k, v, dropout_seed=dropout_seed, backend=backend, **of_output, **shared)
        rows = reference.gather_rows(q, row_positions, first)
        mass, lse = row_mass(
            rows, k, key_groups, num_groups, row_positions=row_positions, return_lse=True, backend=chosen, **shared
        )
    elif chosen == "torch" and sdpa.is_plain(q.shape[2], k.shape[2], call.extras, call.options, call.seeded):
        out = sdpa.attention_output(q, k, v, call.extras, call.options)
        mass, lse = ops.mass_attention_op(q, k, None, *call.extras, *call.options, chosen)[1:]
    else:
        out, mass, lse = ops.mass_attention_op(q, k, v, *call.extras, *call.options, chosen)
    return (out, mass, lse) if return_lse else (out, mass)
