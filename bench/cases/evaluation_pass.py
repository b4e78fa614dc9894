"""A whole `Normal` pass over the paper's eight tasks on a CPU, beside bare forward passes over the same tokens.

8 × 1,024 prompts of StaICC (k = 4) in a byte-pair vocabulary learnt from their own texts, through a random Llama:

    pass     every prompt built from texts already tokenized once, scored and turned into metrics: `abft.evaluate`
    bare     the decoder alone over the same prompts, batched the same way, attention by PyTorch; tensors made before
    single   one prompt at a time with full logits and all hidden states, as StaICC's own inference
             (on the first 16 prompts of each task, scaled by tokens)

The figure to read is the ratio pass / bare. Needs the extra `abft[staicc]`; the model is small, so the overhead of
building prompts and batches weighs more than it would beside a real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import spread
from bench.result_file import write_result

name = "evaluation"
description = "CPU: a whole evaluation pass over eight tasks, against bare forward passes over the same tokens"

REPEATS = 3
BATCH = 32
SINGLE = 16
MODEL = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def _tokenizer(texts: list[str]) -> Any:
    """Return a byte-pair tokenizer that is learnt from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def collect(limit: int | None = None) -> dict[str, Any]:
    """Return the ratios of the times, over rounds in which the methods take turns; `limit`: queries of each task."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import abft
    from abft.evaluation.batching import length_sorted_batches
    from abft.evaluation.classification import evaluate
    from abft.evaluation.staicc import staicc_task_data
    from abft.evaluation.suites import TaskSuite
    from abft.experiments.experiment import PAPER_TASKS

    data = [staicc_task_data(task) for task in PAPER_TASKS]
    texts = [example.text for task in data for example in task.demonstrations + task.queries]
    labels = [f" {label}" for task in data for label in task.task.labels]
    tokenizer = _tokenizer(texts + 500 * labels)
    torch.manual_seed(0)
    model = abft.enable(LlamaForCausalLM._from_config(LlamaConfig(**MODEL)).eval())
    bare_model = LlamaForCausalLM._from_config(LlamaConfig(**MODEL), attn_implementation="sdpa").eval()
    suites = [TaskSuite(task, tokenizer, k=4, limit=limit) for task in data]
    tokens = sum(prompt.length for suite in suites for prompt in suite.normal)  # and every text is tokenized once

    def whole_pass() -> None:
        for task in data:
            suite = TaskSuite(task, tokenizer, k=4, limit=limit)
            vars(suite)["builder"] = next(s for s in suites if s.data is task).builder
            evaluate(model, suite.normal, batch_size=BATCH, progress=False)

    names = ("input_ids", "attention_mask", "position_ids")
    ready = [
        {key: batch[key] for key in names}
        for suite in suites
        for _, batch in length_sorted_batches(suite.normal, abft.Collator(suite.normal.pad_token_id), BATCH, "", False)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for batch in ready:
                bare_model.model(**batch, use_cache=False)

    few = [prompt for suite in suites for prompt in suite.normal[:SINGLE]]

    def single() -> None:
        with torch.inference_mode():
            for prompt in few:
                bare_model(torch.tensor([prompt.input_ids]), output_hidden_states=True)

    single()  # warms up
    methods = {"pass": whole_pass, "bare": bare, "single": single}
    ratios = _ratios(methods, scale={"single": tokens / sum(prompt.length for prompt in few)})
    prompts = sum(len(suite.normal) for suite in suites)
    for title, ratio in ratios.items():
        print(f"{title}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), {prompts} prompts")
    return {
        "prompts": prompts,
        "tokens": tokens,
        "batch": BATCH,
        "model": MODEL,
        "threads": torch.get_num_threads(),
        "ratios": ratios,
    }


def _ratios(methods: dict[str, Callable[[], None]], scale: dict[str, float]) -> dict[str, dict[str, float]]:
    """Time the methods in turn; return the spread of each one's scaled seconds over those of `bare`."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(REPEATS):
        for method, work in methods.items():
            started = time.perf_counter()
            work()
            seconds[method].append((time.perf_counter() - started) * scale.get(method, 1.0))
    return {
        f"{method} / bare": spread([a / b for a, b in zip(times, seconds["bare"], strict=True)])
        for method, times in seconds.items()
        if method != "bare"
    }


def run(out_dir: Path) -> Path:
    """Measure, write `cpu_evaluation.json`, and return its path."""
    return write_result(out_dir / "cpu_evaluation.json", collect)
