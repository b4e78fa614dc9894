"""The card: its ceilings, as measured, and its state, as it is read."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.timing import measure

__all__ = ["ceilings", "gpu_state"]


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
