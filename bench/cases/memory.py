"""Memory and time of one training step with attention masses, on a CPU.

Every measurement is one forward and backward pass of a small random Llama, in a process of its own:

    eager   full attention matrices from transformers, masses summed from their last row
    abft    the same masses through `abft.enable`
    sdpa    PyTorch's attention, no masses: the cost of the network itself

The loss is the sum of the masses plus the mean of the last position's logits, so that the three differ in the masses
alone. Peak memory is what the pass adds to the resident memory just before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases.own_process import Tokens, collect_rows, in_own_process, median, print_measurement
from bench.result_file import write_result

name = "memory"
description = "CPU: peak memory and time of a forward and backward pass with masses; eager, abft, sdpa"

METHODS = ("eager", "abft", "sdpa")
LENGTHS = (512, 1024, 2048, 4096, 8192)
MODEL = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 16384,
}  # fmt: skip


def _make_step(method: str, tokens: str) -> Callable[[], None]:
    """Return the pass as a function without arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import abft

    length = int(tokens)
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


def _measured(method: str, tokens: Tokens) -> dict[str, Any]:
    return in_own_process("memory", method, tokens)


def collect(
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 3,
    log: Callable[[str], Any] = print,
    measured: Callable[[str, Tokens], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return rows by method and length, ratios to eager and sdpa, and the exponent of time in the length.

    `measured` gives bytes and seconds of a method at a length; None: in a process of its own.
    """
    rows = collect_rows(METHODS, lengths, measured or _measured, repeats, log)
    of = median(rows)
    ratios = [
        {"tokens": length}
        | {
            f"{kind}_abft_to_{other}": of("abft", length, key) / of(other, length, key)
            for kind, key in (("memory", "bytes"), ("time", "seconds"))
            for other in ("eager", "sdpa")
        }
        for length in lengths
    ]
    # The exponent x in time ~ N^x over the upper half of the lengths.
    low, high = lengths[len(lengths) // 2], lengths[-1]
    exponents = {
        method: math.log(of(method, high, "seconds") / of(method, low, "seconds")) / math.log(high / low)
        for method in METHODS
        if high > low
    }
    return {
        "model": MODEL,
        "dtype": "float32",
        "threads": 1,
        "repeats": repeats,
        "rows": rows,
        "ratios": ratios,
        "time_exponent": {"from": low, "to": high, **exponents},
    }


def run(out_dir: Path) -> Path:
    """Measure every method and length, write `cpu_memory.json`, and return its path."""
    return write_result(out_dir / "cpu_memory.json", collect)


if __name__ == "__main__":
    print_measurement(_make_step)
