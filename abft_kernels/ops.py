"""The kernels as PyTorch operators: schema, fake tensors, autograd. Named `abft::…` in traces and profiles.

An operator takes three tensors of its own, the fields of :class:`~abft_kernels.call.Call` as
:func:`~abft_kernels.call.pack` writes them, and the backend's name. Its backward operator takes the incoming gradients
before these and the results and `weights_wanted` after them. A gradient that no one asked for is None, so that an
unused result costs nothing in the backward pass; an empty tensor stands for a gradient that is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from abft_kernels.call import PACKED_ARGUMENTS, SCHEMA, TENSORS, Call, pack, unpack
from abft_kernels.pytorch import passes

__all__ = ["mass_attention", "row_mass", "row_mass_attention"]

_LIBRARY = library.Library("abft", "FRAGMENT")
_Kernel = Callable[..., Sequence[Tensor]]


class Operator(NamedTuple):
    """The differences between the operators."""

    name: str
    inputs: dict[str, str]  # name -> type in the schema, before the call's fields
    results: tuple[str, ...]
    gradients: tuple[str, ...]  # argument of each result of the backward operator
    kernels: Callable[[str], tuple[_Kernel, _Kernel]]  # backend -> forward, backward
    kept: tuple[str, ...] = ()  # results that only the backward operator reads


def _row_kernels(backend: str) -> tuple[_Kernel, _Kernel]:
    if backend == "triton":
        from abft_kernels.triton import rows

        return rows.forward, rows.backward
    return passes.row_forward, passes.row_backward


def _fused_kernels(backend: str) -> tuple[_Kernel, _Kernel]:
    if backend == "triton":
        from abft_kernels.triton import backward, forward

        return forward.forward, backward.backward
    return passes.forward, passes.backward


def _beside_kernels(backend: str) -> tuple[_Kernel, _Kernel]:
    """Return an attention with the row kernel beside it, which adds its dq and dk to the attention's in place."""
    (attend, attend_backward), (rows, rows_backward) = _fused_kernels(backend), _row_kernels(backend)

    def forward(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, call: Call) -> Sequence[Tensor]:
        out, _, out_lse = attend(q, k, v, _without_mass(call))
        return (out, *rows(q, k, positions, call), out_lse)

    def backward(do: Tensor | None, *arguments: Any) -> Sequence[Tensor]:
        dmass, dlse, q, k, v, positions, call, out, mass, lse, out_lse, wanted = arguments
        of_rows = (dmass, dlse, q, k, positions, call, mass, lse, wanted)
        if do is None:
            dq, dk, dw, dsinks = rows_backward(*of_rows)
            return dq, dk, v.new_empty(0), dw, dsinks
        found = attend_backward(do, None, None, q, k, v, _without_mass(call), out, mass, out_lse, False)
        dq, dk, dv, dw, dsinks = found
        if dmass is not None or dlse is not None:
            _, _, dw, more = rows_backward(*of_rows, (dq, dk))
            dsinks = dsinks if call.sinks is None else dsinks + more
        return dq, dk, dv, dw, dsinks

    return forward, backward


def _without_mass(call: Call) -> Call:
    return call._replace(groups=None, weights=None, num_groups=0, whole=False)


_INPUTS, _VALUES, _POSITIONS = {"q": "Tensor", "k": "Tensor"}, {"v": "Tensor?"}, {"positions": "Tensor"}
_RESULTS, _GRADIENTS = ("out", "mass", "lse"), ("q", "k", "v", "weights", "sinks")
_ROWS = Operator("row_mass", _INPUTS | _POSITIONS, ("mass", "lse"), ("q", "k", "weights", "sinks"), _row_kernels)
_FUSED = Operator("mass_attention", _INPUTS | _VALUES, _RESULTS, _GRADIENTS, _fused_kernels)
_BESIDE = Operator(
    "row_mass_attention", _INPUTS | {"v": "Tensor"} | _POSITIONS, _RESULTS, _GRADIENTS, _beside_kernels, ("out_lse",)
)


def _run(device: torch.device, kernel: _Kernel, *arguments: Any) -> tuple[Tensor, ...]:
    """Run a kernel with its tensors' device current, where Triton launches, and without autocast, which may choose the
    dtypes of what goes in, not of what is inside."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        return tuple(kernel(*arguments))


def _define(operator: Operator) -> tuple[Any, Any]:
    """Register the operator and its backward operator; return both."""
    name, inputs = operator.name, tuple(operator.inputs)
    names = (*inputs, *TENSORS, "integers", "floats", "backend")
    count, results, every = len(inputs), len(operator.results), (*operator.results, *operator.kept)
    total = len(every)
    heads = ", ".join(f"{kind} {argument}" for argument, kind in operator.inputs.items())
    incoming = ", ".join(f"Tensor? d{result}" for result in operator.results)
    outputs = ", ".join(f"Tensor {result}" for result in every)
    tensors = ", ".join(["Tensor"] * total)
    gradients = ", ".join(["Tensor"] * len(operator.gradients))
    _LIBRARY.define(f"{name}({heads}, {SCHEMA}, str backend) -> ({tensors})")
    _LIBRARY.define(
        f"{name}_backward({incoming}, {heads}, {SCHEMA}, str backend, {outputs}, bool weights_wanted) -> ({gradients})"
    )
    op, backward_op = (getattr(torch.ops.abft, x).default for x in (name, f"{name}_backward"))

    def split(arguments: Sequence[Any]) -> tuple[Sequence[Any], Call, str]:
        return arguments[:count], unpack(arguments[count : count + PACKED_ARGUMENTS]), arguments[-1]

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, call, backend = split(arguments)
        return _run(tensors[0].device, operator.kernels(backend)[0], *tensors, call)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *rest, wanted = arguments
        grads, rest, saved = rest[:results], rest[results:-total], rest[-total:]
        tensors, call, backend = split(rest)
        return _run(tensors[0].device, operator.kernels(backend)[1], *grads, *tensors, call, *saved, wanted)

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, call, _ = split(arguments)
        made = _fake_results(dict(zip(inputs, tensors, strict=True)), call)
        return tuple(made[result] for result in every)

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        grads = dict(zip(operator.results, arguments[:results], strict=True))
        tensors, call, backend = split(arguments[results : -total - 1])
        given = dict(zip(inputs, tensors, strict=True))
        made = _fake_gradients(given, call, grads, arguments[-1], _like(backend))
        return tuple(made[argument] for argument in operator.gradients)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(names)
        saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
        given = dict(zip(names, saved, strict=False))
        needed = dict(zip(names, ctx.needs_input_grad, strict=True))
        of = dict(zip(operator.results, grads, strict=False))
        if given.get("v") is None:
            of.pop("out", None)
        wanted = needed["weights"] and of["mass"] is not None
        found = backward_op(
            *(of.get(result) for result in operator.results), *saved[:-total], *ctx.plain, *saved[-total:], wanted
        )
        made = dict(zip(operator.gradients, found, strict=True))
        if not wanted:
            del made["weights"]
        if of.get("out") is None:
            made.pop("v", None)
        return tuple(
            made[argument].to(given[argument].dtype) if argument in made and needed[argument] else None
            for argument in names
        )

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            ctx.plain = arguments[-3:]
            ctx.save_for_backward(*arguments[:-3], *output)
            ctx.mark_non_differentiable(*output[results:])
            ctx.set_materialize_grads(False)
            return output

        backward = staticmethod(differentiate)

    def autograd(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:-3]):
            return Function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    for registered, kernel, shapes in ((op, forward, fake), (backward_op, backward, fake_backward)):
        _LIBRARY.impl(registered, kernel, "CompositeExplicitAutograd")
        library.register_fake(registered, shapes, lib=_LIBRARY)
    # In place of `register_autograd`, which fills in the defaults of the schema in every call, slowly.
    _LIBRARY.impl(op, autograd, "Autograd")
    return op, backward_op


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fake_results(inputs: dict[str, Any], call: Call) -> dict[str, Tensor]:
    q, v = inputs["q"], inputs.get("v")
    batch, heads, n_q, _ = q.shape
    sequences, rows = inputs["positions"].shape if "positions" in inputs else (batch, n_q)
    return {
        "out": q.new_empty((batch, n_q, heads, 0 if v is None else v.shape[3])).transpose(1, 2),
        "mass": q.new_empty((sequences, heads, rows, call.num_groups), dtype=_accumulated(q)),
        "lse": q.new_empty((sequences, heads, rows), dtype=_accumulated(q)),
        "out_lse": q.new_empty((batch, heads, n_q), dtype=_accumulated(q)),
    }


def _like(backend: str) -> Callable[[Tensor], Tensor]:
    """Return what makes a gradient's memory: in the layout of its tensor, or contiguous in plain PyTorch."""
    return torch.empty_like if backend == "triton" else lambda x: x.new_empty(x.shape)


def _fake_gradients(
    inputs: dict[str, Any],
    call: Call,
    incoming: dict[str, Tensor | None],
    weights_wanted: bool,
    like: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    q, k, v = inputs["q"], inputs["k"], inputs.get("v")
    weighted = weights_wanted and call.weights is not None and incoming["mass"] is not None
    dtype = _accumulated(q)
    return {
        "q": like(q),
        "k": like(k),
        "v": like(v) if v is not None and incoming["out"] is not None else q.new_empty(0),
        "weights": q.new_empty(call.weights.shape if weighted and call.weights is not None else 0, dtype=dtype),
        "sinks": q.new_empty(0 if call.sinks is None else call.sinks.shape, dtype=dtype),
    }


row_mass_op, row_mass_backward_op = _define(_ROWS)
mass_attention_op, mass_attention_backward_op = _define(_FUSED)
row_mass_attention_op, row_mass_attention_backward_op = _define(_BESIDE)


def row_mass(q: Tensor, k: Tensor, positions: Tensor, call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Return mass `(S, H, R, G)` and LSE `(S, H, R)` of R query rows at `positions` `(S, R)`; negative: absent."""
    return row_mass_op(q, k, positions, *pack(call), backend)


def row_mass_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, call: Call, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `(B, H, N_q, D_v)` of all queries, and mass and LSE of the rows at `positions` `(S, R)`."""
    return row_mass_attention_op(q, k, v, positions, *pack(call), backend)[:3]


def mass_attention(q: Tensor, k: Tensor, v: Tensor | None, call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return output `(B, H, N_q, D_v)` (empty without v), mass `(B, H, N_q, G)` and LSE `(B, H, N_q)`."""
    return mass_attention_op(q, k, v, *pack(call), backend)
