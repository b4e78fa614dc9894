"""The rows suite: the mass of one row a sample, forward and backward, against the recomputation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import abft_kernels
from bench.gpu import competitors
from bench.gpu.setting import Row, Setting, groups_of, tried
from bench.gpu.timing import measure

__all__ = ["rows"]


def _inputs(setting: Setting, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q of one row, k, key groups and the row's position."""
    heads, kv_heads, head_dim = (4, 2, 16) if setting.tiny else (40, 8, 128)
    batch = 2 if setting.tiny else max(1, (1 << 17) // n)
    q, k = setting.random(batch, heads, 1, head_dim), setting.random(batch, kv_heads, n, head_dim)
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    graph.replay()
    torch.cuda.synchronize()
    return all(torch.equal(x, y) for x, y in zip(expected, captured, strict=True))


def _measured(setting: Setting, mass_of: Callable[..., Tensor], inputs: tuple[Tensor, ...], ours: bool) -> Row:
    q, k, groups, last = inputs
    extra = {"row_positions": last, "backend": "triton"} if ours else {}

    def mass() -> Tensor:
        return mass_of(q, k, groups, 2, **extra)

    def both() -> Any:
        result = mass()
        return torch.autograd.grad(result, [q, k], torch.ones_like(result))

    with torch.no_grad():
        forward = measure(mass, setting.device)
    key_bytes = k.numel() * k.element_size()
    row: Row = {
        "forward_ms": forward,
        "both_ms": measure(both, setting.device),
        "key_bytes": key_bytes,
        "forward_gb_per_s": key_bytes / forward["median"] / 1e6,
    }
    if ours:
        row["launches"] = _launches(both, setting.device)
        row["graph_equals_eager"] = _graph_equals_eager(both, setting.device)
    return row


def rows(setting: Setting) -> Iterator[Row]:
    """Yield a row for each length and way to the mass."""
    for n in [32] if setting.tiny else [1 << e for e in range(10, 18)]:
        inputs = _inputs(setting, n)
        about = {"n": n, "batch": inputs[0].shape[0], "heads": inputs[0].shape[1], "kv_heads": inputs[1].shape[1]}
        named = {"abft": lambda: abft_kernels.row_mass, **competitors.ROWS}
        for name, build in named.items():
            if setting.budget.left() < 20:
                yield {**about, "name": name, "reason": "out of time"}
                continue
            work = tried(lambda b=build, name=name, x=inputs: _measured(setting, b(), x, name == "abft"))
            yield {**about, "name": name, **work}
