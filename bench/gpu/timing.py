"""Times of one call, on the device and on the host, and its peak memory: for every GPU figure."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["captured", "measure", "on_own_stream", "peak_bytes", "relative_error"]

_FLUSH_BYTES = 1 << 28  # more than the L2 cache of any card
_FLUSH_MS = 0.1


def _spread(times: list[float]) -> dict[str, float]:
    """Return the median, and the 20th and 80th percentile as `low` and `high`."""
    if len(times) < 5:
        return {"median": statistics.median(times), "low": min(times), "high": max(times)}
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "low": fifths[0], "high": fifths[3]}


@contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a stream of its own: the default one cannot be captured, nor a backward pass of its forward."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(function: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """Return a CUDA graph of one call on the current stream, and the call's result, which a replay fills.

    Raises:
        RuntimeError: the call synchronises, or the stream is the default one.
    """
    stream = torch.cuda.current_stream(device)
    if stream == torch.cuda.default_stream(device):
        raise RuntimeError("the default stream cannot be captured")
    # A capture that fails leaves allocator and generators in doubt: a synchronising call is found before.
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # a collected Triton kernel unloads its module, which ends the capture
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = function()
    finally:
        if collects:
            gc.enable()
    return graph, result


def _device_times(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Return the milliseconds of each of at least five runs between CUDA events, the L2 cache flushed before each."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def batch(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in events]

    estimate = batch(2)[1] + _FLUSH_MS
    return batch(max(5, min(500, int(1000 * seconds / estimate))))


def _host_times(function: Callable[[], Any], device: torch.device, once: float) -> list[float]:
    """Return three times the milliseconds that the host takes to launch one call, the device not waited for.

    `once` is the seconds of a call with its wait: few long calls, so that the queue of launches does not fill.
    """
    count, times = max(1, min(10, int(0.02 / once))), []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            function()
        times.append(1000 * (time.perf_counter() - start) / count)
    torch.cuda.synchronize(device)
    return times


def measure(function: Callable[[], Any], device: torch.device, seconds: float = 0.1) -> dict[str, Any]:
    """Return milliseconds of one call: median, and the 20th and 80th percentile as `low` and `high`.

    `clock` says how they were taken, for about `seconds` and at least five times, the L2 cache flushed before each:

        graph     replays of a CUDA graph of the call, between CUDA events: the device alone
        events    calls between CUDA events, where the call cannot be captured (`clock_reason`)
        wall      calls by the wall clock, three on a CPU: enough to see that the code runs

    `host_ms` is the time of the host to launch the call, with its spread. The first call is in no figure: it compiles.
    """
    function()
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
        return {**_spread(times), "clock": "wall", "host_ms": _spread(times)}
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    host = _host_times(function, device, time.perf_counter() - start)
    run, clock = function, {"clock": "graph"}
    try:
        graph, _ = captured(function, device)
        run = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        clock = {"clock": "events", "clock_reason": str(error).splitlines()[0][:200] if str(error) else "RuntimeError"}
    return {**_spread(_device_times(run, device, seconds)), **clock, "host_ms": _spread(host)}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that one call allocates at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """Return ‖ours − oracle‖ / ‖oracle‖ in float64."""
    return ((ours.double() - oracle.double()).norm() / oracle.double().norm().clamp(min=1e-300)).item()
