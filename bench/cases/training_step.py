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

import json
import sys
from pathlib import Path
from typing import Any

from abft.files import write_json
from bench.cases.memory import in_process_of_its_own, measure
from bench.record import provenance, spread

name = "training"
description = "CPU: time and peak memory of a training step, both gradient modes, beside the published code's shape"

METHODS = ("reference", "full", "restricted", "forward")
LENGTHS = (512, 1024, 2048, 4096, 8192)
PAPER = (32, 200)  # prompts, tokens
MODEL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 16384,
}  # fmt: skip


def _step(method: str, prompts: int, length: int) -> Any:
    """The step as a function without arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import abft
    from abft.losses import abft_loss
    from abft.models.projections import train_qk

    torch.manual_seed(0)
    implementation = {"reference": "eager", "forward": "sdpa"}.get(method, "sdpa")
    model = LlamaForCausalLM._from_config(LlamaConfig(**MODEL), attn_implementation=implementation)
    train_qk(model)
    if method in ("full", "restricted"):
        abft.enable(model)
    ids = torch.randint(0, MODEL["vocab_size"], (prompts, length))
    groups = torch.full((prompts, length), -1)
    places = torch.arange(1, 9) * length // 10
    groups[:, places] = torch.arange(8) % 2

    def loss_of(masses: Any) -> Any:
        count = masses[0].shape[0]
        k, lengths = torch.full((count,), 8), torch.full((count,), length)
        correct = torch.full((count,), 4)
        return abft_loss(masses, correct, k, lengths, head_filter=False).per_prompt.sum() / prompts

    def reference() -> None:
        indicator = torch.stack([groups == 0, groups == 1], dim=-1).float()
        for prompt in range(prompts):
            outputs = model(ids[prompt : prompt + 1], output_attentions=True, use_cache=False)
            rows = [attention[:, :, -1:] @ indicator[prompt, None, None] for attention in outputs.attentions]
            loss_of(rows).backward()

    def packed() -> None:
        bounds = torch.arange(prompts + 1) * length
        inputs: dict[str, Any] = {
            "input_ids": ids.view(1, -1), "key_groups": groups.view(1, -1), "cu_seqlens": bounds,
            "query_positions": bounds[1:, None] - 1,
        }  # fmt: skip
        if method == "full":
            loss_of(abft.layer_masses(model, **inputs)).backward()
            return

        def backward(mass: Any) -> Any:
            loss_of([mass]).backward()
            return mass.detach()

        abft.layer_masses(model, **inputs, detach=True, on_mass=backward)

    def forward() -> None:
        with torch.no_grad():
            model.model(ids, use_cache=False)

    return {"reference": reference, "forward": forward}.get(method, packed)


def _make(method: str) -> Any:
    return lambda length: _step(method, *((1, length) if length else PAPER))


def planned(method: str, length: int) -> int:
    """Bytes of `abft plan` for activations and gradients of the step."""
    import tempfile

    from transformers import LlamaConfig

    from abft.training.plan import plan

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODEL, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        parts = plan(folder, context=length, mode=method, precision="float32").parts
    return int(parts["activations"] + parts["gradients and Adam"] / 3)


def _both(method: str, length: int) -> dict[str, float]:
    """Bytes and seconds, from two processes: the one whose memory is exact is slower."""
    memory = in_process_of_its_own("training_step", method, length, returns_memory=True)["bytes"]
    return {"bytes": memory, "seconds": in_process_of_its_own("training_step", method, length)["seconds"]}


def collect(lengths: tuple[int, ...] = LENGTHS, repeats: int = 3, log: Any = print) -> dict[str, Any]:
    """Rows by method and length (0: the paper's pseudo-batch), and ratios."""
    rows: list[dict[str, Any]] = []
    for length in (0, *lengths):
        rounds = [{m: _both(m, length) for m in METHODS} for _ in range(repeats)]
        for method in METHODS:
            memory, seconds = (spread([done[method][key] for done in rounds]) for key in ("bytes", "seconds"))
            row = {"method": method, "tokens": length or "paper", "bytes": memory, "seconds": seconds}
            if length and method in ("full", "restricted"):
                row["planned_bytes"] = planned(method, length)
            rows.append(row)
            log(f"{method:10} {row['tokens']!s:>6}: {memory['median'] / 2**20:8.1f} MiB, {seconds['median']:7.2f} s")

    def median(method: str, length: Any, key: str) -> float:
        return next(r[key]["median"] for r in rows if (r["method"], r["tokens"]) == (method, length))

    ratios = [
        {"tokens": n}
        | {f"{key}_{a}_to_{b}": median(a, n, key) / median(b, n, key)
           for key in ("bytes", "seconds")
           for a, b in (("full", "reference"), ("restricted", "reference"), ("restricted", "forward"))}
        for n in ("paper", *lengths)
    ]  # fmt: skip
    return {"model": MODEL, "dtype": "float32", "threads": 1, "repeats": repeats, "rows": rows, "ratios": ratios}


def run(out_dir: Path, repeats: int = 3) -> Path:
    """Measures every method and length, writes `cpu_training.json`, and returns its path."""
    path = out_dir / "cpu_training.json"
    source = provenance()
    write_json(path, {"provenance": source, **collect(repeats=repeats)})
    return path


if __name__ == "__main__":
    print(json.dumps(measure(_make(sys.argv[1]), int(sys.argv[2]))))
