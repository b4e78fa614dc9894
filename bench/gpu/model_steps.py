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
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compared_steps import label_groups, packed_step, reference_step
from bench.gpu.budget import Forecast
from bench.gpu.calls import Warm, free_bytes, memory_reason
from bench.gpu.setting import Row, Setting

__all__ = ["SHAPES", "eager_step_bytes", "model_config", "plan_keys", "training", "training_warm"]

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
# The prompts whose steps are run beforehand: a longer one takes the same kernels.
_WARMED = (PAPER, (1, 2048), (1, 8192))
# One layer with the model's heads: the kernels see no more of it.
_ONE_LAYER = {"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 64}
# Guesses of seconds: of the first step of a method, and of making a model, quantised or not.
_FIRST_STEP = 8.0
_LOADING = {"7B bf16": 10.0, "32B NF4": 40.0}


def model_config(name: str, tiny: bool = False, **changes: Any) -> Any:
    """Return the configuration of one of `SHAPES`, or a tiny one."""
    from transformers import Qwen2Config

    shape = _TINY if tiny else {**SHAPES[name], **_SHARED, **changes}
    return Qwen2Config(**shape, architectures=["Qwen2ForCausalLM"])


def _model(config: Any, setting: Setting, four_bits: bool) -> Any:
    """Return the model with random weights, made on the device, and LoRA on q and k."""
    from transformers import AutoModelForCausalLM

    import abft.models.attention
    from abft.models.projections import lora_qk

    dtype, device, generator = setting.dtype, setting.device, setting.generator()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=abft.models.attention.ATTENTION
        )
    if four_bits:
        _quantize(model, device, generator)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                values = values.normal_(std=0.02, generator=generator) if parameter.dim() > 1 else values.fill_(1.0)
                module._parameters[key] = torch.nn.Parameter(values, requires_grad=False)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return lora_qk(model).train()


def _quantize(model: Any, device: torch.device, generator: torch.Generator) -> None:
    """Replace every linear layer but the LM head by a random one in NF4."""
    import bitsandbytes

    options = {"compress_statistics": True, "quant_type": "nf4"}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device)
            values.normal_(std=0.02, generator=generator)
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
    checkpointed = _checkpoints(method, length)
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    cuda = ids.device.type == "cuda"
    try:
        groups = label_groups(prompts, length, ids.device)
        _step(model, method, ids, groups)  # compiles
        times, host, peak = [], [], None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            start = time.perf_counter()
            _step(model, method, ids, groups)
            host.append(1000 * (time.perf_counter() - start))
            if cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        if cuda:
            peak = torch.cuda.max_memory_allocated()
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointed:
            base.gradient_checkpointing_disable()
    step, launched = (
        {"median": sorted(values)[1], "low": min(values), "high": max(values)} for values in (times, host)
    )
    return {
        # A whole step is not captured in a graph.
        "step_ms": {**step, "clock": "wall", "host_ms": launched},
        "peak_bytes": peak,
        "prompts_per_second": 1000 * prompts / step["median"],
        "checkpointed": checkpointed,
    }


def _checkpoints(method: str, length: int) -> bool:
    return method == "full" and length >= _CHECKPOINTED


def plan_keys() -> list[tuple[str, str, int, bool]]:
    """Return model, method, tokens and checkpointing of every step that `abft plan` can count, in their order."""
    return [
        (model, method, prompts * length, _checkpoints(method, length))
        for model in SHAPES
        for prompts, length in (PAPER, *((1, n) for n in LENGTHS))
        for method in ("restricted", "full")
    ]


def eager_step_bytes(config: Any, length: int, element_size: int) -> int:
    """Return the bytes of the N × N tensors that a step of the published shape holds at once, for one prompt.

    Each layer keeps its probabilities in float32 and rounded; one layer's gradients come on top, in both types too.
    """
    return config.num_attention_heads * length**2 * (config.num_hidden_layers + 1) * (4 + element_size)


def _refused(setting: Setting, name: str, config: Any, method: str, prompts: int, length: int) -> Row:
    """Return the reason not to try a step, from what it is predicted to need; empty if it may run."""
    free = free_bytes(setting.device)
    if method == "reference":
        return memory_reason(eager_step_bytes(config, length, 2), free)
    planned = _planned(setting, name, method, prompts, length)
    if planned is None or free is None:
        return {}
    room = free + torch.cuda.memory_allocated(setting.device)  # the plan counts the weights too
    if planned <= room:
        return {}
    reason = f"not tried: {planned / 2**30:.1f} GiB planned, {room / 2**30:.1f} GiB for model and step"
    return {"reason": reason, "predicted_bytes": int(planned), "free_bytes": free}


def _planned(setting: Setting, name: str, method: str, prompts: int, length: int) -> float | None:
    if setting.planned is None or method not in ("full", "restricted"):
        return None
    return setting.planned(name, method, prompts * length, _checkpoints(method, length))


def _model_rows(setting: Setting, name: str, model: Any) -> Iterator[Row]:
    """Yield a row for each length and method of one model; what time or memory do not allow is not started."""
    forecast, gone, tiny = Forecast(), set(), setting.tiny
    config, generator = model.get_base_model().config, setting.generator(1)
    for prompts, length in [(3, 24), (1, 48)] if tiny else [PAPER, *((1, n) for n in LENGTHS)]:
        for method in (*METHODS, *(EVALUATIONS if prompts > 1 else ())):
            about = {"model": name, "name": method, "prompts": prompts, "n": length}
            # Linear layers and causal attention, in units of one layer's multiply-adds a hidden unit.
            work = prompts * length * (12 * config.hidden_size + length)
            if method in gone:
                yield {**about, "reason": "out of memory at a shorter length"}
                continue
            if reason := setting.budget.reason(forecast.seconds(method, work, first=_FIRST_STEP)):
                yield {**about, "reason": reason}
                continue
            if refused := _refused(setting, name, config, method, prompts, length):
                yield {**about, **refused}
                continue
            start = time.monotonic()
            ids = torch.randint(config.vocab_size, (prompts, length), device=setting.device, generator=generator)
            try:
                row = _measured(model, method, ids)
                forecast.add(method, work, time.monotonic() - start)
                if planned := _planned(setting, name, method, prompts, length):
                    row["planned_bytes"] = planned
                yield {**about, **row}
            except torch.OutOfMemoryError:
                gone.add(method)
                yield {**about, "reason": "out of memory, which was not predicted"}
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def training(setting: Setting) -> Iterator[Row]:
    """Yield a row for each model, length and method."""
    for name in SHAPES:
        if setting.tiny and name.endswith("NF4"):
            continue
        if not setting.tiny and (reason := setting.budget.reason(_LOADING[name])):
            yield {"model": name, "reason": reason}
            continue
        try:  # without bitsandbytes, or without memory for the weights
            model = _model(model_config(name, setting.tiny), setting, name.endswith("NF4"))
        except (ImportError, RuntimeError) as error:
            yield {"model": name, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        yield from _model_rows(setting, name, model)
        del model
        gc.collect()


def _compile_steps(setting: Setting, name: str, prompts: int, length: int) -> None:
    """Run both gradient modes on one layer of a model."""
    model = _model(model_config(name, setting.tiny, **_ONE_LAYER), setting, False)
    ids = torch.randint(64, (prompts, length), device=setting.device, generator=setting.generator())
    for method in ("restricted", "full"):
        _step(model, method, ids, label_groups(prompts, length, setting.device))


def training_warm(setting: Setting) -> list[Warm]:
    """Return the runs that compile the kernels of both models' steps."""
    return [
        Warm(("training", name), (prompts, length), partial(_compile_steps, name=name, prompts=prompts, length=length))
        for name in (list(SHAPES)[:1] if setting.tiny else SHAPES)
        for prompts, length in ([(3, 24)] if setting.tiny else _WARMED)
    ]
