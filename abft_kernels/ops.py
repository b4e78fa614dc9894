"""The kernels as PyTorch operators: schema, fake tensors, autograd. Named `abft::…` in traces and profiles.

Gradients that no one asked for arrive here as None and are handed on as None, so that an unused output costs
nothing in the backward pass.
"""

from typing import Optional

import torch
from torch import Tensor

from abft_kernels import torch_backend

# Schemas are inferred from the annotations, which must therefore be objects and not strings (no
# `from __future__ import annotations` here).
_OptTensor = Optional[Tensor]  # noqa: UP045


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# --- a few rows ------------------------------------------------------------------------------------------


@torch.library.custom_op("abft::row_mass", mutates_args=())
def row_mass_op(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    positions: Tensor,
    starts: _OptTensor,
    ends: _OptTensor,
    num_groups: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mass `(B, H, R, G)` and LSE `(B, H, R)` of R query rows."""
    if backend == "triton":
        from abft_kernels.triton import rows

        return rows.forward(q, k, groups, positions, starts, ends, num_groups, causal, scale)
    return torch_backend.row_mass_forward(q, k, groups, positions, starts, ends, num_groups, causal, scale)


@row_mass_op.register_fake
def _(q, k, groups, positions, starts, ends, num_groups, causal, scale, backend):
    dtype = _accumulated(q)
    return (
        q.new_empty((*q.shape[:3], num_groups), dtype=dtype),
        q.new_empty(q.shape[:3], dtype=dtype),
    )


@torch.library.custom_op("abft::row_mass_backward", mutates_args=())
def row_mass_backward_op(
    dmass: _OptTensor,
    dlse: _OptTensor,
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    positions: Tensor,
    starts: _OptTensor,
    ends: _OptTensor,
    mass: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dq and dk of :func:`row_mass_op`."""
    if backend == "triton":
        from abft_kernels.triton import rows

        return rows.backward(
            dmass, dlse, q, k, groups, positions, starts, ends, mass, lse, causal, scale
        )  # fmt: skip
    return torch_backend.row_mass_backward(dmass, dlse, q, k, groups, positions, starts, ends, mass, lse, causal, scale)


@row_mass_backward_op.register_fake
def _(dmass, dlse, q, k, groups, positions, starts, ends, mass, lse, causal, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _row_mass_setup(ctx, inputs, output):
    q, k, groups, positions, starts, ends, _, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, groups, positions, starts, ends, *output)
    ctx.set_materialize_grads(False)


def _row_mass_autograd(ctx, dmass, dlse):
    none = (None,) * 8
    if dmass is None and dlse is None:
        return None, None, *none
    dq, dk = row_mass_backward_op(dmass, dlse, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.backend)
    return dq, dk, *none


row_mass_op.register_autograd(_row_mass_autograd, setup_context=_row_mass_setup)


# --- all rows, fused with the attention output -----------------------------------------------------------


@torch.library.custom_op("abft::mass_attention", mutates_args=())
def mass_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    num_groups: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(B, H, N_q, D)`, mass `(B, H, N_q, G)`, LSE `(B, H, N_q)`; `groups` None is plain attention."""
    from abft_kernels.triton import forward

    return forward.forward(q, k, v, groups, starts, ends, num_groups, causal, scale)


@mass_attention_op.register_fake
def _(q, k, v, groups, starts, ends, num_groups, causal, scale):
    b, h, n_q, d = q.shape
    return (
        q.new_empty((b, n_q, h, d)).transpose(1, 2),
        q.new_empty((b, h, n_q, num_groups), dtype=torch.float32),
        q.new_empty((b, h, n_q), dtype=torch.float32),
    )


@torch.library.custom_op("abft::mass_attention_backward", mutates_args=())
def mass_attention_backward_op(
    do: _OptTensor,
    dmass: _OptTensor,
    dlse: _OptTensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of :func:`mass_attention_op`; dv is empty when `do` is None."""
    from abft_kernels.triton import backward

    return backward.backward(do, dmass, dlse, q, k, v, groups, starts, ends, out, mass, lse, causal, scale)


@mass_attention_backward_op.register_fake
def _(do, dmass, dlse, q, k, v, groups, starts, ends, out, mass, lse, causal, scale):
    dv = v.new_empty(v.shape) if do is not None else v.new_empty((0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), dv


def _mass_attention_setup(ctx, inputs, output):
    q, k, v, groups, starts, ends, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, groups, starts, ends, *output)
    ctx.set_materialize_grads(False)


def _mass_attention_autograd(ctx, do, dmass, dlse):
    none = (None,) * 6
    if do is None and dmass is None and dlse is None:
        return None, None, None, *none
    dq, dk, dv = mass_attention_backward_op(do, dmass, dlse, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return dq, dk, dv if do is not None else None, *none


mass_attention_op.register_autograd(_mass_attention_autograd, setup_context=_mass_attention_setup)
