"""The ABFT step in real shapes on one GPU, random weights: both modes of this package beside the published shape.

    7B bf16      Qwen2.5-7B's shape, LoRA on q and k
    32B NF4      Qwen2.5-32B's shape in 4 bits (double quantisation), LoRA on q and k; needs bitsandbytes
    reference    eager attention, output_attentions=True, one prompt at a time, full logits, gradients accumulated
    full         `layer_masses` on packed prompts, with gradient checkpointing from 8k tokens on
    restricted   the same with each layer's gradient taken inside the forward pass

The paper's pseudo-batch is 32 prompts of 200 tokens; other rows are one prompt of so many tokens. On the former also
evaluation, as `abft.evaluate` scores a batch and as one prompt at a time with full logits.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.timing import Budget

__all__ = ["SHAPES", "training"]

Row = dict[str, Any]
SHAPES: dict[str, dict[str, Any]] = {
    "7B bf16": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                    num_key_value_heads=4),
    "32B NF4": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                    num_key_value_heads=8),
}  # fmt: skip
_SHARED = {"vocab_size": 152064, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=64, max_position_embeddings=256)  # fmt: skip
LENGTHS = (2048, 8192, 32768, 131072)
PAPER = (32, 200)  # prompts, tokens
_CHECKPOINTED = 8192


def _config(name: str, tiny: bool) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**(_TINY if tiny else {**SHAPES[name], **_SHARED}), architectures=["Qwen2ForCausalLM"])


def _model(name: str, device: torch.device, tiny: bool) -> Any:
    """Random weights, made where they belong; LoRA on q and k."""
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
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta",
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            packed.weight = bitsandbytes.nn.Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], packed)


def _inputs(prompts: int, length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (prompts, length), device=device)
    groups = torch.full((prompts, length), -1, dtype=torch.int8, device=device)
    groups[:, torch.arange(1, 9, device=device) * length // 10] = (torch.arange(8, device=device) % 2).to(torch.int8)
    return {"ids": ids, "groups": groups}


def _step(model: Any, method: str, inputs: dict[str, torch.Tensor]) -> None:
    """Gradients of one pseudo-batch."""
    from abft.losses import abft_loss
    from abft.models.masses import layer_masses

    ids, groups = inputs["ids"], inputs["groups"]
    prompts, length = ids.shape

    def loss_of(masses: Any) -> Any:
        count = masses[0].shape[0]
        whole = torch.ones(count, dtype=torch.long, device=ids.device)
        return abft_loss(masses, 4 * whole, 8 * whole, length * whole, head_filter=False).per_prompt.sum() / prompts

    def backward(mass: Any) -> Any:
        loss_of([mass]).backward()
        return mass.detach()

    if method.startswith("evaluation"):
        _evaluation(model, method, ids)
        return
    if method == "reference":
        indicator = torch.stack([groups == 0, groups == 1], dim=-1)
        for prompt in range(prompts):
            outputs = model(input_ids=ids[prompt : prompt + 1], output_attentions=True, use_cache=False)
            rows = [a[:, :, -1:].float() @ indicator[prompt, None, None].float() for a in outputs.attentions]
            loss_of(rows).backward()
        return
    bounds = torch.arange(prompts + 1, device=ids.device, dtype=torch.int32) * length
    packed: dict[str, Any] = {
        "input_ids": ids.view(1, -1), "key_groups": groups.view(1, -1), "query_positions": bounds[1:, None] - 1,
    }  # fmt: skip
    if prompts > 1:
        packed["cu_seqlens"] = bounds
    if method == "full":
        loss_of(layer_masses(model, **packed)).backward()
    else:
        layer_masses(model, **packed, detach=True, on_mass=backward)


def _evaluation(model: Any, method: str, ids: torch.Tensor) -> None:
    """Logits of two labels behind each prompt."""
    from abft.evaluation.classification import label_logits

    with torch.inference_mode():
        if method == "evaluation, one by one":
            for prompt in ids:
                model(input_ids=prompt[None], use_cache=False).logits[:, -1, [1, 2]].float().cpu()
            return
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions,
                 "query_positions": positions[:, -1:]}  # fmt: skip
        label_logits(model, batch, [1, 2]).cpu()


def _measured(model: Any, method: str, prompts: int, length: int, vocabulary: int, device: torch.device) -> Row:
    from abft.models.attention import ATTENTION

    base = model.get_base_model()
    base.set_attn_implementation("eager" if method == "reference" else ATTENTION)
    model.train(not method.startswith("evaluation"))
    checkpointed = method == "full" and length >= _CHECKPOINTED
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        inputs = _inputs(prompts, length, vocabulary, device)
        _step(model, method, inputs)  # compiles
        times, peak = [], None
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            start = time.perf_counter()
            _step(model, method, inputs)
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
        "step_ms": {"median": median, "low": min(times), "high": max(times)}, "peak_bytes": peak,
        "prompts_per_second": 1000 * prompts / median, "checkpointed": checkpointed,
    }  # fmt: skip


def _planned(name: str, method: str, tokens: int, checkpointed: bool) -> float:
    """Bytes of `abft plan`, without the CUDA context that PyTorch's counter does not see."""
    from abft.training.plan import RESERVED, plan

    with tempfile.TemporaryDirectory() as folder:
        _config(name, False).save_pretrained(folder)
        result = plan(
            folder, context=tokens, mode=method, precision="nf4" if name.endswith("NF4") else "bfloat16", lora=True,
            gradient_checkpointing=checkpointed,
        )  # fmt: skip
    adam = result.parts["gradients and Adam"] * 2 / 3  # no optimizer runs here
    return result.total - RESERVED - adam


def training(device: torch.device, budget: Budget, tiny: bool) -> Iterator[Row]:
    """A row for each model, length and method; one that ran out of memory says so."""
    for name in SHAPES:
        if tiny and name.endswith("NF4"):
            continue
        if budget.left() < 60 and not tiny:
            yield {"model": name, "reason": "out of time"}
            continue
        try:
            model = _model(name, device, tiny)
        except (ImportError, RuntimeError) as error:
            yield {"model": name, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        gone: set[str] = set()
        cases = [(3, 24), (1, 48)] if tiny else [PAPER, *((1, n) for n in LENGTHS)]
        for prompts, length in cases:
            evaluation = ("evaluation", "evaluation, one by one") if prompts > 1 else ()
            for method in ("restricted", "full", "reference", *evaluation):
                about = {"model": name, "name": method, "prompts": prompts, "n": length}
                if method in gone or (budget.left() < 30 and not tiny):
                    yield {**about, "reason": "out of memory at a shorter length" if method in gone else "out of time"}
                    continue
                try:
                    row = _measured(model, method, prompts, length, 64 if tiny else 152064, device)
                    if not tiny and method in ("full", "restricted") and budget.left() > 60:
                        row["planned_bytes"] = _planned(name, method, prompts * length, row["checkpointed"])
                    yield {**about, **row}
                except torch.OutOfMemoryError:
                    gone.add(method)
                    yield {**about, "reason": "out of memory"}
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        del model
        gc.collect()
