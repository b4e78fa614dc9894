"""The suites of fused attention with masses: times, peak memory, and FlexAttention's two ways to a mass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import competitors
from bench.gpu.setting import Row, Setting, groups_of, inputs, shape, tried
from bench.gpu.timing import measure, peak_bytes

__all__ = ["attention_flops", "flex", "kernels", "memory"]


def attention_flops(batch: int, heads: int, n: int, head_dim: int) -> float:
    """Return the useful operations of a causal forward pass, 4·B·H·N²·D / 2; backward takes 2.5 times as many."""
    return 4.0 * batch * heads * n * n * head_dim / 2


def _timed(setting: Setting, attention: competitors.Attention, qkv: list[Tensor], groups: Tensor) -> Row:
    """Return milliseconds and TFLOP/s of useful operations, forward and backward."""
    batch, heads, n, head_dim = qkv[0].shape
    flops = attention_flops(batch, heads, n, head_dim)
    with torch.no_grad():
        forward = measure(lambda: attention(*qkv, groups, 2), setting.device)
    outputs = attention(*qkv, groups, 2)
    incoming = [torch.randn_like(x) for x in outputs]
    backward = measure(lambda: torch.autograd.grad(outputs, qkv, incoming, retain_graph=True), setting.device)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": flops / forward["median"] / 1e9,
        "backward_tflops": 2.5 * flops / backward["median"] / 1e9,
    }


def _lengths(setting: Setting, thin: bool = False) -> list[int]:
    if setting.tiny:
        return [32]
    return [1 << e for e in (range(10, 17, 2) if thin else range(9, 18))]


def _rows(setting: Setting, n: int, head_dim: int, grouped: bool, named: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for each attention in `named`."""
    qkv = inputs(setting, n, head_dim, grouped)
    batch, heads, kv_heads = shape(setting, n, grouped)
    about = {"n": n, "head_dim": head_dim, "batch": batch, "heads": heads, "kv_heads": kv_heads}
    for name, attention in named.items():
        groups = groups_of(qkv[0], dense=name.endswith("dense"))
        if setting.budget.left() < 20:
            yield {**about, "name": name, "reason": "out of time"}
            continue
        row = tried(lambda attention=attention, groups=groups: _timed(setting, attention, qkv, groups))
        yield {**about, "name": name, **row}


def kernels(setting: Setting) -> Iterator[Row]:
    """Yield times of the fused operator, with the mass on few keys, on all, and off; and of every other attention."""
    ours = {f"abft, {labels}": competitors.OURS["abft"] for labels in ("sparse", "dense")}
    ours["abft, no mass"] = competitors.OURS["abft, no mass"]
    for head_dim, grouped, thin in ((128, True, False), (64, True, True), (128, False, True), (64, False, True)):
        for n in _lengths(setting, thin):
            others = {name: f for name, (f, longest) in competitors.FUSED.items() if n <= longest}
            yield from _rows(setting, n, head_dim, grouped, {**ours, **others})


def flex(setting: Setting) -> Iterator[Row]:
    """Yield times of FlexAttention's two ways to a mass; the last suite, because each shape is compiled anew."""
    if setting.tiny:
        yield {"name": "FlexAttention", "reason": "compiled on a GPU only"}
        return
    compiled = competitors.Flex()
    named = {name: build(compiled) for name, build in competitors.FLEX.items()}
    for n in _lengths(setting, thin=True):
        yield from _rows(setting, n, 128, True, named)


def _memory_row(setting: Setting, attention: competitors.Attention, n: int) -> Row:
    """Return bytes beyond inputs, outputs and gradients, at the peak of a forward pass and of both passes."""
    qkv = [setting.random(1, heads, n, 16 if setting.tiny else 128) for heads in (10, 2, 2)]
    groups = groups_of(qkv[0], dense=False)

    def forward() -> tuple[Tensor, ...]:
        return attention(*qkv, groups, 2)

    def both() -> Any:
        outputs = forward()
        incoming = [torch.ones_like(x) for x in outputs]
        return outputs, incoming, torch.autograd.grad(outputs, qkv, incoming)

    forward(), both()  # compiles
    outputs = sum(x.numel() * x.element_size() for x in forward())
    gradients = sum(x.numel() * x.element_size() for x in qkv)
    alone, step = peak_bytes(forward, setting.device), peak_bytes(both, setting.device)
    return {
        "forward_bytes": None if alone is None else alone - outputs,
        "both_bytes": None if step is None else step - 2 * outputs - gradients,
    }


def memory(setting: Setting) -> Iterator[Row]:
    """Yield peak memory against the length, for one sample of 10 heads of 128 over 2 KV heads."""
    named = {"abft": competitors.OURS["abft"], **{n: competitors.FUSED[n][0] for n in ("SDPA flash", "eager")}}
    for n in [32] if setting.tiny else [1 << e for e in range(11, 18)]:
        for name, attention in named.items():
            if setting.budget.left() < 15 or (name == "eager" and n > 16384):
                yield {"n": n, "name": name, "reason": "out of time" if name != "eager" else "not tried: N × N"}
                continue
            yield {"n": n, "name": name, **tried(lambda attention=attention, n=n: _memory_row(setting, attention, n))}
