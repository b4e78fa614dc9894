"""A training step of a real model on a CPU, in passes of a size that is chosen by itself, beside the published shape.

    python -m bench.cases.pass_size path/to/model

32 prompts of 200 tokens, the paper's pseudo-batch, in float32 on one thread, W_Q and W_K trained with full gradients:

    reference    eager attention, output_attentions=True, one prompt at a time, full logits, gradients accumulated
    auto         `ABFTTrainer` with its defaults: packing and tokens_per_batch="auto"

Each measurement is one step in a process of its own, the methods in turn. Memory is what the step adds to the resident
memory just before it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.cases.own_process import collect_rows, in_own_process, median, print_measurement
from bench.result_file import write_result

METHODS = ("reference", "auto")
PAPER = (32, 200)  # prompts, tokens
KEYS = ("bytes", "seconds")


def _trainer_step(model: Any, ids: Any, groups: Any) -> Callable[[], None]:
    """Return one optimizer step's passes of the trainer, with the loss of `bench.compared_steps`."""
    import abft

    targets = [
        abft.AttentionTarget(
            row.tolist(), [len(row) - 1], (own == 0).nonzero()[:, 0].tolist(), (own == 1).nonzero()[:, 0].tolist()
        )
        for row, own in zip(ids, groups, strict=True)
    ]
    config = abft.ABFTConfig(
        output_dir=tempfile.gettempdir(), method="abft", use_cpu=True, disable_tqdm=True, save_strategy="no",
        head_filter=False, pseudo_batch_size=max(8, len(targets)),
    )  # fmt: skip
    trainer = abft.ABFTTrainer(model, config, targets)
    batches = list(trainer.get_train_dataloader())

    def step() -> None:
        for batch in batches:
            trainer.training_step(trainer.model, batch, len(targets))

    return step


def _make_step(folder: str, method: str, tokens: str) -> Callable[[], None]:
    """Return the step as a function without arguments; `tokens` is "paper", or the length of one prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    from abft.models.projections import train_parameters
    from bench.compared_steps import label_groups, reference_step

    prompts, length = PAPER if tokens == "paper" else (1, int(tokens))
    torch.manual_seed(0)
    attention = "eager" if method == "reference" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (prompts, length))
    groups = label_groups(prompts, length)
    if method == "reference":
        train_parameters(model)
        return partial(reference_step, model, ids, groups)
    return _trainer_step(model, ids, groups)


def collect(folder: str, repeats: int = 3, log: Callable[[str], Any] = print) -> dict[str, Any]:
    """Return rows by method, and ratios to the reference."""

    def measured(method: str, tokens: Any) -> dict[str, Any]:
        return in_own_process("pass_size", method, tokens, further=(folder,))

    rows = collect_rows(METHODS, ("paper",), measured, repeats, log)
    of = median(rows)
    ratios = {f"{key}_auto_to_reference": of("auto", "paper", key) / of("reference", "paper", key) for key in KEYS}
    shape = {"model": Path(folder).name, "prompts": PAPER[0], "tokens": PAPER[1]}
    return {**shape, "dtype": "float32", "threads": 1, "repeats": repeats, "rows": rows, "ratios": ratios}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        out = Path(__file__).parents[1] / "results" / "pass_size.json"
        print(f"wrote {write_result(out, partial(collect, sys.argv[1]))}")
    else:
        print_measurement(partial(_make_step, sys.argv[3]))
