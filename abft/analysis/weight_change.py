"""The distance that training moved W_Q and W_K, and the plane between two trained models.

Source: arXiv 2505.14233, appendix B for the distance, Fig. 7 and Eq. 2 for the plane.
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
from abft.models.projections import find_head, find_parts, find_qk, untie_head
from abft.models.weights import from_pretrained
from abft.prompts.builder import PromptSet

__all__ = ["mode_connectivity", "moved", "trained_difference", "weight_shift"]


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all parameters by name, those of the LM head by their own even if they are tied."""
    head = {item.name: model.get_parameter(item.name) for item in find_head(model)}
    return {name: tensor.detach() for name, tensor in {**dict(model.named_parameters()), **head}.items()}


def trained_difference(base: PreTrainedModel, folder: str | os.PathLike[str], **loading: Any) -> dict[str, Tensor]:
    """Return what training added to the parameters: name → difference, in the base's shapes, fp32.

    The tensors lie on the base's device. W_Q and W_K are always there, others only where training moved them.

    Args:
        base: the model that was trained, on the `"abft"` attention; not quantized.
        folder: written by `abft train`: weights in full, or adapters, which are merged here.
        loading: arguments for `from_pretrained` of the trained model.

    Raises:
        FileNotFoundError, ValueError: as :func:`abft.from_pretrained`.
    """
    trained = from_pretrained(folder, base.config.name_or_path, **loading)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    after, projections = _parameters(trained), {item.name for item in find_qk(base)}
    found = {}
    for name, before in _parameters(base).items():
        difference = after[name].to(before.device, torch.float32) - before.float()
        if name in projections or difference.any():
            found[name] = difference
    return found


def weight_shift(base: PreTrainedModel, difference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how far training moved W_Q and W_K, by layer, in Frobenius norms, each `(L,)` fp32 on the CPU.

    Args:
        base: the untrained model.
        difference: returned by :func:`trained_difference`.

    Returns:
        `q` and `k`, ‖ΔW_Q‖ and ‖ΔW_K‖ (arXiv 2505.14233, appendix B), and `relative`, ‖ΔW‖ / ‖W‖ over both.
    """
    q, k = (
        _norm_by_layer({item.name: item.view(difference[item.name]) for item in find_parts(base, (part,))})
        for part in ("q", "k")
    )
    whole = {item.name: item.view(base.get_parameter(item.name).detach()) for item in find_qk(base)}
    return {"q": q, "k": k, "relative": (q.square() + k.square()).sqrt() / _norm_by_layer(whole)}


def _norm_by_layer(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the Frobenius norm over each layer's tensors, `(L,)`; they are named and in the order of the layers."""
    squares: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.rsplit(".", 2)[0]  # the attention module that the projection belongs to
        squares[layer] = squares.get(layer, torch.zeros((), device=tensor.device)) + tensor.float().square().sum()
    return torch.stack(list(squares.values())).sqrt().cpu()


@contextmanager
def moved(
    model: PreTrainedModel, differences: Sequence[Mapping[str, Tensor]], factors: Sequence[float]
) -> Iterator[None]:
    """Set the weights to θ₀ + Σ factor·difference inside the block; restore θ₀ bit for bit afterwards.

    A name that a difference lacks does not move by it. If one holds the LM head, the model's is untied from the input
    embeddings, for good.
    """
    names = set().union(*differences)
    if any(item.name in names for item in find_head(model)):
        untie_head(model)
    parts = {name: tensor for name, tensor in _parameters(model).items() if name in names}
    originals = {name: tensor.clone() for name, tensor in parts.items()}
    try:
        for name, tensor in parts.items():
            pairs = zip(factors, differences, strict=True)
            change = sum(factor * difference[name] for factor, difference in pairs if name in difference)
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
        first, second: θ₁ − θ₀ and θ₂ − θ₀, from :func:`trained_difference`.
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
