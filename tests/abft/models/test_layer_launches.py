"""Launches of a layer's attention and masses in a training step, forward and backward, as on a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from launches import Launches, counted
from tiny_models import packed, padded, random_prompts, tiny
from torch import Tensor

from abft.models.attention import enable
from abft.models.collector import Layer
from abft.models.masses import layer_masses
from abft.models.projections import train_parameters
from abft_kernels.triton import rows

LENGTHS = (20, 13)


class _Nothing(torch.autograd.Function):
    """An attention and a mass that launch nothing: memory in the layouts that the projections want."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rows: int):
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        return out, q.new_empty(rows, q.shape[1], 1, 2)

    @staticmethod
    def backward(ctx, *_):
        return (*(torch.empty_like(x) for x in ctx.saved_tensors), None)


def _without_attention(monkeypatch) -> None:
    def both(layer, request):
        return _Nothing.apply(layer.query, layer.key, layer.value, len(request.query_positions))

    monkeypatch.setattr(Layer, "output_and_mass", both)
    monkeypatch.setattr(Layer, "mass", lambda layer, request: both(layer, request)[1])
    monkeypatch.setattr(Layer, "output", lambda layer: layer.query.detach())


def _batch(layout: str) -> dict[str, Tensor]:
    prompts, groups = random_prompts(LENGTHS if layout != "even" else (20, 20))
    if layout == "packed":
        return packed(prompts, groups)
    batch = padded(prompts, groups, "left")
    lengths = batch.pop("attention_mask").sum(1)
    if layout == "left":
        batch |= {"seq_lens": lengths, "seq_starts": max(LENGTHS) - lengths}
    return batch


def _step(layers: int, batch: dict[str, Tensor], restricted: bool):
    model = enable(tiny("llama", num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1))
    train_parameters(model)

    def backward(mass: Tensor) -> Tensor:
        mass.sum().backward()
        return mass.detach()

    def step() -> None:
        if restricted:
            layer_masses(model, **batch, detach=True, on_mass=backward)
        else:
            torch.stack(layer_masses(model, **batch)).sum().backward()

    for parameter in model.parameters():  # the next gradients are added, in every layer
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return step


def _of_two_layers(batch: dict[str, Tensor], restricted: bool, launches: Launches) -> Counter[str]:
    four, two = (counted(launches, _step(layers, batch, restricted)) for layers in (4, 2))
    four.subtract(two)
    return four


@pytest.mark.parametrize(
    ("layout", "restricted", "most"),
    [
        ("packed", False, 6),
        ("left", False, 6),
        ("even", False, 7),
        ("packed", True, 4),
        ("left", True, 4),
    ],
)
def test_launches_of_a_layer(layout, restricted, most, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("counts in Triton's interpreter")
    monkeypatch.setattr(rows, "_multiprocessors", lambda device: 132)
    launches, batch = Launches(monkeypatch), _batch(layout)
    found = _of_two_layers(batch, restricted, launches)
    _without_attention(monkeypatch)
    found.subtract(_of_two_layers(batch, restricted, launches))
    each = {name: count / 2 for name, count in found.items() if count}
    assert sum(each.values()) <= most, each
