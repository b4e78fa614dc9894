"""What the kernel tests share: cases told by their ids, inputs, and the error criterion.

A case is its id: `B2-H4:2-N111x63-D60-G2-bf16-causal-left-bnhd-oml` has 4 query heads over 2 KV heads, 111 queries on
63 keys, left padding, inputs in flash-attn's (B, N, H, D) layout, and incoming gradients of out, mass and lse.

The criterion: our error is at most twice that of plain PyTorch in the same precision. Both are taken against the
oracle in float64 on the same rounded inputs, as the largest absolute and as the relative Frobenius error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abft_kernels import mass_attention, mass_attention_reference, row_mass

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_PADDING = ("left", "right", "empty")
_LAYOUTS = ("bnhd", "sliced", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    """One set of shapes and features; `Case.parse` reads an id."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    n_q: int = 1
    n_k: int = 1
    rows: int = 0  # of the row op; 0 for the fused op
    head_dim: int = 16
    groups: int = 2
    dtype: str = "fp32"
    causal: bool = True
    padding: str | None = None  # "empty": right padding with a sample of no token
    layout: str = "bhnd"
    scale: float | None = None
    grads: str = "oml"  # of out, mass, lse; "O" is an expanded gradient (stride 0)

    @classmethod
    def parse(cls, text: str) -> Case:
        values: dict[str, Any] = {}
        for part in text.split("-"):
            if found := re.fullmatch(r"H(\d+)(?::(\d+))?", part):
                values["heads"], values["kv_heads"] = int(found[1]), int(found[2] or found[1])
            elif found := re.fullmatch(r"N(\d+)(?:x(\d+))?", part):
                values["n_q"], values["n_k"] = int(found[1]), int(found[2] or found[1])
            elif found := re.fullmatch(r"([BRDG])(\d+)", part):
                name = {"B": "batch", "R": "rows", "D": "head_dim", "G": "groups"}[found[1]]
                values[name] = int(found[2])
            elif found := re.fullmatch(r"s(\d+\.\d+)", part):
                values["scale"] = float(found[1])
            elif part in DTYPES:
                values["dtype"] = part
            elif part in ("causal", "full"):
                values["causal"] = part == "causal"
            elif part in _PADDING:
                values["padding"] = part
            elif part in _LAYOUTS:
                values["layout"] = part
            elif re.fullmatch(r"[oOml]+", part):
                values["grads"] = part
            else:
                raise ValueError(f"{part!r} in {text!r} says nothing")
        return cls(**values)


@dataclass
class Inputs:
    """Tensors of one case, and the arguments of the op that are no tensors of heads."""

    heads: dict[str, Tensor]  # q, k and v, in the case's dtype and layout
    groups: Tensor
    arguments: dict[str, Any]
    grads: dict[str, Tensor]


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # part of a wider head dimension, at an odd offset
        wide = torch.full((*x.shape[:3], x.shape[3] + 9), float("nan"), dtype=x.dtype, device=x.device)
        wide[..., 5:-4] = x
        return wide[..., 5:-4]
    if layout == "strided":  # the last stride is 2
        wide = torch.full((*x.shape[:3], x.shape[3], 2), float("nan"), dtype=x.dtype, device=x.device)
        wide[..., 1] = x
        return wide[..., 1]
    if layout == "expanded":  # one head for all
        return x[:, :1].contiguous().expand(x.shape)
    return x.contiguous()


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, as_dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    b, h, d = case.batch, case.heads, case.head_dim
    rows = case.rows or case.n_q
    heads = {"q": normal(b, h, rows, d), "k": normal(b, case.kv_heads, case.n_k, d)}
    if not case.rows:
        heads["v"] = normal(b, case.kv_heads, case.n_k, d)
    heads = {name: arrange(x, case.layout) for name, x in heads.items()}
    arguments: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    if case.padding:
        lengths = integers(max(1, case.n_k // 3), case.n_k + 1, b)
        lengths[0] = 0 if case.padding == "empty" else max(1, case.n_k // 2)
        arguments["seq_lens"] = lengths
        if case.padding == "left":
            arguments["seq_starts"] = case.n_k - lengths
    if case.rows:
        positions = integers(-1, case.n_k, b, rows)
        positions[:, -1] = case.n_k - 1
        if rows > 3:
            positions[:, 0], positions[:, 1] = -1, positions[:, 2]  # absent, and one row twice
        arguments["row_positions"] = positions
    wide = torch.promote_types(dtype, torch.float32)
    grads = {}
    if "o" in case.grads and not case.rows:
        grads["out"] = normal(b, h, rows, d)
    if "O" in case.grads and not case.rows:
        grads["out"] = normal(b, 1, 1, 1).expand(b, h, rows, d)
    if "m" in case.grads:
        grads["mass"] = normal(b, h, rows, case.groups, as_dtype=wide)
    if "l" in case.grads:
        grads["lse"] = normal(b, h, rows, as_dtype=wide)
    # Labels in clusters, so that some blocks of keys have none.
    groups = integers(-1, case.groups, b, case.n_k)
    groups[:, case.n_k // 4 : case.n_k // 2] = -1
    return Inputs(heads, groups, arguments, grads)


def run(case: Case, inputs: Inputs, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Results and gradients by name, of the op run in `dtype`."""
    heads = {}
    for name, x in inputs.heads.items():
        # Of the same strides, unless the dtype changes: `clone` keeps them, `arrange` made them.
        leaf = x.detach() if dtype is None else x.detach().to(dtype)
        heads[name] = leaf.requires_grad_()
    arguments = {"return_lse": True, **inputs.arguments}
    if backend == "sdpa":
        results = _sdpa_with_mass(*heads.values(), inputs.groups, case.groups, **arguments)
    else:
        op = row_mass if case.rows else mass_attention
        results = op(*heads.values(), inputs.groups, case.groups, backend=backend, **arguments)
    outputs = dict(zip(("mass", "lse") if case.rows else ("out", "mass", "lse"), results, strict=True))
    chosen = [outputs[name] for name in inputs.grads]
    incoming = [g.to(outputs[name].dtype) for name, g in inputs.grads.items()]
    gradients = torch.autograd.grad(chosen, list(heads.values()), incoming, allow_unused=True)
    for x in heads.values():
        x.requires_grad_(False)
    return {
        **{name: x.detach() for name, x in outputs.items()},
        **{f"d{name}": g for name, g in zip(heads, gradients, strict=True)},
    }


def _sdpa_with_mass(q, k, v, groups, num_groups, *, causal, seq_lens=None, seq_starts=None, scale=None, **arguments):
    """PyTorch's own attention under an explicit mask, and the oracle's mass: what the torch backend may be as far
    off as, for the part that is PyTorch's."""
    bounds = {"seq_lens": seq_lens, "seq_starts": seq_starts}
    _, mass, lse = mass_attention_reference(
        q, k, v, groups, num_groups, causal=causal, scale=scale, **bounds, **arguments
    )
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    keys = torch.arange(k.shape[2], device=q.device)
    visible = (lse.detach() > float("-inf"))[:, :1, :, None]
    if causal:
        visible = visible & (keys <= rows)
    if seq_lens is not None:
        starts = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
        visible = visible & (keys >= starts[:, None, None, None])
        visible = visible & (keys < (starts + seq_lens)[:, None, None, None])
    absent = ~visible.any(-1, keepdim=True)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | absent, scale=scale)
    return out.masked_fill(absent, 0), mass, lse


def natural_size(case: Case, inputs: Inputs) -> float:
    """Size of the terms of a gradient before they cancel: what rounding is relative to where the gradient is 0."""
    largest = {name: x.double().abs().amax().item() for name, x in inputs.heads.items()}
    incoming = {name: g.double().abs().amax().item() for name, g in inputs.grads.items()}
    score = incoming.get("out", 0.0) * largest.get("v", 0.0) * case.head_dim + incoming.get("mass", 0.0)
    scale = case.scale or case.head_dim**-0.5
    return (score + incoming.get("lse", 0.0)) * scale * max(largest["q"], largest["k"])


def assert_close(name: str, ours: Tensor, base: Tensor, oracle: Tensor, natural: float, extra: float = 0.0) -> None:
    """The criterion of the module's docstring, plus eight float32 roundings of the largest value: a float32 result is
    a long sum that PyTorch happens to get nearly right now and then. `extra`: eps of one more rounding, half a unit in
    the last place at the most, 0.29 on average.
    """
    assert ours.shape == oracle.shape, name
    hidden = oracle.isinf()
    assert torch.equal(ours.isinf(), hidden), f"{name}: infinite in other places than the oracle"
    assert not ours.isnan().any(), f"{name} holds NaN"
    ours, base, oracle = (x.double().masked_fill(hidden, 0) for x in (ours, base, oracle))
    eps = torch.finfo(torch.float32).eps * 8
    largest = oracle.abs().amax().item() if oracle.numel() else 0.0
    if largest < 1e-6 * natural:  # cancels to nothing: rounding is relative to the terms
        floor, norm = eps * natural, natural * max(1, oracle.numel()) ** 0.5
    else:
        floor, norm = eps * largest, oracle.norm().item()
    error, allowed = (ours - oracle).abs(), (base - oracle).abs()
    if not error.numel():
        return
    assert error.amax() <= 2 * allowed.amax() + floor + extra / 2 * largest, (
        f"{name}: largest error {error.amax():.3g}, PyTorch's {allowed.amax():.3g}, largest value {largest:.3g}"
    )
    assert error.norm() <= 2 * allowed.norm() + (eps + 0.29 * extra) * norm, (
        f"{name}: error norm {error.norm() / norm:.3g}, PyTorch's {allowed.norm() / norm:.3g} of the oracle's"
    )


def _distance(x: Tensor, oracle: Tensor) -> float:
    difference = (x.double() - oracle).abs().nan_to_num(0.0, 0.0, 0.0)
    return difference.amax().item() if difference.numel() else 0.0


def check(case: Case, device: torch.device, backend: str, seed: int = 0) -> None:
    """Every result and gradient of the case against the criterion."""
    inputs = make_inputs(case, device, seed)
    ours = run(case, inputs, backend)
    base = run(case, inputs, "reference", DTYPES[case.dtype])
    oracle = run(case, inputs, "reference", torch.float64)
    bases = [base]
    if backend == "torch" and not case.rows:
        bases.append(run(case, inputs, "sdpa", DTYPES[case.dtype]))
    natural = natural_size(case, inputs)
    for name, value in oracle.items():
        if value is None:
            assert ours[name] is None, f"{name}: nothing was asked for it"
        else:
            assert ours[name] is not None, f"{name} is missing"
            worst = max(bases, key=lambda base: _distance(base[name], value))
            # The torch backend adds the gradients of two ops, each rounded.
            summed = len(bases) > 1 and name in ("dq", "dk")
            extra = torch.finfo(DTYPES[case.dtype]).eps if summed else 0.0
            assert_close(name, ours[name], worst[name], value, natural, extra)
    expected = torch.promote_types(DTYPES[case.dtype], torch.float32)
    assert ours["mass"].dtype == ours["lse"].dtype == expected
    assert ours["dk"].dtype == DTYPES[case.dtype]
