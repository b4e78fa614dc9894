"""Times, peak memory, ceilings and the state of the card, for every GPU figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Budget", "ceilings", "gpu_state", "measure", "peak_bytes", "relative_error"]


class Budget:
    """The seconds left of a run; a row that does not fit is skipped and says so."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def measure(function: Callable[[], Any], device: torch.device, seconds: float = 0.1) -> dict[str, float]:
    """Return milliseconds of one call: median, and the 20th and 80th percentile as `low` and `high`.

    On a GPU between CUDA events with the L2 cache flushed before each call (`triton.testing.do_bench`), for about
    `seconds`; at least five calls. On a CPU by the wall clock, three calls: enough to see that the code runs.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        once = time.perf_counter() - start
        rep = max(1000 * seconds, 5000 * min(once, 1.0))
        median, low, high = do_bench(function, warmup=min(25.0, rep), rep=rep, quantiles=[0.5, 0.2, 0.8])
        return {"median": float(median), "low": float(low), "high": float(high)}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


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


def ceilings(device: torch.device) -> dict[str, Any]:
    """Measure the ceilings of this card: a copy in device memory (bytes read and written), a bf16 matrix product."""
    large = device.type == "cuda"
    source = torch.empty((1 << 31) if large else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    size = 8192 if large else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = measure(lambda: a @ b, device)
    return {
        "copy_gb_per_s": 2 * source.numel() / copy["median"] / 1e6,
        "copy_ms": copy,
        "matmul_tflops": 2 * size**3 / product["median"] / 1e9,
        "matmul_ms": product,
        "matmul_size": size,
    }


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Return name, memory, multiprocessors, driver, and the clocks as they are read; nothing is set."""
    if device.type != "cuda":
        return {"name": None, "reason": "no CUDA GPU"}
    properties = torch.cuda.get_device_properties(device)
    state: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        state |= {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        }
    except Exception as error:  # a figure without clocks is better than none, and says so
        state["clocks"] = f"not read: {type(error).__name__}: {error}"
    return state


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """Return ‖ours − oracle‖ / ‖oracle‖ in float64."""
    return ((ours.double() - oracle.double()).norm() / oracle.double().norm().clamp(min=1e-300)).item()
