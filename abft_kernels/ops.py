"""The kernels as PyTorch operators: schema, fake tensors, autograd. Named `abft::…` in traces and profiles.

The operators take the fields of :class:`~abft_kernels.spec.Extras` and :class:`~abft_kernels.spec.Options` one by
one, in their order. Gradients that no one asked for arrive here as None and are handed on as None, so that an unused
output costs nothing in the backward pass; an empty tensor stands for a result that is not there.
"""

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, library

from abft_kernels import torch_backend
from abft_kernels.spec import Extras, Options

# Schemas are inferred from the annotations, which must therefore be objects and not strings (no
# `from __future__ import annotations` here).
_OptTensor = Optional[Tensor]  # noqa: UP045
_EXTRAS, _OPTIONS = len(Extras._fields), len(Options._fields)


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _split(arguments: tuple) -> tuple[Extras, Options]:
    return Extras(*arguments[:_EXTRAS]), Options(*arguments[_EXTRAS : _EXTRAS + _OPTIONS])


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's arithmetic is its own: autocast may choose the dtypes of what goes in, not of what is inside."""

    @functools.wraps(function)
    def without_autocast(*args: Any, **kwargs: Any) -> Any:
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return without_autocast


# --- a few rows ------------------------------------------------------------------------------------------


@library.custom_op("abft::row_mass", mutates_args=())
@_exact
def row_mass_op(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    groups: _OptTensor,
    weights: _OptTensor,
    sinks: _OptTensor,
    slopes: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    row_mask: _OptTensor,
    num_groups: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    offset: int,
    packed: bool,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mass `(S, H, R, G)` and LSE `(S, H, R)` of R query rows at `positions` `(S, R)`; negative: absent."""
    extras = Extras(groups, weights, sinks, slopes, starts, ends, row_mask)
    options = Options(num_groups, causal, scale, window, softcap, offset, packed, dropout_p, seed)
    if backend == "triton":
        from abft_kernels.triton import rows

        return rows.forward(q, k, positions, extras, options)
    return torch_backend.row_mass_forward(q, k, positions, extras, options)


@row_mass_op.register_fake
def _(q, k, positions, *arguments):
    _, options = _split(arguments)
    dtype = _accumulated(q)
    return q.new_empty((*q.shape[:3], options.num_groups), dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)


@library.custom_op("abft::row_mass_backward", mutates_args=())
@_exact
def row_mass_backward_op(
    dmass: _OptTensor,
    dlse: _OptTensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    groups: _OptTensor,
    weights: _OptTensor,
    sinks: _OptTensor,
    slopes: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    row_mask: _OptTensor,
    mass: Tensor,
    lse: Tensor,
    num_groups: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    offset: int,
    packed: bool,
    dropout_p: float,
    seed: int,
    backend: str,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dweights and dsinks of :func:`row_mass_op`; the last two are empty where not wanted."""
    extras = Extras(groups, weights, sinks, slopes, starts, ends, row_mask)
    options = Options(num_groups, causal, scale, window, softcap, offset, packed, dropout_p, seed)
    if backend == "triton":
        from abft_kernels.triton import rows

        return rows.backward(dmass, dlse, q, k, positions, extras, mass, lse, options, weights_wanted)
    return torch_backend.row_mass_backward(dmass, dlse, q, k, positions, extras, mass, lse, options, weights_wanted)


def _side_gradients(q: Tensor, extras: Extras, wanted: bool) -> tuple[Tensor, Tensor]:
    dtype = _accumulated(q)
    weights, sinks = extras.weights, extras.sinks
    return (
        q.new_empty(weights.shape if wanted and weights is not None else (0,), dtype=dtype),
        q.new_empty(sinks.shape if sinks is not None else (0,), dtype=dtype),
    )


@row_mass_backward_op.register_fake
def _(dmass, dlse, q, k, positions, *arguments):
    extras, wanted = Extras(*arguments[:_EXTRAS]), arguments[-1]
    return q.new_empty(q.shape), k.new_empty(k.shape), *_side_gradients(q, extras, wanted and dmass is not None)


def _row_mass_setup(ctx, inputs, output):
    extras, ctx.options = _split(inputs[3:])
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*inputs[:3], *extras, *output)
    ctx.set_materialize_grads(False)


def _row_mass_autograd(ctx, dmass, dlse):
    # q, k, positions, groups, weights, sinks, …
    none = (None,) * (3 + _EXTRAS + _OPTIONS + 1)
    if dmass is None and dlse is None:
        return none
    wanted = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    weights, sinks = saved[4], saved[5]
    dq, dk, dweights, dsinks = row_mass_backward_op(dmass, dlse, *saved, *ctx.options, ctx.backend, wanted[4])
    dweights = dweights.to(weights.dtype) if wanted[4] and dmass is not None else None
    dsinks = dsinks.to(sinks.dtype) if wanted[5] else None
    return dq, dk, None, None, dweights, dsinks, *none[6:]


row_mass_op.register_autograd(_row_mass_autograd, setup_context=_row_mass_setup)


# --- all rows, fused with the attention output -----------------------------------------------------------


@library.custom_op("abft::mass_attention", mutates_args=())
@_exact
def mass_attention_op(
    q: Tensor,
    k: Tensor,
    v: _OptTensor,
    groups: _OptTensor,
    weights: _OptTensor,
    sinks: _OptTensor,
    slopes: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    row_mask: _OptTensor,
    num_groups: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    offset: int,
    packed: bool,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(B, H, N_q, D_v)`, mass `(B, H, N_q, G)`, LSE `(B, H, N_q)`; no groups is plain attention, no v mass
    alone."""
    extras = Extras(groups, weights, sinks, slopes, starts, ends, row_mask)
    options = Options(num_groups, causal, scale, window, softcap, offset, packed, dropout_p, seed)
    if backend == "triton":
        from abft_kernels.triton import forward

        return forward.forward(q, k, v, extras, options)
    return torch_backend.mass_attention_forward(q, k, v, extras, options)


@mass_attention_op.register_fake
def _(q, k, v, *arguments):
    _, options = _split(arguments)
    b, h, n_q, _ = q.shape
    dtype = _accumulated(q)
    return (
        q.new_empty((b, n_q, h, 0 if v is None else v.shape[3])).transpose(1, 2),
        q.new_empty((b, h, n_q, options.num_groups), dtype=dtype),
        q.new_empty((b, h, n_q), dtype=dtype),
    )


@library.custom_op("abft::mass_attention_backward", mutates_args=())
@_exact
def mass_attention_backward_op(
    do: _OptTensor,
    dmass: _OptTensor,
    dlse: _OptTensor,
    q: Tensor,
    k: Tensor,
    v: _OptTensor,
    groups: _OptTensor,
    weights: _OptTensor,
    sinks: _OptTensor,
    slopes: _OptTensor,
    starts: _OptTensor,
    ends: _OptTensor,
    row_mask: _OptTensor,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    num_groups: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    offset: int,
    packed: bool,
    dropout_p: float,
    seed: int,
    backend: str,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dweights, dsinks of :func:`mass_attention_op`; dv is empty without `do`, the last two where not
    wanted."""
    extras = Extras(groups, weights, sinks, slopes, starts, ends, row_mask)
    options = Options(num_groups, causal, scale, window, softcap, offset, packed, dropout_p, seed)
    if backend == "triton":
        from abft_kernels.triton import backward

        return backward.backward(do, dmass, dlse, q, k, v, extras, out, mass, lse, options, weights_wanted)
    return torch_backend.mass_attention_backward(
        do, dmass, dlse, q, k, v, extras, out, mass, lse, options, weights_wanted
    )


@mass_attention_backward_op.register_fake
def _(do, dmass, dlse, q, k, v, *arguments):
    extras, wanted = Extras(*arguments[:_EXTRAS]), arguments[-1]
    dv = v.new_empty(v.shape) if v is not None and do is not None else q.new_empty((0,))
    side = _side_gradients(q, extras, wanted and dmass is not None)
    return q.new_empty(q.shape), k.new_empty(k.shape), dv, *side


def _mass_attention_setup(ctx, inputs, output):
    extras, ctx.options = _split(inputs[3:])
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*inputs[:3], *extras, *output)
    ctx.set_materialize_grads(False)


def _mass_attention_autograd(ctx, do, dmass, dlse):
    # q, k, v, groups, weights, sinks, …
    none = (None,) * (3 + _EXTRAS + _OPTIONS + 1)
    if do is None and dmass is None and dlse is None:
        return none
    wanted = ctx.needs_input_grad
    saved = ctx.saved_tensors
    _, _, v, _, weights, sinks, *_ = saved
    dq, dk, dv, dweights, dsinks = mass_attention_backward_op(
        do if v is not None else None, dmass, dlse, *saved, *ctx.options, ctx.backend, wanted[4]
    )
    do = do if v is not None else None
    dv = dv if do is not None else None
    dweights = dweights.to(weights.dtype) if wanted[4] and dmass is not None else None
    dsinks = dsinks.to(sinks.dtype) if wanted[5] else None
    return dq, dk, dv, None, dweights, dsinks, *none[6:]


mass_attention_op.register_autograd(_mass_attention_autograd, setup_context=_mass_attention_setup)
