"""W_Q, W_K and W_V of every attention layer.

ABFT trains W_Q and W_K, whole or as LoRA, and nothing else; `KeyValueUpdate` adds to W_K and W_V.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["KeyValueUpdate", "TrainedParameter", "attention_modules", "find_kv", "find_qk", "lora_qk", "train_qk"]


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


def _attention_names(model: nn.Module) -> list[str]:
    """Names of the attention modules, in the model's order: those that hold W_Q and W_K."""
    return list(dict.fromkeys(item.name.rsplit(".", 2)[0] for item in find_qk(model)))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, in the model's order.

    Raises:
        ValueError: not every layer has q and k projections of a known form.
    """
    return [model.get_submodule(name) for name in _attention_names(model)]


def _key_value_of_module(name: str, module: nn.Module) -> list[TrainedParameter]:
    children = dict(module.named_children())
    config: Any = getattr(module, "config", None)
    if "k_proj" in children and "v_proj" in children:
        return [TrainedParameter(f"{name}.{child}.weight") for child in ("k_proj", "v_proj")]
    if isinstance(fused := children.get("c_attn"), Conv1D):  # (in, out)
        return [TrainedParameter(f"{name}.c_attn.weight", dim=1, start=fused.nx, length=2 * fused.nx)]
    if "query_key_value" in children:  # GPT-NeoX: q, k and v head by head
        head_dim = config.hidden_size // config.num_attention_heads
        return [
            TrainedParameter(
                f"{name}.query_key_value.weight", 0, 2 * head_dim, start=head_dim, blocks=config.num_attention_heads
            )
        ]
    if isinstance(fused := children.get("qkv_proj"), nn.Linear):  # Phi
        head_dim = fused.out_features // (config.num_attention_heads + 2 * config.num_key_value_heads)
        start = head_dim * config.num_attention_heads
        return [TrainedParameter(f"{name}.qkv_proj.weight", 0, fused.out_features - start, start=start)]
    raise NotImplementedError(
        f"{type(module).__name__} has no W_K and W_V of its own ({', '.join(children)}); known are k_proj and v_proj, "
        "GPT-2's c_attn, GPT-NeoX's query_key_value and Phi's qkv_proj"
    )


def find_kv(model: PreTrainedModel) -> list[TrainedParameter]:
    """The parameters that hold W_K and W_V, one or two per attention layer, in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form, or they are quantized.
        NotImplementedError: a model under PEFT, or latent attention (MLA), where keys and values are made of what is
            no W_K or W_V.
    """
    if isinstance(model, PeftModel):
        raise NotImplementedError(f"W_K and W_V are under {model.peft_type}; merge the adapter (merge_and_unload)")
    names = _attention_names(model)
    found = [item for name in names for item in _key_value_of_module(name, model.get_submodule(name))]
    for item in found:
        if not (parameter := model.get_parameter(item.name)).is_floating_point():
            raise ValueError(f"{item.name} is quantized to {parameter.dtype}; load the model in bfloat16 or float32")
    return found


class KeyValueUpdate:
    """What is added to W_K and W_V of a model, zero at first; nothing changes before :meth:`write`.

    Args:
        model: its weights at this moment are what updates are added to.

    Attributes:
        parts: W_K and W_V, which may be parts of parameters.
        deltas: float32, one of the shape of each part.

    Raises:
        ValueError: as :func:`find_kv`.
        NotImplementedError: as there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = find_kv(model)
        self._parameters = [model.get_parameter(item.name) for item in self.parts]
        self._base = [item.view(p.detach()).clone() for item, p in zip(self.parts, self._parameters, strict=True)]
        self.deltas = [torch.zeros_like(base, dtype=torch.float32) for base in self._base]

    @contextmanager
    def trained(self) -> Iterator[list[nn.Parameter]]:
        """The parameters, whole, which require a gradient for the time being."""
        before = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield self._parameters
        finally:
            for parameter, required in zip(self._parameters, before, strict=True):
                parameter.requires_grad_(required)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """One step of plain SGD, written into the model; gradients of the whole parameters, in their order."""
        for item, delta, gradient in zip(self.parts, self.deltas, gradients, strict=True):
            delta.sub_(item.view(gradient).float(), alpha=learning_rate)
        self.write()

    def random_like(self, generator: torch.Generator) -> KeyValueUpdate:
        """A random update of the same model, each part normal and as long (Frobenius norm) as this one's."""
        other = copy.copy(self)
        noises = [torch.randn(delta.shape, generator=generator).to(delta.device) for delta in self.deltas]
        pairs = zip(noises, self.deltas, strict=True)
        other.deltas = [noise * (delta.norm() / noise.norm()) for noise, delta in pairs]
        return other

    @torch.no_grad()
    def write(self) -> None:
        """Makes the model's weights those at the start plus this update."""
        for item, parameter, base, delta in zip(self.parts, self._parameters, self._base, self.deltas, strict=True):
            item.view(parameter).copy_(base.float() + delta)
