"""Public operations: checks, choice of backend, and nothing else."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from abft_kernels import ops, reference, torch_backend
from abft_kernels.launch import widest_head_tile
from abft_kernels.validation import (
    check_bounds,
    check_groups,
    check_heads,
    check_rows,
    check_scale,
)

__all__ = ["Backend", "attention", "available_backends", "mass_attention", "row_mass"]

Backend = Literal["auto", "triton", "torch", "reference"]
_BACKENDS = ("auto", "triton", "torch", "reference")


def _triton_interpreted() -> bool:
    from abft_kernels.triton.common import INTERPRETED

    return INTERPRETED


def _triton_reason(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run here, or None if they can; `kernel` is "forward" (fused) or "rows"."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    widest = widest_head_tile(kernel, dtype.itemsize)
    if head_dim > widest:
        return f"head_dim {head_dim} is over {widest} in {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not _triton_interpreted():
        return f"the tensors are on {device.type}; set TRITON_INTERPRET=1 before Python starts to interpret"
    return None


def available_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """Backend → `"available"`, or the reason why it is not, for bf16 tensors of head_dim 128 on `device`."""
    reason = _triton_reason("forward", torch.device(device), torch.bfloat16, 128)
    return {"triton": reason or "available", "torch": "available", "reference": "available"}


def _choose(backend: str, q: Tensor, kernel: str) -> str:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "auto":
        on_gpu = q.device.type == "cuda"
        return "triton" if on_gpu and _triton_reason(kernel, q.device, q.dtype, q.shape[-1]) is None else "torch"
    if backend == "triton" and (reason := _triton_reason(kernel, q.device, q.dtype, q.shape[-1])):
        raise NotImplementedError(f"backend 'triton' cannot run this: {reason}; backend='torch' can")
    return backend


def row_mass(
    q_rows: Tensor,
    k: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    row_positions: Tensor,
    causal: bool = True,
    scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention mass of a few query rows on groups of keys, differentiable in `q_rows` and `k`.

    .. math:: \mathrm{mass}_{rg} = \sum_j \mathrm{softmax}_j(scale \cdot q_r k_j) \, [\mathrm{key\_groups}_j = g]

    One pass over K forward and one backward: O(R·N·D) time and O(R + N·D) memory, no score matrix.

    Args:
        q_rows: queries `(B, H, R, D)`, any strides; float32, float16 or bfloat16 (float64 in PyTorch backends).
        k: keys `(B, H_kv, N, D)`, any strides; `H` a multiple of `H_kv` (grouped-query attention).
        key_groups: integers `(B, N)`: −1 for no group, else 0 … `num_groups` − 1. On a GPU the values are not
            read back to be checked; one outside the range counts as −1.
        num_groups: number of groups G, 1 … 8.
        row_positions: key position of each row `(B, R)`, int32 or int64. With `causal`, row r sees keys up to and
            including it. A negative position marks an absent row: mass 0, LSE −inf, no gradient.
        causal: hide keys behind the row's position.
        scale: factor on the scores; `1/sqrt(D)` if None.
        seq_lens: tokens of each sample `(B,)`; other keys are hidden, and rows on them absent. None: all N.
        seq_starts: first token of each sample `(B,)`, for left padding; None: 0.
        return_lse: also return the natural-log LSE of each row's scores, differentiable too.
        backend: `"triton"`, `"torch"`, `"reference"`, or `"auto"`: Triton on a GPU, else PyTorch.

    Returns:
        mass `(B, H, R, G)`, float32 (float64 for float64 input); with `return_lse` also lse `(B, H, R)`.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    check_heads({"q_rows": q_rows, "k": k})
    scale = check_scale(scale, q_rows.shape[-1])
    groups = check_groups(key_groups, num_groups, k)
    positions = check_rows(row_positions, q_rows.shape[0], q_rows.shape[2], k.shape[2])
    starts, ends = check_bounds(seq_lens, seq_starts, q_rows.shape[0], None, k.shape[2], causal)
    chosen = _choose(backend, q_rows, "rows")
    if chosen == "reference":
        return reference.row_mass_reference(
            q_rows, k, groups, num_groups, row_positions=positions, causal=causal, scale=scale,
            seq_lens=seq_lens, seq_starts=seq_starts, return_lse=return_lse,
        )  # fmt: skip
    mass, lse = ops.row_mass_op(q_rows, k, groups, positions, starts, ends, num_groups, causal, scale, chosen)
    return (mass, lse) if return_lse else mass


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Plain attention under the masks of :func:`mass_attention`, with no N × N mask for padding or cached keys.

    Arguments as there; `"auto"` takes PyTorch's fastest kernel. Returns out `(B, H, N_q, D)`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mass_attention`.
    """
    check_heads({"q": q, "k": k, "v": v})
    scale = check_scale(scale, q.shape[-1])
    starts, ends = check_bounds(seq_lens, seq_starts, q.shape[0], q.shape[2], k.shape[2], causal)
    chosen = _choose("torch" if backend == "auto" else backend, q, "forward")
    positions = _all_positions(q, k, causal)
    if chosen == "triton":
        _refuse_dropout(dropout_p)
        return ops.mass_attention_op(q, k, v, None, starts, ends, 0, causal, scale)[0]
    if chosen == "reference":
        _refuse_dropout(dropout_p)
        no_group = torch.full((k.shape[0], k.shape[2]), -1, device=k.device)
        return reference.mass_attention_reference(
            q, k, v, no_group, 0, causal=causal, scale=scale, seq_lens=seq_lens, seq_starts=seq_starts
        )[0]
    return torch_backend.attention_output(q, k, v, positions, starts, ends, causal, scale, dropout_p)


def _all_positions(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    positions = reference.row_positions_of(q.shape[2], k.shape[2], causal, q.device)
    return positions.to(torch.int32).expand(q.shape[0], -1)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise NotImplementedError(
            f"only backend 'torch' has dropout yet, got dropout_p={dropout_p}; set it to 0 or use backend='torch'"
        )


def mass_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_groups: Tensor,
    num_groups: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    row_positions: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Attention output, and the attention mass of every query row on groups of keys.

    .. math:: P = \mathrm{softmax}(scale \cdot Q K^T + mask), \quad out = P V, \quad
              \mathrm{mass}_{ig} = \sum_j P_{ij} \, [\mathrm{key\_groups}_j = g]

    Differentiable in q, k and v through every result; a result that the loss does not use costs nothing in
    the backward pass. No backend but `"reference"` holds an N × N tensor. With fewer queries than keys the
    last query is aligned with the last key.

    Args:
        q: queries `(B, H, N_q, D)`, any strides; float32, float16 or bfloat16 (float64 in PyTorch backends).
        k, v: keys and values `(B, H_kv, N_k, D)`; `H` a multiple of `H_kv`.
        key_groups: integers `(B, N_k)`: −1 for no group, else 0 … `num_groups` − 1. On a GPU the values are not
            read back to be checked; one outside the range counts as −1.
        num_groups: number of groups G, 1 … 8.
        causal: query i sees keys up to `i + N_k − N_q`.
        scale: factor on the scores; `1/sqrt(D)` if None.
        seq_lens: tokens of each sample `(B,)`, for padded batches; None: all `N_k`. Keys outside are hidden, and
            query rows that stand outside give output 0, mass 0, LSE −inf and no gradient.
        seq_starts: first token of each sample `(B,)`, for left padding; None: 0.
        row_positions: key positions `(B, R)` of the only rows whose mass is wanted (negative: absent). Then the
            main attention runs on PyTorch's fastest kernel with :func:`row_mass` beside it.
        dropout_p: dropout on the probabilities that make `out`, never on mass or LSE (backend `"torch"`, and
            `"auto"` with `row_positions`).
        return_lse: also return the natural-log LSE of the scores.
        backend: `"triton"` (fused kernel), `"torch"`, `"reference"`, or `"auto"`: Triton on a GPU, else PyTorch;
            with `row_positions`, PyTorch's attention and on a GPU the Triton row kernel.

    Returns:
        out `(B, H, N_q, D)` in q's dtype and mass `(B, H, N_q, G)`, or `(B, H, R, G)` with `row_positions`,
        float32 (float64 for float64 input); with `return_lse` also lse, mass's shape without G.

    Raises:
        ValueError, TypeError: the arguments do not fit together; the message names the value and the remedy.
        NotImplementedError: the chosen backend cannot run this; the message names one that can.
    """
    check_heads({"q": q, "k": k, "v": v})
    scale = check_scale(scale, q.shape[-1])
    groups = check_groups(key_groups, num_groups, k)
    starts, ends = check_bounds(seq_lens, seq_starts, q.shape[0], q.shape[2], k.shape[2], causal)
    wanted = None
    if row_positions is not None:
        wanted = check_rows(row_positions, q.shape[0], None, k.shape[2], first=k.shape[2] - q.shape[2])
    chosen = _choose(backend, q, "forward" if wanted is None else "rows")
    if wanted is None and chosen != "torch":
        _refuse_dropout(dropout_p)
    if chosen == "reference":
        out, mass, lse = reference.mass_attention_reference(
            q, k, v, groups, num_groups, causal=causal, scale=scale, seq_lens=seq_lens, seq_starts=seq_starts,
            row_positions=wanted, return_lse=True,
        )  # fmt: skip
    elif chosen == "triton" and wanted is None:
        out, mass, lse = ops.mass_attention_op(q, k, v, groups, starts, ends, num_groups, causal, scale)
    else:
        out = attention(
            q, k, v, causal=causal, scale=scale, seq_lens=seq_lens, seq_starts=seq_starts, dropout_p=dropout_p,
            backend=backend,
        )  # fmt: skip
        q_rows = q if wanted is None else reference.gather_rows(q, wanted, k.shape[2])
        rows = _all_positions(q, k, causal) if wanted is None else wanted
        mass, lse = ops.row_mass_op(q_rows, k, groups, rows, starts, ends, num_groups, causal, scale, chosen)
    return (out, mass, lse) if return_lse else (out, mass)
