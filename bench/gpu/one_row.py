"""The rows suite: the mass of one row a sample, forward and backward, against the recomputation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import abft_kernels
from bench.gpu import competitors
from bench.gpu.calls import Call, Warm, run_calls
from bench.gpu.setting import Row, Setting, groups_of
from bench.gpu.timing import captured, measure

__all__ = ["row_calls", "rows"]

_OURS = "abft"


def _sizes(setting: Setting, n: int) -> tuple[int, int, int, int]:
    """Return batch, heads, KV heads and head_dim: about 128k keys."""
    return (2, 4, 2, 16) if setting.tiny else (max(1, (1 << 17) // n), 40, 8, 128)


def _inputs(setting: Setting, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q of one row, k, key groups and the row's position."""
    batch, heads, kv_heads, head_dim = _sizes(setting, n)
    generator = setting.generator()
    q, k = (setting.random(generator, batch, h, length, head_dim) for h, length in ((heads, 1), (kv_heads, n)))
    last = torch.full((batch, 1), n - 1, dtype=torch.int32, device=setting.device)
    return q, k, groups_of(k, dense=False), last


def _launches(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return how many kernels, copies and fills one call puts on the GPU, without that of the incoming gradient."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        function()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) - 1  # ones_like


def _graph_equals_eager(function: Callable[[], Any], device: torch.device) -> bool | None:
    """Return True if the call can be captured in a CUDA graph whose replay gives the same bits."""
    if device.type != "cuda":
        return None
    expected = function()
    try:
        graph, results = captured(function, device)
    except RuntimeError:
        return False
    graph.replay()
    torch.cuda.synchronize()
    return all(torch.equal(x, y) for x, y in zip(expected, results, strict=True))


def _calls_of(setting: Setting, name: str, n: int) -> tuple[Callable[[], Tensor], Callable[[], Any], Tensor]:
    """Return the functions of the mass, and of the mass and its gradients; and the keys."""
    q, k, groups, last = _inputs(setting, n)
    ours = name == _OURS
    mass_of = abft_kernels.row_mass if ours else competitors.ROWS[name]()
    extra = {"row_positions": last, "backend": "triton"} if ours else {}

    def mass() -> Tensor:
        return mass_of(q, k, groups, 2, **extra)

    def both() -> Any:
        result = mass()
        return torch.autograd.grad(result, [q, k], torch.ones_like(result))

    return mass, both, k


def _compile(setting: Setting, name: str, n: int) -> None:
    mass, both, _ = _calls_of(setting, name, n)
    with torch.no_grad():
        mass()
    both()


def _measured(setting: Setting, name: str, n: int) -> Row:
    mass, both, k = _calls_of(setting, name, n)
    with torch.no_grad():
        forward = measure(mass, setting.device)
    key_bytes = k.numel() * k.element_size()
    row: Row = {
        "forward_ms": forward,
        "both_ms": measure(both, setting.device),
        "key_bytes": key_bytes,
        "forward_gb_per_s": key_bytes / forward["median"] / 1e6,
    }
    if name == _OURS:
        row["launches"] = _launches(both, setting.device)
        row["graph_equals_eager"] = _graph_equals_eager(both, setting.device)
    return row


def _warm(name: str, n: int) -> Warm | None:
    """Return the run that compiles a way to the mass; exact shapes, which decide how the keys are split."""
    run = partial(_compile, name=name, n=n)
    if name == _OURS:
        return Warm(("rows",), n, run, 15)
    return Warm(("compiled row", n), 0, run, 10) if name == competitors.COMPILED_ROW else None


def row_calls(setting: Setting) -> Iterator[Call]:
    """Yield a call for each length and way to the mass."""
    for n in [32] if setting.tiny else [1 << e for e in range(10, 18)]:
        batch, heads, kv_heads, _ = _sizes(setting, n)
        for name in (_OURS, *competitors.ROWS):
            yield Call(
                {"n": n, "batch": batch, "heads": heads, "kv_heads": kv_heads, "name": name},
                kind=name,
                work=batch * n,
                measured=partial(_measured, name=name, n=n),
                warm=_warm(name, n),
            )


def rows(setting: Setting) -> Iterator[Row]:
    """Yield times of every way to the mass of one row."""
    yield from run_calls(setting, row_calls(setting))
