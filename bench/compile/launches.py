"""The kernels that an operator launches, recorded from the package's own host code on tensors without data.

This compiles what a user's call compiles: arguments, structs and options are those of the launch, and Triton's own
binder decides which of them are constants. A new field of a struct or a new kernel needs no line here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, below
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from abft_kernels.call import Call
from abft_kernels.masking import Reach
from abft_kernels.triton import backward, forward, launch, rows
from abft_kernels.triton.launch import GPU, TABLE, Entry, Launch, family_of
from abft_kernels.triton.structs import head_block

__all__ = ["FORMS", "KERNELS", "OPERATORS", "TARGETS", "Case", "Recorded", "gpu_target", "recorded"]

# Bytes of shared memory that one program may have: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; LDS by the CDNA 3, CDNA 4 and RDNA ISA guides.
TARGETS = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_103": 227 << 10, "sm_120": 99 << 10, "sm_121": 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10,
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What a call has beside the causal mask, left padding and every incoming gradient, as a padded batch in training has.
# "off": no mass; "lean": neither mass, mask nor padding; "ones": counts of 1, which Triton makes constants; "mass": no
# values; "narrow": head_dim 4 below the width of its tile. Of the row kernel, "one": one row; "final": one split of the
# keys; "many": several tiles of rows; else as many rows as fill one.
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "off": {"num_groups": 0},
    "lean": {"num_groups": 0, "causal": False, "starts": False, "ends": False},
    "ones": {},
    "one": {},
    "mass": {},
    "narrow": {},
    "final": {},
    "many": {},
    "noncausal": {"causal": False},
    "packed": {"packed": True},
    "gemma": {"reach": Reach(window=7), "softcap": 30.0},
    "oss": {"reach": Reach(window=7), "sinks": True},
    "chunk": {"reach": Reach(chunk=7)},
    "alibi": {"slopes": True},
    "weights": {"weights": True},
    "dropout": {"dropout_p": 0.1},
    "rows": {"row_mask": True},
    "sparse": {"sparse_labels": True},
    "packed sparse": {"sparse_labels": True, "packed": True},
    "atomic": {"deterministic": False},
}
OPERATORS = ("fused", "rows", "decode")
# The kernels of the launch table: the operator that launches each.
KERNELS = {
    "forward": ("fused", ("_mass_attn_fwd_kernel",)),
    "backward_kv": ("fused", ("_mass_attn_bwd_kv_kernel",)),
    "backward_q": ("fused", ("_mass_attn_bwd_q_kernel",)),
    "backward_atomic": ("fused", ("_mass_attn_bwd_kv_kernel",)),
    "rows": ("rows", ("_row_mass_fwd_kernel", "_row_mass_bwd_kernel")),
    "decode": ("decode", ("_row_mass_fwd_kernel",)),
}
_SPLITS_OF = 132  # multiprocessors: by them the row kernel splits the keys


class Recorded(NamedTuple):
    """One launch: the kernel with its arguments, and the options of the compiler."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def launch(self) -> list[int]:
        """Return rows and keys of a tile, warps and stages."""
        of = self.arguments[-1]
        return [of.block_m, of.block_n, self.options["num_warps"], self.options["num_stages"]]

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """Return the source as Triton specialises it for these arguments, and all options."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.arguments, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__


def gpu_target(name: str) -> GPUTarget:
    """Return Triton's target for an architecture such as "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


@contextmanager
def _launching(target: str, element_size: int, table: str, chosen: Launch | None) -> Iterator[None]:
    """Choose launches as on `target`; `chosen` is that of the kernel `table`, and of others that have no entry."""
    family = family_of(target)
    assert family is not None
    changed = {}
    if chosen is not None:
        everything = [Entry(1 << 20, 16, chosen, 0)]
        for key in {(kernel, element_size, family) for kernel, _, _ in TABLE}:
            changed[key] = everything if key[0] == table else [*TABLE.get(key, []), *everything]
    with ExitStack() as stack:
        gpu = GPU(target, family, TARGETS[target])
        stack.enter_context(mock.patch.object(launch, "gpu_of", return_value=gpu))
        stack.enter_context(mock.patch.object(rows, "_multiprocessors", return_value=_SPLITS_OF))
        stack.enter_context(mock.patch.dict(TABLE, changed))
        yield


def recorded(
    operator: str,
    target: str,
    *,
    dtype: str = "bf16",
    head_dim: int = 64,
    groups: int = 2,
    form: str = "full",
    launch_of: tuple[str, Launch | None] = ("", None),
) -> list[Recorded]:
    """Return every launch of an operator, forward and backward; `launch_of` replaces the launch of one kernel.

    Raises:
        NotImplementedError: no launch of the table serves the call on `target`.
    """
    found: list[Recorded] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Recorded(kernel, arguments, options))

    with _launching(target, DTYPES[dtype].itemsize, *launch_of), mock.patch.object(JITFunction, "run", record):
        made = _Arguments(operator, dtype, head_dim, groups, form)
        {"fused": _fused, "rows": _rows, "decode": _decode}[operator](made)
    return found


class Case(NamedTuple):
    """One compilation: a kernel among the launches of an operator."""

    operator: str
    kernel: str
    target: str
    dtype: str
    head_dim: int
    groups: int
    form: str = "full"
    table: str = ""  # whose launch `launch` replaces
    launch: Launch | None = None
    nth: int = 0  # among the operator's launches of this kernel

    def launches(self) -> list[Recorded]:
        """Return all launches of the operator."""
        return recorded(
            self.operator,
            self.target,
            dtype=self.dtype,
            head_dim=self.head_dim,
            groups=self.groups,
            form=self.form,
            launch_of=(self.table, self.launch),
        )


class _Arguments:
    """The tensors and the call of one form."""

    def __init__(self, operator: str, dtype: str, head_dim: int, groups: int, form: str):
        fields = dict(FORMS[form])
        kind, float32 = DTYPES[dtype], torch.float32
        heads, kv_heads = (1, 1) if form == "ones" else (12, 3)
        packed = fields.get("packed", False)
        batch = 1 if packed or form == "ones" else 2
        sequences = 4 if packed else batch
        self.n_k = 16 if form == "final" else 4096
        groups = max(groups, 1) if operator == "rows" else fields.get("num_groups", groups)
        fields.pop("num_groups", None)
        width = head_dim - 4 * (form == "narrow")
        n_q = self.n_k if operator == "fused" else _few_rows(operator, form, heads // kv_heads, (width, kind, groups))

        def tensor(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        of_rows = sequences if operator == "rows" else batch
        # As models make them: (B, N, H, D), transposed.
        self.q = tensor(of_rows, n_q, heads, width).transpose(1, 2)
        self.k, values = (tensor(batch, self.n_k, kv_heads, width).transpose(1, 2) for _ in range(2))
        self.v = None if form == "mass" or operator == "rows" else values
        self.do = None if self.v is None else tensor(*self.q.shape[:3], width)
        self.weights_wanted = bool(fields.pop("weights", False)) and groups > 0
        self.dmass = tensor(*self.q.shape[:3], groups, dtype=float32) if groups else None
        self.dlse = None if form == "lean" else tensor(*self.q.shape[:3], dtype=float32)
        self.positions = tensor(of_rows, n_q, dtype=torch.int32)
        made: dict[str, Any] = {"num_groups": groups, "scale": 0.125}
        if self.weights_wanted:
            made["weights"] = tensor(batch, self.n_k, groups, dtype=float32)
        elif groups:
            made["groups"] = tensor(batch, self.n_k, dtype=torch.int8)
        tensors = {
            "starts": (True, (sequences,), torch.int32),
            "ends": (True, (sequences,), torch.int32),
            "sinks": (False, (heads,), kind),
            "slopes": (False, (batch, heads), float32),
            "row_mask": (False, (batch, n_q), torch.uint8),
        }
        for field, (default, shape, of_dtype) in tensors.items():
            if fields.pop(field, default):
                made[field] = tensor(*shape, dtype=of_dtype)
        self.call = Call(**made, **fields)


def _few_rows(operator: str, form: str, group_size: int, of_table: tuple[int, torch.dtype, int]) -> int:
    """Return the rows of a call of the row kernel: as many as fill one tile of its launch, or one row."""
    if form == "many":
        return 64
    if form in ("one", "ones"):
        return 1
    width, dtype, groups = of_table
    kernel = "rows" if operator == "rows" else "decode"
    block = launch.launch_config(kernel, head_block(width), dtype.itemsize, groups, torch.device("meta")).block_m
    return max(1, block // group_size)


def _fused(made: _Arguments) -> None:
    out, mass, lse = forward.forward(made.q, made.k, made.v, made.call)
    gradients = (made.do, made.dmass, made.dlse)
    backward.backward(*gradients, made.q, made.k, made.v, made.call, out, mass, lse, made.weights_wanted)


def _rows(made: _Arguments) -> None:
    inputs = (made.q, made.k, made.positions, made.call)
    mass, lse = rows.forward(*inputs)
    rows.backward(made.dmass, made.dlse, *inputs, mass, lse, made.weights_wanted)


def _decode(made: _Arguments) -> None:
    forward.forward(made.q, made.k, made.v, made.call)
