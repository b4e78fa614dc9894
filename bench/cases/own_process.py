"""A method measured at one prompt size in a process of its own: peak memory above the start, and seconds.

A case that measures so is also a command, `python -m bench.cases.CASE METHOD TOKENS`, which prints one measurement.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abft.provenance import resident_peak
from bench.record import spread

__all__ = ["collect_rows", "in_own_process", "measure", "median", "print_measurement"]

Tokens = int | str  # the length of one prompt, or the name of a batch
MakeStep = Callable[[str, str], Callable[[], None]]  # of method and tokens


def _status(field: str) -> int:
    """Return the bytes that the kernel reports for this process under `field`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {field} in /proc/self/status")


def _reset_peak() -> bool:
    """Reset the peak of the process (Linux) and return True; elsewhere the baseline is the peak of the imports."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(make_step: MakeStep, method: str, tokens: str) -> dict[str, Any]:
    """Return bytes above the memory before one step in this process, and the step's seconds."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    make_step(method, "64")()  # loads the libraries and their buffers
    step = make_step(method, tokens)
    gc.collect()
    reset = _reset_peak()
    before = _status("VmRSS") if reset else resident_peak()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    after = _status("VmHWM") if reset else resident_peak()  # ru_maxrss does not follow the reset on every kernel
    return {"bytes": max(0, after - before), "seconds": seconds}


def print_measurement(make_step: MakeStep) -> None:
    """Print the measurement of the method and tokens on the command line, as JSON."""
    print(json.dumps(measure(make_step, *sys.argv[1:3])))


def in_own_process(
    case: str, method: str, tokens: Tokens, returns_memory: bool = False, further: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the measurement that `python -m bench.cases.CASE METHOD TOKENS` prints; one thread.

    `further`: more arguments of that command.
    `returns_memory`: glibc gives every tensor's memory back at once, so that resident memory is live memory; slower.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if returns_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", f"bench.cases.{case}", method, str(tokens), *further]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method} at {tokens} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def collect_rows(
    methods: Sequence[str],
    sizes: Sequence[Tokens],
    measured: Callable[[str, Tokens], dict[str, Any]],
    repeats: int,
    log: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """Return a row for each size and method: the spread of bytes and seconds over `repeats` measurements."""
    rows: list[dict[str, Any]] = []
    for tokens in sizes:
        # The methods in turn, so that a busy spell of the machine hits all of them.
        rounds = [{method: measured(method, tokens) for method in methods} for _ in range(repeats)]
        for method in methods:
            memory, seconds = (spread([done[method][key] for done in rounds]) for key in ("bytes", "seconds"))
            rows.append({"method": method, "tokens": tokens, "bytes": memory, "seconds": seconds})
            log(f"{method:10} {tokens:>6}: {memory['median'] / 2**20:8.1f} MiB, {seconds['median']:7.2f} s")
    return rows


def median(rows: list[dict[str, Any]]) -> Callable[[str, Tokens, str], float]:
    """Return a look-up in `rows`: the median of a key by method, tokens and key."""
    found = {(row["method"], row["tokens"], key): row[key]["median"] for row in rows for key in ("bytes", "seconds")}
    return lambda method, tokens, key: found[method, tokens, key]
