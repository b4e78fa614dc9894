"""Memory and time of one training step with attention masses, on a CPU.

Every measurement is one forward and backward pass of a small random Llama, in a process of its own:

    eager   full attention matrices from transformers, masses summed from their last row
    abft    the same masses through `abft.enable`
    sdpa    PyTorch's attention, no masses: the cost of the network itself

The loss is the sum of the masses plus the mean of the last position's logits, so that the three differ in the masses
alone. Peak memory is what the pass adds to the resident memory just before it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abft.files import write_json
from abft.provenance import resident_peak
from bench.record import provenance, spread

name = "memory"
description = "CPU: peak memory and time of a forward and backward pass with masses; eager, abft, sdpa"

METHODS = ("eager", "abft", "sdpa")
LENGTHS = (512, 1024, 2048, 4096, 8192)
MODEL = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 16384,
}  # fmt: skip


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {field} in /proc/self/status")


def _reset_peak() -> bool:
    """Makes the peak of the process start anew (Linux); elsewhere the baseline is the peak of the imports."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _step(method: str, length: int) -> Any:
    """The pass as a function without arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import abft

    torch.manual_seed(0)
    implementation = "eager" if method == "eager" else "sdpa"
    model = LlamaForCausalLM._from_config(LlamaConfig(**MODEL), attn_implementation=implementation)
    if method == "abft":
        abft.enable(model)
    ids = torch.randint(0, MODEL["vocab_size"], (1, length))
    groups = torch.full((1, length), -1)
    groups[0, length // 8 :: length // 8] = torch.arange(7) % 2  # labels of seven demonstrations, two groups
    rows = torch.tensor([[length - 1]])

    def step() -> None:
        kwargs = {"use_cache": False, "logits_to_keep": 1}
        if method == "abft":
            kwargs |= {"key_groups": groups, "query_positions": rows}
        outputs = model(ids, output_attentions=method != "sdpa", **kwargs)
        loss = outputs.logits.float().mean()
        for attention in outputs.attentions or ():
            if method == "eager":
                indicator = (groups[..., None] == torch.arange(2)).float()
                attention = attention[:, :, -1:] @ indicator[:, None]
            loss = loss + attention.sum()
        loss.backward()

    return step


def measure(make: Callable[[int], Callable[[], None]], length: int) -> dict[str, Any]:
    """One pass of `make(length)` in this process: bytes above the memory before it, and seconds."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    make(64)()  # loads the libraries and their buffers
    step = make(length)
    gc.collect()
    reset = _reset_peak()
    before = _status("VmRSS") if reset else resident_peak()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    after = _status("VmHWM") if reset else resident_peak()  # ru_maxrss does not follow the reset on every kernel
    return {"bytes": max(0, after - before), "seconds": seconds}


def in_process_of_its_own(module: str, method: str, length: int, returns_memory: bool = False) -> dict[str, Any]:
    """What `python -m bench.cases.MODULE METHOD LENGTH` prints last, as JSON; one thread.

    `returns_memory`: glibc gives every tensor's memory back at once, so that resident memory is live memory; slower.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if returns_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-m", f"bench.cases.{module}", method, str(length)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{method} at {length} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def collect(lengths: tuple[int, ...] = LENGTHS, repeats: int = 3, log: Any = print) -> dict[str, Any]:
    """Rows by method and length, ratios to eager, and how time grows with the length."""
    rows: list[dict[str, Any]] = []
    for length in lengths:
        # The methods in turn, so that a busy spell of the machine hits all of them.
        rounds = [
            {method: in_process_of_its_own("memory", method, length) for method in METHODS} for _ in range(repeats)
        ]
        for method in METHODS:
            memory, seconds = (spread([done[method][key] for done in rounds]) for key in ("bytes", "seconds"))
            rows.append({"method": method, "tokens": length, "bytes": memory, "seconds": seconds})
            log(f"{method:5} {length:5} tokens: {memory['median'] / 2**20:8.1f} MiB, {seconds['median']:7.2f} s")

    def median(method: str, length: int, key: str) -> float:
        return next(r[key]["median"] for r in rows if (r["method"], r["tokens"]) == (method, length))

    ratios = [
        {
            "tokens": length,
            "memory_abft_to_eager": median("abft", length, "bytes") / median("eager", length, "bytes"),
            "memory_abft_to_sdpa": median("abft", length, "bytes") / median("sdpa", length, "bytes"),
            "time_abft_to_eager": median("abft", length, "seconds") / median("eager", length, "seconds"),
            "time_abft_to_sdpa": median("abft", length, "seconds") / median("sdpa", length, "seconds"),
        }
        for length in lengths
    ]
    # The exponent x in time ~ N^x over the upper half of the lengths.
    low, high = lengths[len(lengths) // 2], lengths[-1]
    exponents = {
        method: math.log(median(method, high, "seconds") / median(method, low, "seconds")) / math.log(high / low)
        for method in METHODS
        if high > low
    }
    return {"model": MODEL, "dtype": "float32", "threads": 1, "repeats": repeats, "rows": rows, "ratios": ratios,
            "time_exponent": {"from": low, "to": high, **exponents}}  # fmt: skip


def run(out_dir: Path, repeats: int = 3) -> Path:
    """Measures every method and length, writes `cpu_memory.json`, and returns its path."""
    path = out_dir / "cpu_memory.json"
    source = provenance()
    write_json(path, {"provenance": source, **collect(repeats=repeats)})
    return path


if __name__ == "__main__":
    print(json.dumps(measure(lambda length: _step(sys.argv[1], length), int(sys.argv[2]))))
