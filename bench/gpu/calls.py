"""The calls of a suite: listed before anything runs, compiled in other processes, then measured one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu.budget import Forecast
from bench.gpu.setting import Row, Setting, tried

__all__ = ["Call", "Warm", "free_bytes", "memory_reason", "run_calls", "warm_calls"]

# What the caching allocator cannot hand out, and a CUDA graph keeps beside the tensors of a call.
_MARGIN = 1.1


class Warm(NamedTuple):
    """A run that compiles what a call needs; `run` is picklable. Equal family and variant compile the same."""

    family: tuple[Hashable, ...]
    variant: Hashable  # the next ones of a family find most of their kernels compiled
    run: Callable[[Setting], Any]
    seconds: float = 10.0  # a guess: the longest start first


class Call(NamedTuple):
    """One row of a suite: what it is, how to measure it, and what is known of its cost before it runs."""

    about: Row
    kind: Hashable  # rows of a kind differ in length alone
    work: float  # to scale the time of one row of a kind to the next
    measured: Callable[[Setting], Row]
    warm: Warm | None = None
    square_bytes: int = 0  # of the N × N tensors that it holds at once


def warm_calls(calls: Iterable[Call]) -> list[Warm]:
    """Return the runs that compile what the calls need."""
    return [call.warm for call in calls if call.warm]


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of the card; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def memory_reason(needed: float, free: int | None) -> Row:
    """Return the reason not to try a call that needs so many bytes; empty if they are free."""
    if free is None or _MARGIN * needed <= free:
        return {}
    reason = f"not tried: {needed / 2**30:.1f} GiB predicted for N × N tensors, {free / 2**30:.1f} GiB free"
    return {"reason": reason, "predicted_bytes": int(needed), "free_bytes": free}


def run_calls(setting: Setting, calls: Iterable[Call]) -> Iterator[Row]:
    """Yield a row for each call; one that fits neither the time left nor the free memory is not started."""
    forecast = Forecast()
    for call in calls:
        if reason := setting.budget.reason(forecast.seconds(call.kind, call.work)):
            yield {**call.about, "reason": reason}
            continue
        if call.square_bytes and (refused := memory_reason(call.square_bytes, free_bytes(setting.device))):
            yield {**call.about, **refused}
            continue
        start = time.monotonic()
        row = tried(partial(call.measured, setting))
        if "reason" not in row:
            forecast.add(call.kind, call.work, time.monotonic() - start)
        yield {**call.about, **row}
