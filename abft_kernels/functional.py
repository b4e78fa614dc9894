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


def _triton_reason(
    operator: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1
) -> str | None:
    """Return why the Triton kernels cannot run here, or None; `operator` is "fused" or "rows"."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if device.type == "cuda" or _triton_interpreted():
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
        on_gpu = q.device.type == "cuda"
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


def _output(q: Tensor, k: Tensor, v: Tensor, call: Call, seeded: bool, backend: Backend) -> Tensor:
    """Return the attention output alone; `seeded`: the caller gave the seed of dropout."""
    chosen = _choose(backend, q, v, "fused", 1)
    # Packed sequences reach PyTorch's attention padded or one by one; the Triton kernel takes them as they are.
    through_pytorch = backend == "torch" or (backend == "auto" and not (chosen == "triton" and call.packed))
    if through_pytorch and sdpa.is_plain(q.shape[2], k.shape[2], call, seeded):
        return sdpa.attention_output(q, k, v, call)
    return ops.mass_attention(q, k, v, call._replace(groups=None, weights=None, num_groups=0), chosen)[0]


@overload
def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor | None = None,
    sparse_labels: bool = False,
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
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
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
        query_offset: position of the first row where `row_positions` is None.
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
        *(seq_lens, seq_starts, cu_seqlens, key_offset, query_offset),
    )
    few = row_positions is not None
    output = None if few else Output(sparse_labels=sparse_labels, deterministic=deterministic)
    q_rows, masking = _with_positive_scale(q_rows, masking)
    heads = {"q_rows": q_rows, "k": k}
    call, sequences = make_call(heads, (key_groups, num_groups), masking, output)
    if row_positions is not None:
        last = None if masking.sharded else k.shape[2] - 1
        row_positions = check_rows(row_positions, sequences, q_rows.shape[2], 0, last)
    chosen = _choose(
        backend, q_rows, None, "rows" if few else "fused", num_groups if few else call.loop_groups(num_groups)
    )
    if chosen == "reference":
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
    cu_seqlens: Tensor | None = None,
    key_offset: int | None = None,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute plain attention under the masks of :func:`mass_attention`, with no N × N mask for any of them.

    Arguments as there. `"auto"` takes PyTorch's fastest kernel where it can compute this (causal or full, padded, and
    packed on a CPU), and otherwise Triton on a GPU and rows a few at a time elsewhere. Returns out `(B, H, N_q, D_v)`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mass_attention`.
    """
    masking = Masking(
        *(causal, scale, window, chunk, softcap, sinks, alibi_slopes),
        *(seq_lens, seq_starts, cu_seqlens, key_offset, query_offset),
    )
    q, masking = _with_positive_scale(q, masking)
    call, _ = make_call({"q": q, "k": k, "v": v}, None, masking, Output(None, dropout_p, dropout_seed))
    if backend == "reference":
        no_group = torch.full((k.shape[0], k.shape[2]), -1, device=k.device)
        return reference.mass_attention_reference(
            q, k, v, no_group, 0, dropout_p=dropout_p, dropout_seed=call.seed, **masking._asdict()
        )[0]
    return _output(q, k, v, call, dropout_seed is not None, backend)


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
        cu_seqlens: bounds `(S + 1,)` of S packed sequences: concatenated along the sequence dimension (batch size
            1), queries and keys alike; starts at 0.
        key_offset: position of the first key: k and v are a shard of the keys, to be merged by :func:`merge_masses`.
            Positions, `seq_lens` and `seq_starts` count all keys. 0 is the first shard, None the whole.
        query_offset: position of the first query; None aligns the last query with the last key.
        row_positions: positions `(B, R)`, or `(S, R)` with `cu_seqlens`, of the only rows whose mass is wanted
            (negative: absent). Then the main attention runs on PyTorch's fastest kernel with :func:`row_mass`
            beside it.
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
            with `row_positions`, PyTorch's attention and on a GPU the Triton row kernel.

    Returns:
        out `(B, H, N_q, D_v)` in q's dtype and mass `(B, H, N_q, G)`, or `(B or S, H, R, G)` with `row_positions`,
        float32 (float64 for float64 input); with `return_lse` also lse, mass's shape without G.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    masking = Masking(
        *(causal, scale, window, chunk, softcap, sinks, alibi_slopes),
        *(seq_lens, seq_starts, cu_seqlens, key_offset, query_offset),
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
        out = _output(q, k, v, call, seeded, backend)
        rows = reference.gather_rows(q, row_positions, first)
        if call.slopes is not None:  # of packed sequences: one batch for q, one sample each for their rows
            call = call._replace(slopes=call.slopes.expand(sequences, -1).contiguous())
        mass, lse = ops.row_mass(rows, k, row_positions, call, chosen)
    elif chosen == "torch" and sdpa.is_plain(q.shape[2], k.shape[2], call, seeded):
        out = sdpa.attention_output(q, k, v, call)
        _, mass, lse = ops.mass_attention(q, k, None, call, chosen)
    else:
        out, mass, lse = ops.mass_attention(q, k, v, call, chosen)
    return (out, mass, lse) if return_lse else (out, mass)
