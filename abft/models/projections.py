"""The places of W_Q, W_K and W_V in the attention layers of each architecture; training W_Q, W_K and the LM head.

`ARCHITECTURES` has one row per kind of attention layer; everything else here reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Projection",
    "Scope",
    "TrainedParameter",
    "attention_modules",
    "find_head",
    "find_kv",
    "find_parts",
    "find_qk",
    "find_trained",
    "first_projections",
    "head_in_float32",
    "lora_qk",
    "train_parameters",
    "untie_head",
]


Scope: TypeAlias = Literal["qk", "qk_head", "model"]
"""What is trained: W_Q and W_K, these and the LM head, or all parameters."""


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that is trained, whole or in part: some of W_Q, W_K and W_V, or a parameter of the LM head.

    Args:
        name: full name in the model's `state_dict`.
        dim: the output dimension of a fused projection; None for the whole parameter.
        length: entries along `dim`, of each block.
        start: the first of them.
        blocks: equal parts of `dim`, the heads, if a projection holds q, k and v head by head.
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
        """Return the part of `tensor`, without a copy; several blocks are a dimension of their own."""
        if self.dim is None or self.length is None:
            return tensor
        if self.blocks == 1:
            return tensor.narrow(self.dim, self.start, self.length)
        return tensor.unflatten(self.dim, (self.blocks, -1)).narrow(self.dim + 1, self.start, self.length)


@dataclass(frozen=True)
class Projection:
    """A linear layer of an attention module, and the order of q, k and v among its outputs.

    Args:
        child: name of the layer in the attention module.
        parts: what the outputs are, in their order: "q", "k", "v", or "latent" (k and v are computed from it),
            each with its number of outputs. A layer that holds one of them needs no number.
        blocks: equal blocks of outputs, each of them in this order: the heads, if they are stored head by head.
        dim: dimension of the outputs in the weight: 0 for `nn.Linear`, 1 for `Conv1D`.
    """

    child: str
    parts: Mapping[str, int | None]
    blocks: int = 1
    dim: int = 0

    def select(self, module_name: str, wanted: Collection[str]) -> TrainedParameter | None:
        """Return the wanted part of the weight; None if it holds nothing of it.

        Raises:
            ValueError: other outputs lie between the wanted ones.
        """
        name = f"{module_name}.{self.child}.weight"
        inside = [part in wanted for part in self.parts]
        if not any(inside):
            return None
        if all(inside):
            return TrainedParameter(name)
        sizes = [size or 0 for size in self.parts.values()]
        first, last = inside.index(True), len(inside) - inside[::-1].index(True)
        if not all(inside[first:last]):
            raise ValueError(f"{name}: {', '.join(wanted)} are not side by side in {', '.join(self.parts)}")
        return TrainedParameter(name, self.dim, sum(sizes[first:last]), sum(sizes[:first]), self.blocks)


_Children = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Architecture:
    """One kind of attention module.

    Args:
        name: how error messages call it.
        matches: true for the attention modules of this kind; takes the module and its children by name.
        projections: returns the projections of such a module; those that it lacks are left out.
    """

    name: str
    matches: Callable[[nn.Module, _Children], bool]
    projections: Callable[[Any, Any], tuple[Projection, ...]]


def _is_conv1d_of_three(module: nn.Module, children: _Children) -> bool:
    fused = children.get("c_attn")
    return isinstance(fused, Conv1D) and fused.nf == 3 * fused.nx


def _grouped(attention: Any, layer: nn.Linear) -> dict[str, int | None]:
    """Return q, k and v side by side, with as many heads as the configuration says."""
    heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    head_dim = layer.out_features // (heads + 2 * kv_heads)
    return {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "q_proj, k_proj and v_proj",
        lambda module, children: {"q_proj", "k_proj"} <= children.keys(),
        lambda module, children: tuple(Projection(f"{part}_proj", {part: None}) for part in "qkv"),
    ),
    Architecture(
        "GPT-2's c_attn",
        _is_conv1d_of_three,
        lambda module, children: (Projection("c_attn", dict.fromkeys("qkv", children["c_attn"].nx), dim=1),),
    ),
    Architecture(
        "GPT-NeoX's query_key_value",
        lambda module, children: type(module).__name__.startswith("GPTNeoX") and "query_key_value" in children,
        lambda module, children: (
            Projection(
                "query_key_value",
                dict.fromkeys("qkv", module.config.hidden_size // module.config.num_attention_heads),
                blocks=module.config.num_attention_heads,
            ),
        ),
    ),
    Architecture(
        "latent attention (MLA)",  # as in DeepSeek-V3
        lambda module, children: {"kv_a_proj_with_mqa", "kv_b_proj"} <= children.keys(),
        lambda module, children: (
            *(Projection(name, {"q": None}) for name in ("q_proj", "q_a_proj", "q_b_proj")),
            # v is computed from the latent too: of the rows of this layer only the rotary keys are W_K.
            Projection(
                "kv_a_proj_with_mqa", {"latent": module.config.kv_lora_rank, "k": module.config.qk_rope_head_dim}
            ),
            Projection(
                "kv_b_proj",
                {"k": module.config.qk_nope_head_dim, "v": module.config.v_head_dim},
                blocks=module.config.num_attention_heads,
            ),
        ),
    ),
    Architecture(
        "Phi's qkv_proj",
        # Other models' qkv_proj (CodeGen, MiniMax) interleaves q, k and v by head.
        lambda module, children: (
            isinstance(children.get("qkv_proj"), nn.Linear) and type(module).__name__.startswith(("Phi3", "Phi4"))
        ),
        lambda module, children: (Projection("qkv_proj", _grouped(module, children["qkv_proj"])),),
    ),
)
"""The kinds of attention modules, each in one row; the first that matches counts."""


def _known() -> str:
    return "; ".join(architecture.name for architecture in ARCHITECTURES)


def _projections(module: nn.Module) -> tuple[Projection, ...]:
    """Return the projections that the module has; none if it is no attention module of a known kind."""
    children = dict(module.named_children())
    for architecture in ARCHITECTURES:
        if architecture.matches(module, children):
            return tuple(item for item in architecture.projections(module, children) if item.child in children)
    return ()


def first_projections(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that hold W_Q, W_K or W_V in the first attention layer.

    None if its kind is not known, or under adapters, whose layers have names of their own.
    """
    for module in model.modules():
        projections = _projections(module)
        if projections and all(isinstance(getattr(module, item.child), (nn.Linear, Conv1D)) for item in projections):
            return [module.get_parameter(f"{item.child}.weight") for item in projections]
    return []


def _attention_layers(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[Projection, ...]]]:
    """Return the attention module of each layer and its projections by name, in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form.
    """
    found = {
        name: (module, projections) for name, module in model.named_modules() if (projections := _projections(module))
    }
    config = getattr(model, "config", None)
    expected = config.get_text_config().num_hidden_layers if config is not None else len(found)
    if not found or len(found) != expected:
        raise ValueError(
            f"found q and k projections in {len(found)} of {expected} layers of {type(model).__name__}; known are "
            f"{_known()}. For other names train with LoRA and name them (lora_target_modules)"
        )
    return found


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention module of each layer, in the model's order.

    Raises:
        ValueError: not every layer has q and k projections of a known form.
    """
    return [module for module, _ in _attention_layers(model).values()]


def find_parts(model: nn.Module, wanted: Collection[str]) -> list[TrainedParameter]:
    """Return the parameters that hold the wanted ones of "q", "k" and "v", in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form.
    """
    return [
        part
        for name, (_, projections) in _attention_layers(model).items()
        for projection in projections
        if (part := projection.select(name, wanted)) is not None
    ]


def find_qk(model: nn.Module) -> list[TrainedParameter]:
    """Return the parameters that hold W_Q and W_K, one or more per attention layer, in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form.
    """
    return find_parts(model, ("q", "k"))


def find_kv(model: PreTrainedModel) -> list[TrainedParameter]:
    """Return the parameters that hold W_K and W_V, one or two per attention layer, in the model's order.

    Raises:
        ValueError: not every layer has projections of a known form, or they are quantized.
        NotImplementedError: a model under PEFT, or latent attention (MLA), where no W_K and W_V exist.
    """
    if isinstance(model, PeftModel):
        raise NotImplementedError(f"W_K and W_V are under {model.peft_type}; merge the adapter (merge_and_unload)")
    for module, projections in _attention_layers(model).values():
        parts = {part for projection in projections for part in projection.parts}
        if "latent" in parts or not {"k", "v"} <= parts:
            raise NotImplementedError(
                f"{type(module).__name__} has no W_K and W_V of its own "
                f"({', '.join(projection.child for projection in projections)}); load a model that has them"
            )
    found = find_parts(model, ("k", "v"))
    for item in found:
        if not (parameter := model.get_parameter(item.name)).is_floating_point():
            raise ValueError(f"{item.name} is quantized to {parameter.dtype}; load the model in bfloat16 or float32")
    return found


def _head(model: PreTrainedModel) -> tuple[str, Any]:
    """Return name and module of the LM head.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if head is not None and module is head:
            return name, module
    raise ValueError(f"{type(model).__name__} has no LM head to train; use method='e2e_qk', which trains W_Q and W_K")


def find_head(model: PreTrainedModel) -> list[TrainedParameter]:
    """Return the parameters of the LM head, by the names that they have once it is untied (:func:`untie_head`).

    Raises:
        ValueError: the model has no LM head.
    """
    name, head = _head(model)
    return [TrainedParameter(f"{name}.{part}") for part, _ in head.named_parameters()]


def untie_head(model: PreTrainedModel) -> None:
    """Give the LM head a weight of its own if it shares that of the input embeddings, which then stay as they are.

    The model computes what it did before. Its configuration says from now on that the two are not tied, so that
    `save_pretrained` writes both.
    """
    name, head = _head(model)
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    tied: Any = model.all_tied_weights_keys
    tied.pop(f"{name}.weight", None)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def head_in_float32(model: PreTrainedModel) -> str:
    """Untie the LM head, and let it compute in float32 whatever the hidden states are; return its name."""
    untie_head(model)
    name, head = _head(model)
    head.float().register_forward_pre_hook(_in_dtype_of_weight)
    return name


def _in_dtype_of_weight(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(hidden.to(module.weight.dtype) for hidden in arguments)


def find_trained(model: PreTrainedModel, scope: Scope) -> list[TrainedParameter]:
    """Return the parameters of a scope: W_Q and W_K, these and the LM head, or all.

    Raises:
        ValueError: projections of an unknown form, or no LM head.
    """
    if scope == "model":
        return [TrainedParameter(name) for name, _ in model.named_parameters()]
    return find_qk(model) + (find_head(model) if scope == "qk_head" else [])


def train_parameters(model: PreTrainedModel, scope: Scope = "qk") -> list[TrainedParameter]:
    """Make W_Q and W_K, or the parameters of another scope, the only ones that require a gradient; return them.

    In a fused projection the gradient of the value part is zeroed as it arrives, so that part does not move under
    any optimizer without weight decay. With the scope `"qk_head"` the LM head is untied from the input embeddings.

    Args:
        model: a causal decoder.
        scope: as for :func:`find_trained`.

    Raises:
        ValueError: projections of an unknown form, quantized ones, or no LM head.
    """
    trained = find_trained(model, scope)
    for item in trained:
        if not (parameter := model.get_parameter(item.name)).is_floating_point():
            raise ValueError(f"{item.name} is quantized to {parameter.dtype}; train it with LoRA (lora=True)")
    model.requires_grad_(False)
    if scope == "qk_head":
        untie_head(model)
    parameters = dict(model.named_parameters())
    for item in trained:
        parameters[item.name].requires_grad_(True)
        if item.fused:
            parameters[item.name].register_hook(_keeping(item))
    return trained


def _keeping(item: TrainedParameter) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        item.view(kept).copy_(item.view(gradient))
        return kept

    return hook


def lora_qk(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: int = 32,
    target_modules: list[str] | None = None,
    head: bool = False,
) -> PeftModel:
    """Wrap `model` with LoRA on the q and k projections (r = 16 in the paper), through PEFT.

    Args:
        model: a causal decoder.
        r, alpha: rank of LoRA, and its scale times r.
        target_modules: modules to adapt; None for the q and k projections.
        head: train the LM head too, in full, in float32 and untied from the input embeddings (PEFT's
            `modules_to_save`).

    Raises:
        ValueError: r below 1, a fused projection (LoRA would move v too), target modules that the model lacks, or no
            LM head.
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
    saved = [head_in_float32(model)] if head else None
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=target_modules, modules_to_save=saved, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)
