"""Which parameters ABFT trains: W_Q and W_K of every attention layer, whole or as LoRA, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["TrainedParameter", "find_qk", "lora_qk", "train_qk"]


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that holds W_Q or W_K: whole, or some entries along `dim` if q, k and v are fused.

    Args:
        name: full name in the model's `state_dict`.
        dim: the output dimension of a fused projection; None if the whole parameter is trained.
        length: entries along `dim`, of each block, that belong to q and k.
        start: the first of them.
        blocks: equal parts of `dim`, the heads, where a projection holds q, k and v head by head.
    """

    name: str
    dim: int | None = None
    length: int | None = None
    start: int = 0
    blocks: int = 1

    @property
    def fused(self) -> bool:
        return self.dim is not None

    def view(self, tensor: Tensor) -> Tensor:
        """The trained part of `tensor`, without a copy; with several blocks they are a dimension of their own."""
        if self.dim is None or self.length is None:
            return tensor
        if self.blocks == 1:
            return tensor.narrow(self.dim, self.start, self.length)
        return tensor.unflatten(self.dim, (self.blocks, -1)).narrow(self.dim + 1, self.start, self.length)


def _of_module(name: str, module: nn.Module) -> list[TrainedParameter]:
    children = dict(module.named_children())
    if "q_proj" in children and "k_proj" in children:
        return [TrainedParameter(f"{name}.{child}.weight") for child in ("q_proj", "k_proj")]
    if isinstance(fused := children.get("c_attn"), Conv1D) and fused.nf == 3 * fused.nx:
        return [TrainedParameter(f"{name}.c_attn.weight", dim=1, length=2 * fused.nx)]  # Conv1D: (in, out)
    config: Any = getattr(module, "config", None)
    if type(module).__name__.startswith("GPTNeoX") and "query_key_value" in children:
        head_dim = config.hidden_size // config.num_attention_heads
        return [TrainedParameter(f"{name}.query_key_value.weight", 0, 2 * head_dim, blocks=config.num_attention_heads)]
    if {"kv_a_proj_with_mqa", "kv_b_proj"} <= children.keys():  # multi-head latent attention, as in DeepSeek-V3
        queries = [child for child in ("q_proj", "q_a_proj", "q_b_proj") if children.get(child) is not None]
        latent, rope, heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
        return [
            *(TrainedParameter(f"{name}.{child}.weight") for child in queries),
            # The latent itself feeds v as well: of what makes it, the rotary keys alone are W_K.
            TrainedParameter(f"{name}.kv_a_proj_with_mqa.weight", 0, rope, start=latent),
            TrainedParameter(f"{name}.kv_b_proj.weight", 0, config.qk_nope_head_dim, blocks=heads),
        ]
    fused = children.get("qkv_proj")
    # Elsewhere (CodeGen, MiniMax) a projection of this name interleaves q, k and v by head.
    if isinstance(fused, nn.Linear) and type(module).__name__.startswith(("Phi3", "Phi4")):
        head_dim = fused.out_features // (config.num_attention_heads + 2 * config.num_key_value_heads)
        rows = head_dim * (config.num_attention_heads + config.num_key_value_heads)
        return [TrainedParameter(f"{name}.qkv_proj.weight", dim=0, length=rows)]
    return []


def find_qk(model: nn.Module) -> list[TrainedParameter]:
    """The parameters that hold W_Q and W_K, one or more per attention layer, in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form.
    """
    found: list[TrainedParameter] = []
    layers = 0
    for name, module in model.named_modules():
        parameters = _of_module(name, module)
        found += parameters
        layers += bool(parameters)
    config = getattr(model, "config", None)
    expected = config.get_text_config().num_hidden_layers if config is not None else layers
    if not found or layers != expected:
        raise ValueError(
            f"found q and k projections in {layers} of {expected} layers of {type(model).__name__}; known are "
            "q_proj and k_proj, GPT-2's c_attn, GPT-NeoX's query_key_value, Phi's qkv_proj and latent attention (MLA). "
            "For other names train with LoRA and name them (lora_target_modules)"
        )
    return found


def train_qk(model: PreTrainedModel) -> list[TrainedParameter]:
    """Makes W_Q and W_K the only parameters that require a gradient; returns them.

    In a fused projection the gradient of the value part is zeroed as it arrives, so that part does not move under
    any optimizer without weight decay.
    """
    trained = find_qk(model)
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for item in trained:
        parameter = parameters[item.name]
        if not parameter.is_floating_point():
            raise ValueError(f"{item.name} is quantized to {parameter.dtype}; train it with LoRA (lora=True)")
        parameter.requires_grad_(True)
        if item.fused:
            parameter.register_hook(_keeping(item))
    return trained


def _keeping(item: TrainedParameter) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        item.view(kept).copy_(item.view(gradient))
        return kept

    return hook


def lora_qk(
    model: PreTrainedModel, *, r: int = 16, alpha: int = 32, target_modules: list[str] | None = None
) -> PeftModel:
    """Wraps `model` with LoRA on the q and k projections (r = 16 in the paper), through PEFT.

    Raises:
        ValueError: r below 1, a fused projection (LoRA would move v too), or target modules that the model lacks.
    """
    if r < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {r}")
    if target_modules is None:
        trained = find_qk(model)
        if any(item.fused for item in trained):
            raise ValueError(
                f"{type(model).__name__} computes q, k and v in one projection ({trained[0].name}); LoRA on it "
                "would train v too. Train W_Q and W_K in full, or name other lora_target_modules"
            )
        target_modules = sorted({item.name.split(".")[-2] for item in trained})
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if missing := sorted(set(target_modules) - names):
        raise ValueError(f"{type(model).__name__} has no module named {', '.join(missing)}; it has {sorted(names)}")
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=target_modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)
