"""The ABFT step that CPU and GPU benchmarks time: this package's two gradient modes, and the published code's shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import abft

__all__ = ["label_groups", "packed_step", "reference_step"]

LABELS = 8  # labelled keys of a prompt, half of them correct


def label_groups(prompts: int, length: int, device: Any = None) -> Tensor:
    """Return key groups `(prompts, length)`: eight labels over each prompt, correct (0) and wrong (1) in turn."""
    groups = torch.full((prompts, length), -1, dtype=torch.int8, device=device)
    places = torch.arange(1, LABELS + 1, device=device) * length // 10
    groups[:, places] = (torch.arange(LABELS, device=device) % 2).to(torch.int8)
    return groups


def _loss(masses: Any, ids: Tensor) -> Tensor:
    """Return the ABFT loss of the prompts in `masses`, as their share of the mean over all prompts in `ids`."""
    prompts, length = ids.shape
    ones = torch.ones(masses[0].shape[0], dtype=torch.long, device=ids.device)
    terms = abft.abft_loss(masses, LABELS // 2 * ones, LABELS * ones, length * ones, head_filter=False)
    return terms.per_prompt.sum() / prompts


def reference_step(model: Any, ids: Tensor, groups: Tensor) -> None:
    """Compute the gradients as the published code does.

    Full attention matrices and full logits, one prompt at a time, gradients accumulated. The model must run eager
    attention.
    """
    indicator = torch.stack([groups == 0, groups == 1], dim=-1).float()
    for prompt in range(len(ids)):
        outputs = model(input_ids=ids[prompt : prompt + 1], output_attentions=True, use_cache=False)
        masses = [attention[:, :, -1:].float() @ indicator[prompt, None, None] for attention in outputs.attentions]
        _loss(masses, ids).backward()


def packed_step(model: Any, ids: Tensor, groups: Tensor, *, restricted: bool) -> None:
    """Compute the gradients with `abft.layer_masses` on packed prompts; `restricted`: inside the forward pass."""
    prompts, length = ids.shape
    bounds = torch.arange(prompts + 1, device=ids.device, dtype=torch.int32) * length
    inputs: dict[str, Any] = {
        "input_ids": ids.view(1, -1),
        "key_groups": groups.view(1, -1),
        "query_positions": bounds[1:, None] - 1,
    }
    if prompts > 1:
        inputs["cu_seqlens"] = bounds

    def backward(mass: Tensor) -> Tensor:
        _loss([mass], ids).backward()
        return mass.detach()

    if restricted:
        abft.layer_masses(model, **inputs, detach=True, on_mass=backward)
    else:
        _loss(abft.layer_masses(model, **inputs), ids).backward()
