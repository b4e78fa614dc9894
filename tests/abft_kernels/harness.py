"""What the kernel tests share: the inputs of a case, and the error criterion.

The criterion: our error is at most twice that of plain PyTorch in the same precision. Both are taken against the
oracle in float64 on the same rounded inputs, as the largest absolute and as the relative Frobenius error.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, Case
from torch import Tensor

from abft_kernels import mass_attention, mass_attention_reference, row_mass

DRAWS = (1, 8, 64)


@dataclass
class Inputs:
    """Tensors of one case, and the arguments of the op that are no tensors of heads."""

    heads: dict[str, Tensor]  # q, k and v, in the case's dtype and layout
    groups: Tensor
    arguments: dict[str, Any]
    grads: dict[str, Tensor]
    extras: dict[str, Tensor]  # sinks and weights: differentiable too


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
    of_keys = 1 if case.has("packed") else b
    of_rows = b if case.rows else of_keys
    values = not case.rows and not case.has("alone")
    heads = {"q": normal(of_rows, h, rows, d), "k": normal(of_keys, case.kv_heads, case.n_k, d)}
    if values:
        heads["v"] = normal(of_keys, case.kv_heads, case.n_k, case.value_dim or d)
    heads = {name: arrange(x, case.layout) for name, x in heads.items()}
    arguments: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    first, total = 0, case.n_k  # of the keys here, and of all
    if case.has("shard"):
        first, total = 40, 40 + case.n_k + 30
        arguments["key_offset"] = first
        if not case.rows:
            arguments["query_offset"] = max(0, first + case.n_k // 2 - case.n_q // 2)
    if case.padding:
        lengths = integers(max(1, total // 3), total + 1, b)
        lengths[0] = 0 if case.padding == "empty" else max(1, total // 2)
        arguments["seq_lens"] = lengths
        if case.padding == "left":
            arguments["seq_starts"] = total - lengths
    cuts = torch.zeros(0)
    if case.has("packed"):  # the last sequence ends a token early, and of three one is empty
        cuts = integers(0, case.n_k, b + 1).sort().values
        cuts[0], cuts[-1] = 0, max(0, case.n_k - 1)
        if b > 2:
            cuts[1] = cuts[2]
        arguments["cu_seqlens"] = cuts
    if case.rows:
        positions = integers(-1, total, b, rows)
        positions[:, -1] = total - 1
        if case.has("packed"):
            lengths = cuts.diff()[:, None]
            positions = torch.where(lengths > 0, cuts[:-1, None] + positions % lengths.clamp(min=1), -1)
        if rows > 3:
            positions[:, 0], positions[:, 1] = -1, positions[:, 2]  # absent, and one row twice
        arguments["row_positions"] = positions
    wide = torch.promote_types(dtype, torch.float32)
    extras = {}
    arguments |= case.reach
    if case.softcap:
        arguments["softcap"] = case.softcap
    if case.has("sinks"):
        extras["sinks"] = normal(h)
    if case.has("alibi"):
        arguments["alibi_slopes"] = normal(h, as_dtype=wide).abs() / 8
    if case.has("drop"):
        arguments["dropout_p"], arguments["dropout_seed"] = 0.3, 1 << 40 | seed
    if case.has("wanted"):
        wanted = integers(0, 3, of_rows, rows) > 0
        wanted[:, rows // 4 : rows // 2] = False
        arguments["row_mask"] = wanted
    if case.has("sparse"):
        arguments["sparse_labels"] = True
    if case.has("weighted"):
        extras["weights"] = normal(of_keys, case.n_k, case.groups, as_dtype=wide)
    grads = {}
    if "o" in case.grads and values:
        grads["out"] = normal(of_rows, h, rows, case.value_dim or d)
    if "O" in case.grads and values:
        grads["out"] = normal(of_rows, 1, 1, 1).expand(of_rows, h, rows, case.value_dim or d)
    if "m" in case.grads:
        grads["mass"] = normal(of_rows, h, rows, case.groups, as_dtype=wide)
    if "l" in case.grads:
        grads["lse"] = normal(of_rows, h, rows, as_dtype=wide)
    # Labels in clusters, so that some blocks of keys have none.
    groups = integers(-1, case.groups, of_keys, case.n_k)
    groups[:, case.n_k // 4 : case.n_k // 2] = -1
    return Inputs(heads, groups, arguments, grads, extras)


def run(case: Case, inputs: Inputs, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Results and gradients by name, of the op run in `dtype`."""
    leaves = {}
    for name, x in {**inputs.heads, **inputs.extras}.items():
        # Of the same strides, unless the dtype changes: `clone` keeps them, `arrange` made them.
        leaf = x.detach() if dtype is None or (name == "weights" and dtype.itemsize < 4) else x.detach().to(dtype)
        leaves[name] = leaf.requires_grad_()
    heads = [leaves[name] for name in inputs.heads]
    arguments = {"return_lse": True, **inputs.arguments}
    if "sinks" in leaves:
        arguments["sinks"] = leaves["sinks"]
    labels = leaves.get("weights", inputs.groups)
    without_values = bool(case.rows) or case.has("alone")
    if backend == "sdpa":
        results = _sdpa_with_mass(*heads, labels, case.groups, **arguments)
    else:
        op = row_mass if without_values else mass_attention
        results = op(*heads, labels, case.groups, backend=backend, **arguments)
    outputs = dict(zip(("mass", "lse") if without_values else ("out", "mass", "lse"), results, strict=True))
    chosen = [outputs[name] for name in inputs.grads]
    incoming = [g.to(outputs[name].dtype) for name, g in inputs.grads.items()]
    gradients = torch.autograd.grad(chosen, list(leaves.values()), incoming, allow_unused=True)
    for x in leaves.values():
        x.requires_grad_(False)
    return {
        **{name: x.detach() for name, x in outputs.items()},
        **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


def _sdpa_with_mass(
    q, k, v, groups, num_groups, *, causal, seq_lens=None, seq_starts=None, cu_seqlens=None, scale=None, **arguments
):
    """PyTorch's own attention under an explicit mask, and the oracle's mass: what the torch backend may be as far
    off as, for the part that is PyTorch's."""
    bounds = {"seq_lens": seq_lens, "seq_starts": seq_starts, "cu_seqlens": cu_seqlens}
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
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, keys, right=True)
        visible = visible & (sequence[:, None] == sequence)
    absent = ~visible.any(-1, keepdim=True)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | absent, scale=scale)
    return out.masked_fill(absent, 0), mass, lse


def natural_size(case: Case, inputs: Inputs) -> float:
    """Size of the terms of a gradient before they cancel: what rounding is relative to where the gradient is 0."""
    largest = {name: x.double().abs().amax().item() for name, x in {**inputs.heads, **inputs.extras}.items()}
    incoming = {name: g.double().abs().amax().item() for name, g in inputs.grads.items()}
    score = incoming.get("out", 0.0) * largest.get("v", 0.0) * case.head_dim + incoming.get("mass", 0.0)
    score *= max(1.0, largest.get("weights", 0.0))
    scale = abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    return (score + incoming.get("lse", 0.0)) * scale * max(largest["q"], largest["k"])


@dataclass(frozen=True)
class Deviation:
    """How far one result is from the oracle, PyTorch's from it, and what is allowed besides; of one draw or more."""

    name: str
    draws: int
    error: float
    error_norm: float
    base: float
    base_norm: float
    largest: float
    norm: float
    floor: float
    norm_floor: float

    def __add__(self, other: Deviation) -> Deviation:
        most = {key: max(getattr(self, key), getattr(other, key)) for key in ("error", "base", "largest", "floor")}
        total = {
            key: math.hypot(getattr(self, key), getattr(other, key))
            for key in ("error_norm", "base_norm", "norm", "norm_floor")
        }
        return Deviation(self.name, self.draws + other.draws, **most, **total)

    @property
    def gross(self) -> bool:
        """Whether several draws exceed what is allowed so far that more cannot matter."""
        return self.draws > 1 and self.error > 8 * (2 * self.base + self.floor)

    @property
    def excess(self) -> str | None:
        """What violates the criterion."""
        draws = f" over {self.draws} draws" if self.draws > 1 else ""
        if not self.error <= 2 * self.base + self.floor:
            return (
                f"{self.name}: largest error {self.error:.3g}, PyTorch's {self.base:.3g}, "
                f"largest value {self.largest:.3g}{draws}"
            )
        if not self.error_norm <= 2 * self.base_norm + self.norm_floor:
            return (
                f"{self.name}: error norm {self.error_norm / self.norm:.3g}, "
                f"PyTorch's {self.base_norm / self.norm:.3g} of the oracle's{draws}"
            )
        return None


def deviation(name: str, ours: Tensor, base: Tensor, oracle: Tensor, natural: float, extra: float = 0.0) -> Deviation:
    """Allowed are twice PyTorch's error and eight float32 roundings of the largest value: a float32 result is a long
    sum that PyTorch happens to get nearly right now and then. `extra`: eps of one more rounding, half a unit in the
    last place at the most, 0.29 on average.
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
    errors = [(x - oracle).abs() for x in (ours, base)]
    (error, by_base), norms = (x.amax().item() if x.numel() else 0.0 for x in errors), [x.norm().item() for x in errors]
    return Deviation(
        name,
        1,
        error,
        norms[0],
        by_base,
        norms[1],
        largest,
        norm,
        floor + extra / 2 * largest,
        (eps + 0.29 * extra) * norm,
    )


def assert_close(name: str, ours: Tensor, base: Tensor, oracle: Tensor, natural: float) -> None:
    """The criterion of the module's docstring."""
    excess = deviation(name, ours, base, oracle, natural).excess
    assert excess is None, excess


def _distance(x: Tensor, oracle: Tensor) -> float:
    difference = (x.double() - oracle).abs().nan_to_num(0.0, 0.0, 0.0)
    return difference.amax().item() if difference.numel() else 0.0


def check(case: Case, device: torch.device, backend: str, seed: int = 0) -> None:
    """Every result and gradient of the case against the criterion.

    The largest of a handful of errors is a matter of luck. So what one draw of inputs seems to violate is judged on
    `DRAWS` of them together; an error that is no rounding stays the largest.
    """
    found: dict[str, Deviation] = {}
    for first, last in itertools.pairwise((0, *DRAWS)):
        for number in range(first, last):
            more = deviations(case, device, backend, seed + 1000 * number)
            found = {name: found[name] + one if name in found else one for name, one in more.items()}
        excesses = [one.excess for one in found.values() if one.excess]
        if not excesses:
            return
        if any(one.gross for one in found.values()):
            break
    raise AssertionError("; ".join(excesses))


def deviations(case: Case, device: torch.device, backend: str, seed: int) -> dict[str, Deviation]:
    """Those of every result and gradient, in one draw of inputs."""
    inputs = make_inputs(case, device, seed)
    ours = run(case, inputs, backend)
    base = run(case, inputs, "reference", DTYPES[case.dtype])
    oracle = run(case, inputs, "reference", torch.float64)
    bases = [base]
    if backend == "torch" and case.plain:
        bases.append(run(case, inputs, "sdpa", DTYPES[case.dtype]))
    natural = natural_size(case, inputs)
    found = {}
    for name, value in oracle.items():
        if value is None:
            assert ours[name] is None, f"{name}: nothing was asked for it"
        else:
            assert ours[name] is not None, f"{name} is missing"
            worst = max(bases, key=lambda base: _distance(base[name], value))
            # The torch backend adds the gradients of two ops, each rounded.
            summed = len(bases) > 1 and name in ("dq", "dk")
            extra = torch.finfo(DTYPES[case.dtype]).eps if summed else 0.0
            found[name] = deviation(name, ours[name], worst[name], value, natural, extra)
    expected = torch.promote_types(DTYPES[case.dtype], torch.float32)
    assert ours["mass"].dtype == ours["lse"].dtype == expected
    assert ours["dk"].dtype == DTYPES[case.dtype]
    for name, x in inputs.extras.items():
        assert ours[f"d{name}"] is None or ours[f"d{name}"].dtype == x.dtype
    return found
