"""W_K and W_V of every attention layer, and updates of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abft.parameters import TrainedParameter, find_qk

__all__ = ["KeyValueUpdate", "attention_modules", "find_kv"]


def _attention_names(model: nn.Module) -> list[str]:
    """Names of the attention modules, in the model's order: those that hold W_Q and W_K."""
    return list(dict.fromkeys(item.name.rsplit(".", 2)[0] for item in find_qk(model)))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, in the model's order.

    Raises:
        ValueError: not every layer has q and k projections of a known form.
    """
    return [model.get_submodule(name) for name in _attention_names(model)]


def _of_module(name: str, module: nn.Module) -> list[TrainedParameter]:
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
    found = [item for name in names for item in _of_module(name, model.get_submodule(name))]
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
