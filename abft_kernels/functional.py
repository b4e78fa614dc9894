"""Public operations: checks, choice of backend, and nothing else."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from abft_kernels import ops, reference
from abft_kernels.call import Call
from abft_kernels.masking import Keywords, Masking
from abft_kernels.merging import merge_masses
from abft_kernels.pytorch import sdpa
from abft_kernels.triton.launch import refusal
from abft_kernels.validation import Output, check_rows, make_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Backend", "attention", "available_backends", "mass_attention", "merge_masses", "row_mass"]

Backend = Literal["auto", "triton", "torch", "reference"]
_BACKENDS = ("auto", "triton", "torch", "reference")


def _triton_interpreted() -> bool:
    from abft_kernels.triton.common import INTERPRETED

    return INTERPRETED


def _on_gpu(device: torch.device) -> bool:
    """Return True if `"auto"` may choose Triton; the one place that asks for the kind of device."""
    return device.type == "cuda"


def _triton_reason(
    operator: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1
) -> str | None:
    """Return why the Triton kernels cannot run here, or None; `operator` is "fused" or "rows"."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if _on_gpu(device) or _triton_interpreted():
        return refusal(operator, head_dim, dtype.itemsize, groups, device)
    return f"the tensors are on {device.type}; set TRITON_INTERPRET=1 before Python starts to interpret"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def available_backends(device: str | torch.device = "cpu") -> dict[Backend, str]:
    """Return backend → `"available"`, or the reason why it is not, for bf16 tensors of head_dim 128 on `device`."""
    reason = _triton_reason("fused", torch.device(device), torch.bfloat16, 128)
    return {"triton": reason or "available", "torch": "available", "reference": "available"}


def _choose(backend: Backend, q: Tensor, v: Tensor | None, operator: str, groups: int) -> Backend:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    widest = max(q.shape[-1], 0 if v is None else v.shape[-1])
    if backend == "auto":
        on_gpu = _on_gpu(q.device)
        reason = _triton_reason(operator, q.device, q.dtype, widest, groups) if on_gpu else "no GPU"
        if reason and on_gpu and q.dtype != torch.float64:
            _warn_once(f"backend 'auto' takes PyTorch, not Triton: {reason}")
        return "torch" if reason else "triton"
    if backend == "triton" and (reason := _triton_reason(operator, q.device, q.dtype, widest, groups)):
        raise NotImplementedError(f"backend 'triton' cannot run this: {reason}; backend='torch' can")
    return backend


def _with_positive_scale(q: Tensor, masking: Masking) -> tuple[Tensor, Masking]:
    """Move the sign of the scale into q: the kernels (and PyTorch's) scale after they take the maximum of scores."""
    scale = masking.scale
    if scale is None or not isinstance(q, Tensor) or scale > 0 or scale != scale:
        return q, masking
    return (-q, masking._replace(scale=-scale)) if scale < 0 else (q * 0.0, masking._replace(scale=1.0))


def _output_backend(q: Tensor, k: Tensor, v: Tensor, call: Call, seeded: bool, backend: Backend) -> Backend | None:
    """Return the backend whose kernels compute the output; None: PyTorch's own attention does.

    `seeded`: the caller gave the seed of dropout. Padded and packed samples go to the Triton kernels where `"auto"` may
    take them. These read the samples where they stand, and leave zeros and no gradient outside of them. PyTorch's
    attention needs padding moved to the right and cleaned; its `varlen_attn`, with padding as sequences of its own,
    needs outputs and gradients of padding masked, and a fill: more launches than the masses leave room for.
    """
    chosen = _choose(backend, q, v, "fused", 1)
    where_they_stand = chosen == "triton" and call.ends is not None
    through_pytorch = backend == "torch" or (backend == "auto" and not where_they_stand)
    if call.packed and torch.compiler.is_compiling():  # cutting the batch would need the bounds while tracing
        through_pytorch = False
    return None if through_pytorch and sdpa.is_plain(q.shape[2], k.shape[2], call, seeded) else chosen


def _output(q: Tensor, k: Tensor, v: Tensor, call: Call, backend: Backend | None) -> Tensor:
    """Return the attention output alone, of the backend that `_output_backend` chose."""
    if backend is None:
        return sdpa.attention_output(q, k, v, call)
    return ops.mass_attention(q, k, v, call._replace(groups=None, weights=None, num_groups=0), backend)[0]


@overload
def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    sparse_labels: bool = False,
    all_queries: bool = False,
    return_lse: Literal[False] = False,
    deterministic: bool = True,
    backend: Backend = "auto",
    **masking: Unpack[Keywords],
) -> Tensor: ...
@overload
def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    sparse_labels: bool = False,
    all_queries: bool = False,
    return_lse: Literal[True],
    deterministic: bool = True,
    backend: Backend = "auto",
    **masking: Unpack[Keywords],
) -> tuple[Tensor, Tensor]: ...
def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    all_queries: bool = False,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    seq_ends: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    sparse_labels: bool = False,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute the attention mass of query rows on groups of keys: no values, no output.

    .. math:: \mathrm{mass}_{rg} = \sum_j \mathrm{softmax}_j(scale \cdot q_r k_j) \, w_{jg}

    A few rows take one pass over K forward and one backward: O(R·N·D) time and O(R + N·D) memory. All rows
    (`row_positions` None) take the fused kernel without its values: two products less backward than with them.

    Args, where they differ from :func:`mass_attention`:
        q_rows: queries `(B, H, R, D)`; with `cu_seqlens` and `row_positions` `(S, H, R, D)`, the rows of each sequence.
        row_positions: key position of each row `(B, R)`, int32 or int64, or `(S, R)` in the packed order. With
            `causal`, a row sees keys up to and including its position. A negative position marks an absent row:
            mass 0, LSE −inf, no gradient. None: `q_rows` are consecutive, the last one aligned with the last key.
        all_queries: `q_rows` holds the queries `(B, H, N_q, D)` of consecutive positions, as in
            :func:`mass_attention`, and the rows at `row_positions` are read where they stand: no copy of them is made,
            nor of their gradients.
        query_offset: position of the first query where `row_positions` is None or `all_queries`.
        sparse_labels: few keys have a group id; without effect on rows with `row_positions`.
        deterministic: as there, for all rows; the gradients of a few rows are always repeatable.
        backend: `"auto"` is Triton on a GPU, else PyTorch.

    Returns:
        mass `(B, H, R, G)`, float32 (float64 for float64 input); with `return_lse` also lse `(B, H, R)`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mass_attention`.
    """
    masking = Masking(
        *(causal, scale, window, chunk, softcap, sinks, alibi_slopes),
        *(seq_lens, seq_starts, seq_ends, cu_seqlens, key_offset, query_offset),
    )
    few = row_positions is not None
    alone = few and not all_queries
    output = None if alone else Output(sparse_labels=sparse_labels and not few, deterministic=deterministic)
    q_rows, masking = _with_positive_scale(q_rows, masking)
    heads = {"q_rows": q_rows, "k": k}
    call, sequences = make_call(heads, (key_groups, num_groups), masking, output)
    if row_positions is not None:
        last = None if masking.sharded else k.shape[2] - 1
        first = 0 if alone else max(0, call.row_offset + call.key_offset)
        row_positions = check_rows(row_positions, sequences, q_rows.shape[2] if alone else None, first, last)
        call = call._replace(whole=all_queries)
    of_table = ("rows", num_groups) if few else ("fused", call.loop_groups(num_groups))
    chosen = _choose(backend, q_rows, None, *of_table)
    if chosen == "reference":
        if row_positions is not None and all_queries:
            q_rows = reference.gather_rows(q_rows, row_positions, call.row_offset + call.key_offset)
            masking = masking._replace(query_offset=None)
        mass, lse = reference.row_mass_reference(
            q_rows, k, key_groups, num_groups, row_positions=row_positions, return_lse=True, **masking._asdict()
        )
    elif row_positions is not None:
        mass, lse = ops.row_mass(q_rows, k, row_positions, call, chosen)
    else:
        _, mass, lse = ops.mass_attention(q_rows, k, None, call, chosen)
    return (mass, lse) if return_lse else mass


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    seq_ends: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute plain attention under the masks of :func:`mass_attention`, with no N × N mask for any of them.

    Arguments as there. `"auto"` takes PyTorch's fastest kernel where it can compute this (causal or full; padded and
    packed where Triton cannot), and otherwise Triton on a GPU and rows a few at a time elsewhere. Returns out
    `(B, H, N_q, D_v)`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mass_attention`.
    """
    masking = Masking(
        *(causal, scale, window, chunk, softcap, sinks, alibi_slopes),
        *(seq_lens, seq_starts, seq_ends, cu_seqlens, key_offset, query_offset),
    )
    q, masking = _with_positive_scale(q, masking)
    call, _ = make_call({"q": q, "k": k, "v": v}, None, masking, Output(None, dropout_p, dropout_seed))
    if backend == "reference":
        no_group = torch.full((k.shape[0], k.shape[2]), -1, device=k.device)
        return reference.mass_attention_reference(
            q, k, v, no_group, 0, dropout_p=dropout_p, dropout_seed=call.seed, **masking._asdict()
        )[0]
    return _output(q, k, v, call, _output_backend(q, k, v, call, dropout_seed is not None, backend))


@overload
def mass_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    sparse_labels: bool = False,
    return_lse: Literal[False] = False,
    deterministic: bool = True,
    backend: Backend = "auto",
    **masking: Unpack[Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def mass_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    sparse_labels: bool = False,
    return_lse: Literal[True],
    deterministic: bool = True,
    backend: Backend = "auto",
    **masking: Unpack[Keywords],
) -> tuple[Tensor, Tensor, Tensor]: ...
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
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    seq_ends: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    row_positions: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    sparse_labels: bool = False,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""Compute the attention output, and the attention mass of every query row on groups of keys.

    .. math:: P = \mathrm{softmax}(scale \cdot Q K^T + mask), \quad out = P V, \quad
              \mathrm{mass}_{ig} = \sum_j P_{ij} \, w_{jg}

    w_jg is 1 if key j is in group g, else 0, or the key's weight. Differentiable in q, k and v (and in sinks and
    weights) through every result; a result that the loss does not use costs nothing in the backward pass. No
    backend but `"reference"` holds an N × N tensor. With fewer queries than keys the last query is aligned with the
    last key; a few queries on many keys, as in decoding, split the keys over the GPU.

    Args:
        q: queries `(B, H, N_q, D)`, any strides; float32, float16 or bfloat16 (float64 in PyTorch backends).
        k: keys `(B, H_kv, N_k, D)`, any strides; `H` a multiple of `H_kv` (grouped-query attention).
        v: values `(B, H_kv, N_k, D_v)`; D_v may differ from D.
        key_groups: integers `(B, N_k)`: −1 for no group, else 0 … `num_groups` − 1. On a GPU the values are not
            read back to be checked; one outside the range counts as −1. Or weights w `(B, N_k, G)` of any floating
            dtype, differentiable too.
        num_groups: number of groups G, 1 … 16.
        causal: mask keys after the row's position.
        scale: factor on the scores; `1/sqrt(D)` if None.
        window: a row sees its last `window` keys only, its own included; needs `causal`.
        chunk: a row sees the keys of its own chunk only, up to itself; needs `causal`. Chunks of `chunk` keys are
            counted from the first token of each sequence, in shards from that of all keys. With `window` both hold.
        softcap: scores become `softcap·tanh(score / softcap)`.
        sinks: a score per head `(H,)` that joins the denominator and carries no mass; differentiable.
        alibi_slopes: `(H,)` or `(B, H)`: scores lose slope·|row − key|. No gradient.
        seq_lens: tokens of each sample `(B,)`, for padded batches; None: all `N_k`. Keys outside are masked, and
            query rows outside give output 0, mass 0, LSE −inf and no gradient.
        seq_starts: first token of each sample `(B,)`, for left padding; None: 0.
        seq_ends: one past the last token of each sample `(B,)`, in place of `seq_lens`. With `seq_starts` it saves the
            addition of the two in every call.
        cu_seqlens: bounds `(S + 1,)` of S packed sequences: concatenated along the sequence dimension (batch size
            1), queries and keys alike; starts at 0.
        key_offset: position of the first key: k and v are a shard of the keys, to be merged by :func:`merge_masses`.
            Positions, `seq_lens` and `seq_starts` count all keys. 0 is the first shard, None the whole.
        query_offset: position of the first query; None aligns the last query with the last key.
        row_positions: positions `(B, R)`, or `(S, R)` with `cu_seqlens`, of the only rows whose mass is wanted
            (negative: absent). Then :func:`row_mass` runs beside :func:`attention`, on all queries. Where both are
            kernels of one backend, the rows' gradients are added in place to those of the attention.
        row_mask: bool `(B, N_q)`: rows whose mass is wanted, in the fused kernel; the others have mass 0, and tiles
            without a wanted row do no work for it.
        dropout_p: dropout on the probabilities that make `out`, never on mass or LSE.
        dropout_seed: makes dropout reproducible: the same on every backend and for every tile size, and slower in
            PyTorch's backend. None draws from PyTorch's generator.
        sparse_labels: True: few keys have a group id, for example label tokens; the mass then costs almost nothing,
            and many labels cost time, never correctness. Needs integer `key_groups`. Only the fused Triton kernels
            differ: they meet the labelled keys last, in tiles of their own.
        return_lse: also return the natural-log LSE of the scores (sinks included), differentiable too.
        deterministic: True: the same input gives the same bits, in the backward pass too. False lets the fused kernel
            add up dq in float32 in any order, by atomics, for one kernel less. No effect in other backends, with
            `row_positions`, and under `torch.use_deterministic_algorithms(True)`.
        backend: `"triton"` (fused kernel), `"torch"`, `"reference"`, or `"auto"`: Triton on a GPU, else PyTorch;
            with `row_positions`, the kernel that :func:`attention` takes and on a GPU the Triton row kernel.

    Returns:
        out `(B, H, N_q, D_v)` in q's dtype and mass `(B, H, N_q, G)`, or `(B or S, H, R, G)` with `row_positions`,
        float32 (float64 for float64 input); with `return_lse` also lse, mass's shape without G.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    masking = Masking(
        *(causal, scale, window, chunk, softcap, sinks, alibi_slopes),
        *(seq_lens, seq_starts, seq_ends, cu_seqlens, key_offset, query_offset),
    )
    q, masking = _with_positive_scale(q, masking)
    output = Output(row_mask, dropout_p, dropout_seed, sparse_labels, deterministic)
    call, sequences = make_call({"q": q, "k": k, "v": v}, (key_groups, num_groups), masking, output)
    first = call.row_offset + call.key_offset
    if row_positions is not None:
        if row_mask is not None:
            raise ValueError("row_positions and row_mask both choose rows; pass one of them")
        last = None if masking.sharded else k.shape[2] - 1
        row_positions = check_rows(row_positions, sequences, None, max(0, first), last)
    fused = row_positions is None
    chosen = _choose(backend, q, v, "fused" if fused else "rows", call.loop_groups(num_groups) if fused else num_groups)
    seeded = dropout_seed is not None
    if chosen == "reference":
        out, mass, lse = reference.mass_attention_reference(
            q,
            k,
            v,
            key_groups,
            num_groups,
            row_positions=row_positions,
            row_mask=row_mask,
            dropout_p=dropout_p,
            dropout_seed=call.seed,
            return_lse=True,
            **masking._asdict(),
        )
    elif row_positions is not None:
        of_output, of_rows = _output_backend(q, k, v, call, seeded, backend), call._replace(whole=True)
        if of_output == chosen:
            out, mass, lse = ops.row_mass_attention(q, k, v, row_positions, of_rows, chosen)
        else:
            out = _output(q, k, v, call, of_output)
            mass, lse = ops.row_mass(q, k, row_positions, of_rows, chosen)
    elif chosen == "torch" and sdpa.is_plain(q.shape[2], k.shape[2], call, seeded):
        out = sdpa.attention_output(q, k, v, call)
        _, mass, lse = ops.mass_attention(q, k, None, call, chosen)
    else:
        out, mass, lse = ops.mass_attention(q, k, v, call, chosen)
    return (out, mass, lse) if return_lse else (out, mass)
