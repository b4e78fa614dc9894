"""The distance that training moved W_Q and W_K, and the plane between two trained models.

Source: arXiv 2505.14233, Fig. 7 and Eq. 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.analysis.plane import measure_plane
from abft.models.projections import find_qk
from abft.models.weights import from_pretrained
from abft.prompts.builder import PromptSet

__all__ = ["mode_connectivity", "moved", "qk_difference", "weight_distance"]


def _trained_parts(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return W_Q and W_K by name, as views of the model's own parameters."""
    parameters = dict(model.named_parameters())
    return {item.name: item.view(parameters[item.name].detach()) for item in find_qk(model)}


def qk_difference(base: PreTrainedModel, folder: str | os.PathLike[str], **loading: Any) -> dict[str, Tensor]:
    """Return what training added to W_Q and W_K: name → difference, in the base's shapes, fp32 on its device.

    Args:
        base: the model that was trained, on the `"abft"` attention; not quantized.
        folder: written by `abft train`: W_Q and W_K in full, or adapters, which are merged here.
        loading: arguments for `from_pretrained` of the trained model.

    Raises:
        FileNotFoundError, ValueError: as :func:`abft.from_pretrained`.
    """
    trained = from_pretrained(folder, base.config.name_or_path, **loading)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    before, after = _trained_parts(base), _trained_parts(trained)
    return {name: after[name].to(tensor.device, torch.float32) - tensor.float() for name, tensor in before.items()}


def weight_distance(base: PreTrainedModel, difference: Mapping[str, Tensor]) -> Tensor:
    """Return the relative distance by layer, `(L,)` fp32: ‖ΔW‖ / ‖W‖, Frobenius norms over the layer's W_Q and W_K.

    Args:
        base: the untrained model.
        difference: returned by :func:`qk_difference`.
    """
    parts = _trained_parts(base)
    layers = list(dict.fromkeys(_layer(name) for name in parts))

    def norm(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
        squares = [tensor.float().square().sum() for name, tensor in tensors.items() if _layer(name) == layer]
        return torch.stack(squares).sum().sqrt()

    return torch.stack([norm(difference, layer) / norm(parts, layer) for layer in layers]).cpu()


def _layer(name: str) -> str:
    """Return the attention module that a projection belongs to."""
    return name.rsplit(".", 2)[0]


@contextmanager
def moved(
    model: PreTrainedModel, differences: Sequence[Mapping[str, Tensor]], factors: Sequence[float]
) -> Iterator[None]:
    """Set W_Q and W_K to θ₀ + Σ factor·difference inside the block; restore θ₀ bit for bit afterwards."""
    parts = _trained_parts(model)
    originals = {name: tensor.clone() for name, tensor in parts.items()}
    try:
        for name, tensor in parts.items():
            change = sum(factor * difference[name] for factor, difference in zip(factors, differences, strict=True))
            tensor.copy_(originals[name].float() + change)
        yield
    finally:
        for name, tensor in parts.items():
            tensor.copy_(originals[name])


def mode_connectivity(
    model: PreTrainedModel,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    prompts: PromptSet,
    *,
    factors: Sequence[float] = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure accuracy and mean log-likelihood over the plane θ₀ + λ₁(θ₁ − θ₀) + λ₂(θ₂ − θ₀) (Eq. 2).

    Args:
        model: θ₀, with float parameters; unchanged afterwards.
        first, second: θ₁ − θ₀ and θ₂ − θ₀, from :func:`qk_difference`.
        prompts: the prompts to classify.
        factors: F values that λ₁ and λ₂ take.
        batch_size: prompts per forward pass.
        progress: show a progress bar over the F² points.

    Returns:
        Plain data, as :func:`abft.analysis.plane.measure_plane`.
    """
    return measure_plane(
        model,
        lambda *point: moved(model, (first, second), point),
        prompts,
        factors=factors,
        batch_size=batch_size,
        progress=progress,
    )
