"""The suites of fused attention with masses: times, peak memory, and FlexAttention's two ways to a mass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import competitors
from bench.gpu.calls import Call, Warm, run_calls
from bench.gpu.setting import Row, Setting, groups_of, inputs, shape
from bench.gpu.timing import measure, peak_bytes

__all__ = [
    "attention_flops",
    "flex",
    "flex_calls",
    "fused_warm",
    "kernel_calls",
    "kernels",
    "memory",
    "memory_calls",
]

# From here on a length changes no compiled kernel: its tiles and blocks are multiples of 16.
_LONGEST_WARM = 2048


def attention_flops(batch: int, heads: int, n: int, head_dim: int) -> float:
    """Return the useful operations of a causal forward pass, 4·B·H·N²·D / 2; backward takes 2.5 times as many."""
    return 4.0 * batch * heads * n * n * head_dim / 2


def _attention(name: str) -> competitors.Attention:
    return competitors.OURS[name] if name in competitors.OURS else competitors.FUSED[name][0]


def _timed(setting: Setting, attention: competitors.Attention, qkv: list[Tensor], groups: Tensor) -> Row:
    """Return milliseconds and TFLOP/s of useful operations, forward and backward."""
    batch, heads, n, head_dim = qkv[0].shape
    flops = attention_flops(batch, heads, n, head_dim)
    with torch.no_grad():
        forward = measure(lambda: attention(*qkv, groups, 2), setting.device)
    row = {"forward_ms": forward, "forward_tflops": flops / forward["median"] / 1e9}
    outputs = attention(*qkv, groups, 2)
    if not any(x.requires_grad for x in outputs):  # FlexAttention on a CPU
        return row
    generator = setting.generator(1)
    incoming = [torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in outputs]
    backward = measure(lambda: torch.autograd.grad(outputs, qkv, incoming, retain_graph=True), setting.device)
    return {**row, "backward_ms": backward, "backward_tflops": 2.5 * flops / backward["median"] / 1e9}


def _run(attention: competitors.Attention, qkv: list[Tensor], groups: Tensor) -> None:
    """Run forward without and with gradients, and backward, once each: what `_timed` runs."""
    with torch.no_grad():
        attention(*qkv, groups, 2)
    outputs = attention(*qkv, groups, 2)
    if any(x.requires_grad for x in outputs):
        torch.autograd.grad(outputs, qkv, [torch.ones_like(x) for x in outputs])


def _lengths(setting: Setting, thin: bool = False) -> list[int]:
    if setting.tiny:
        return [32]
    return [1 << e for e in (range(10, 17, 2) if thin else range(9, 18))]


def _compile_fused(setting: Setting, name: str, n: int, head_dim: int, grouped: bool) -> None:
    """Compile our kernels for a head_dim and a ratio of heads: few heads and one sample take the same ones."""
    sizes = shape(setting, n, grouped) if setting.tiny else (1, 10, 2 if grouped else 10)
    qkv = inputs(setting, sizes, n, head_dim)
    _run(_attention(name), qkv, groups_of(qkv[0], dense=False))


def fused_warm(name: str, n: int, head_dim: int, grouped: bool) -> Warm | None:
    """Return the run that compiles our kernels; None for attention that comes compiled."""
    if name not in competitors.OURS:
        return None
    name = name.replace("dense", "sparse")  # the same kernels
    short = min(n, _LONGEST_WARM)
    run = partial(_compile_fused, name=name, n=short, head_dim=head_dim, grouped=grouped)
    return Warm(("fused", name, head_dim, grouped), short, run, 25)


def _measure_fused(setting: Setting, name: str, n: int, head_dim: int, grouped: bool) -> Row:
    qkv = inputs(setting, shape(setting, n, grouped), n, head_dim)
    return _timed(setting, _attention(name), qkv, groups_of(qkv[0], dense=name.endswith("dense")))


def _call(setting: Setting, name: str, n: int, head_dim: int, grouped: bool, measured: Callable[..., Row]) -> Call:
    """Return the call of one attention at one shape; `measured` takes the setting, name, n, head_dim and grouped."""
    batch, heads, kv_heads = shape(setting, n, grouped)
    about = {"n": n, "head_dim": head_dim, "batch": batch, "heads": heads, "kv_heads": kv_heads, "name": name}
    return Call(
        about,
        kind=(name, head_dim, grouped),
        work=attention_flops(batch, heads, n, head_dim),
        measured=partial(measured, name=name, n=n, head_dim=head_dim, grouped=grouped),
        warm=fused_warm(name, n, head_dim, grouped),
        square_bytes=competitors.eager_bytes(batch, heads, n, 2) if name == competitors.EAGER else 0,
    )


def kernel_calls(setting: Setting) -> Iterator[Call]:
    """Yield the calls of the fused operator, mass on few keys, on all, and off; and of every other attention."""
    for head_dim, grouped, thin in ((128, True, False), (64, True, True), (128, False, True), (64, False, True)):
        for n in _lengths(setting, thin):
            others = [name for name, (_, longest) in competitors.FUSED.items() if n <= longest]
            for name in (*competitors.OURS, *others):
                yield _call(setting, name, n, head_dim, grouped, _measure_fused)


def kernels(setting: Setting) -> Iterator[Row]:
    """Yield times of every attention at every shape."""
    yield from run_calls(setting, kernel_calls(setting))


def _flex(setting: Setting, name: str, n: int) -> tuple[competitors.Attention, list[Tensor], Tensor]:
    """Return FlexAttention built for a length, its inputs and groups."""
    qkv = inputs(setting, shape(setting, n, True), n, 128)
    if setting.tiny:
        qkv = [x.detach() for x in qkv]
    groups = groups_of(qkv[0], dense=False)
    return competitors.FLEX[name](competitors.Flex(compiled=not setting.tiny), qkv[0], groups, 2), qkv, groups


def _compile_flex(setting: Setting, name: str, n: int) -> None:
    _run(*_flex(setting, name, n))


def _measure_flex(setting: Setting, name: str, n: int, head_dim: int, grouped: bool) -> Row:
    return _timed(setting, *_flex(setting, name, n))


def flex_calls(setting: Setting) -> Iterator[Call]:
    """Yield the calls of FlexAttention; every length is compiled anew."""
    for n in _lengths(setting, thin=True):
        for name in competitors.FLEX:
            warm = Warm(("flex", name, n), 0, partial(_compile_flex, name=name, n=n), 40)
            yield _call(setting, name, n, 128, True, _measure_flex)._replace(warm=warm)


def flex(setting: Setting) -> Iterator[Row]:
    """Yield times of FlexAttention's two ways to a mass."""
    yield from run_calls(setting, flex_calls(setting))


def _memory_row(setting: Setting, name: str, n: int) -> Row:
    """Return bytes beyond inputs, outputs and gradients, at the peak of a forward pass and of both passes."""
    qkv = inputs(setting, (1, 10, 2), n, 16 if setting.tiny else 128)
    attention, groups = _attention(name), groups_of(qkv[0], dense=False)

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


def memory_calls(setting: Setting) -> Iterator[Call]:
    """Yield the calls of the memory suite: one sample of 10 heads of 128 over 2 KV heads."""
    for n in [32] if setting.tiny else [1 << e for e in range(11, 18)]:
        for label, name in (("abft", "abft, sparse"), ("SDPA flash", "SDPA flash"), ("eager", competitors.EAGER)):
            yield Call(
                {"n": n, "name": label},
                kind=label,
                work=attention_flops(1, 10, n, 128),
                measured=partial(_memory_row, name=name, n=n),
                warm=None if setting.tiny else fused_warm(name, n, 128, True),
                square_bytes=competitors.eager_bytes(1, 10, n, 2) if name == competitors.EAGER else 0,
            )


def memory(setting: Setting) -> Iterator[Row]:
    """Yield peak memory against the length."""
    yield from run_calls(setting, memory_calls(setting))
