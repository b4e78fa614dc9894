"""A training step on a CPU: this package in both gradient modes, and a baseline shaped like the published code.

Every measurement is one step of a random Llama of the demo model's shape, W_Q and W_K trained, in a process of its own:

    reference    eager attention, output_attentions=True, one prompt at a time, full logits, gradients accumulated
    full         `layer_masses`, packed prompts, gradients through the hidden states
    restricted   the same with each layer's gradient taken inside the forward pass
    forward      the decoder without gradient and without masses, through PyTorch's attention

A length stands for one prompt of so many tokens; `paper` for 32 prompts of 200 tokens, the paper's pseudo-batch. Peak
memory is what the step adds to the resident memory just before it; `abft plan` counts the same for full and restricted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.cases.own_process import Tokens, collect_rows, in_own_process, median, print_measurement
from bench.result_file import write_result

name = "training"
description = "CPU: time and peak memory of a training step, both gradient modes, beside the published code's shape"

METHODS = ("reference", "full", "restricted", "forward")
LENGTHS = (512, 1024, 2048, 4096, 8192)
PAPER = (32, 200)  # prompts, tokens
MODEL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 16384,
}  # fmt: skip


def _make_step(method: str, tokens: str) -> Callable[[], None]:
    """Return the step as a function without arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import abft
    from abft.models.projections import train_parameters
    from bench.compared_steps import label_groups, packed_step, reference_step

    prompts, length = PAPER if tokens == "paper" else (1, int(tokens))
    torch.manual_seed(0)
    implementation = "eager" if method == "reference" else "sdpa"
    model = LlamaForCausalLM._from_config(LlamaConfig(**MODEL), attn_implementation=implementation)
    train_parameters(model)
    if method in ("full", "restricted"):
        abft.enable(model)
    ids = torch.randint(0, MODEL["vocab_size"], (prompts, length))
    groups = label_groups(prompts, length)

    def forward() -> None:
        with torch.no_grad():
            model.model(ids, use_cache=False)

    steps: dict[str, Callable[[], None]] = {
        "reference": partial(reference_step, model, ids, groups),
        "full": partial(packed_step, model, ids, groups, restricted=False),
        "restricted": partial(packed_step, model, ids, groups, restricted=True),
        "forward": forward,
    }
    return steps[method]


def planned(method: str, length: int) -> int:
    """Return the bytes that `abft plan` counts for activations and gradients of the step."""
    from transformers import LlamaConfig

    from abft.training.plan import plan

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODEL, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        parts = plan(folder, context=length, mode=method, precision="float32").parts
    return int(parts["activations"] + parts["gradients and Adam"] / 3)


def _measured(method: str, tokens: Tokens) -> dict[str, float]:
    """Return bytes and seconds, from two processes: the one whose memory is exact is slower."""
    memory = in_own_process("training_step", method, tokens, returns_memory=True)["bytes"]
    return {"bytes": memory, "seconds": in_own_process("training_step", method, tokens)["seconds"]}


def collect(lengths: Sequence[int] = LENGTHS, repeats: int = 3, log: Callable[[str], Any] = print) -> dict[str, Any]:
    """Return rows by method and tokens, with the bytes that `abft plan` counts, and ratios."""
    sizes: tuple[Tokens, ...] = ("paper", *lengths)
    rows = collect_rows(METHODS, sizes, _measured, repeats, log)
    for row in rows:
        if row["tokens"] != "paper" and row["method"] in ("full", "restricted"):
            row["planned_bytes"] = planned(row["method"], row["tokens"])
    of = median(rows)
    pairs = (("full", "reference"), ("restricted", "reference"), ("restricted", "forward"))
    ratios = [
        {"tokens": tokens}
        | {
            f"{key}_{a}_to_{b}": of(a, tokens, key) / of(b, tokens, key)
            for key in ("bytes", "seconds")
            for a, b in pairs
        }
        for tokens in sizes
    ]
    return {"model": MODEL, "dtype": "float32", "threads": 1, "repeats": repeats, "rows": rows, "ratios": ratios}


def run(out_dir: Path) -> Path:
    """Measure every method and length, write `cpu_training.json`, and return its path."""
    return write_result(out_dir / "cpu_training.json", collect)


if __name__ == "__main__":
    print_measurement(_make_step)
