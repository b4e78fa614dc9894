"""The training suite: the ABFT step in real shapes on one GPU, random weights, beside the published shape.

    7B bf16      Qwen2.5-7B's shape, LoRA on q and k
    32B NF4      Qwen2.5-32B's shape in 4 bits (double quantisation), LoRA on q and k; needs bitsandbytes
    reference    eager attention, output_attentions=True, one prompt at a time, full logits, gradients accumulated
    full         `layer_masses` on packed prompts, with gradient checkpointing from 8k tokens on
    restricted   the same with each layer's gradient taken inside the forward pass

The paper's pseudo-batch is 32 prompts of 200 tokens; every other row is one prompt of the given length. The
pseudo-batch is also evaluated, as `abft.evaluate` scores a batch and as one prompt at a time with full logits.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.compared_steps import label_groups, packed_step, reference_step
from bench.gpu.setting import Row, Setting

__all__ = ["SHAPES", "training"]

SHAPES: dict[str, dict[str, Any]] = {
    "7B bf16": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "32B NF4": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
_SHARED = {"vocab_size": 152064, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
LENGTHS = (2048, 8192, 32768, 131072)
PAPER = (32, 200)  # prompts, tokens
METHODS = ("restricted", "full", "reference")
EVALUATIONS = ("evaluation", "evaluation, one by one")
_CHECKPOINTED = 8192


def _config(name: str, tiny: bool) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**(_TINY if tiny else {**SHAPES[name], **_SHARED}), architectures=["Qwen2ForCausalLM"])


def _model(name: str, device: torch.device, tiny: bool) -> Any:
    """Return the model with random weights, made on the device, and LoRA on q and k."""
    from transformers import AutoModelForCausalLM

    import abft.models.attention
    from abft.models.projections import lora_qk

    dtype = torch.float32 if tiny else torch.bfloat16
    four_bits = name.endswith("NF4")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _config(name, tiny), dtype=dtype, attn_implementation=abft.models.attention.ATTENTION
        )
    if four_bits:
        _quantize(model, device)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                values = values.normal_(std=0.02) if parameter.dim() > 1 else values.fill_(1.0)
                module._parameters[key] = torch.nn.Parameter(values, requires_grad=False)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return lora_qk(model).train()


def _quantize(model: Any, device: torch.device) -> None:
    """Replace every linear layer but the LM head by a random one in NF4."""
    import bitsandbytes

    options = {"compress_statistics": True, "quant_type": "nf4"}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                device="meta",
                compute_dtype=torch.bfloat16,
                **options,
            )
            packed.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, **options).to(device)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], packed)


def _step(model: Any, method: str, ids: Tensor, groups: Tensor) -> None:
    """Compute the gradients of one pseudo-batch, or evaluate it."""
    if method in EVALUATIONS:
        _evaluate(model, ids, single=method != "evaluation")
    elif method == "reference":
        reference_step(model, ids, groups)
    else:
        packed_step(model, ids, groups, restricted=method == "restricted")


def _evaluate(model: Any, ids: Tensor, single: bool) -> None:
    """Compute the logits of two labels after each prompt; `single`: one prompt at a time with full logits."""
    from abft.evaluation.classification import label_logits

    with torch.inference_mode():
        if single:
            for prompt in ids:
                model(input_ids=prompt[None], use_cache=False).logits[:, -1, [1, 2]].float().cpu()
            return
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": positions,
            "query_positions": positions[:, -1:],
        }
        label_logits(model, batch, [1, 2]).cpu()


def _measured(model: Any, method: str, ids: Tensor) -> Row:
    """Return the time and the peak memory of a step, after one that compiles."""
    from abft.models.attention import ATTENTION

    base = model.get_base_model()
    base.set_attn_implementation("eager" if method == "reference" else ATTENTION)
    model.train(method not in EVALUATIONS)
    prompts, length = ids.shape
    checkpointed = method == "full" and length >= _CHECKPOINTED
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    cuda = ids.device.type == "cuda"
    try:
        groups = label_groups(prompts, length, ids.device)
        _step(model, method, ids, groups)  # compiles
        times, peak = [], None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            start = time.perf_counter()
            _step(model, method, ids, groups)
            if cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        if cuda:
            peak = torch.cuda.max_memory_allocated()
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointed:
            base.gradient_checkpointing_disable()
    median = sorted(times)[1]
    return {
        "step_ms": {"median": median, "low": min(times), "high": max(times)},
        "peak_bytes": peak,
        "prompts_per_second": 1000 * prompts / median,
        "checkpointed": checkpointed,
    }


def _planned(name: str, method: str, tokens: int, checkpointed: bool) -> float:
    """Return the bytes of `abft plan`, without the CUDA context that PyTorch's counter does not see."""
    from abft.training.plan import RESERVED, plan

    with tempfile.TemporaryDirectory() as folder:
        _config(name, False).save_pretrained(folder)
        result = plan(
            folder,
            context=tokens,
            mode=method,
            precision="nf4" if name.endswith("NF4") else "bfloat16",
            lora=True,
            gradient_checkpointing=checkpointed,
        )
    adam = result.parts["gradients and Adam"] * 2 / 3  # no optimizer runs here
    return result.total - RESERVED - adam


def _model_rows(setting: Setting, name: str, model: Any) -> Iterator[Row]:
    """Yield a row for each length and method of one model; one that ran out of memory says so."""
    device, budget, tiny = setting.device, setting.budget, setting.tiny
    gone: set[str] = set()
    for prompts, length in [(3, 24), (1, 48)] if tiny else [PAPER, *((1, n) for n in LENGTHS)]:
        for method in (*METHODS, *(EVALUATIONS if prompts > 1 else ())):
            about = {"model": name, "name": method, "prompts": prompts, "n": length}
            if method in gone or (budget.left() < 30 and not tiny):
                yield {**about, "reason": "out of memory at a shorter length" if method in gone else "out of time"}
                continue
            try:
                row = _measured(model, method, torch.randint(64 if tiny else 152064, (prompts, length), device=device))
                if not tiny and method in ("full", "restricted") and budget.left() > 60:
                    row["planned_bytes"] = _planned(name, method, prompts * length, row["checkpointed"])
                yield {**about, **row}
            except torch.OutOfMemoryError:
                gone.add(method)
                yield {**about, "reason": "out of memory"}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def training(setting: Setting) -> Iterator[Row]:
    """Yield a row for each model, length and method."""
    for name in SHAPES:
        if setting.tiny and name.endswith("NF4"):
            continue
        if setting.budget.left() < 60 and not setting.tiny:
            yield {"model": name, "reason": "out of time"}
            continue
        try:
            model = _model(name, setting.device, setting.tiny)
        except (ImportError, RuntimeError) as error:
            yield {"model": name, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        yield from _model_rows(setting, name, model)
        del model
        gc.collect()
