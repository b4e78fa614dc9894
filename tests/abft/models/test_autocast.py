"""Every pass under the user's own autocast: masses stay float32, and results stay near those of float32."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import packed, padded, random_prompts, tiny

import abft
from abft.analysis.heads import induction_scores
from abft.analysis.implicit import compare_with_fine_tuning
from abft.analysis.momentum_gain import momentum_gain
from abft.evaluation.classification import label_logits
from abft.models.masses import forward_with_mass, layer_masses
from abft.models.mixed_precision import computing
from abft.models.projections import train_parameters
from abft.prompts.collation import Collator
from abft.prompts.examples import Example
from abft.prompts.targets import AttentionTarget

LAYOUTS = ["right", "left", "packed"]
NEAR = {"atol": 2e-2, "rtol": 2e-2}


def autocast(on: bool):
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def batch_of(layout):
    prompts = random_prompts((9, 5, 12))
    return packed(*prompts) if layout == "packed" else padded(*prompts, layout)


@pytest.fixture
def model():
    return abft.enable(tiny("llama"))


def both(compute):
    """Return what `compute` gives without and with autocast, which must differ: autocast reached the pass."""
    plain = compute()
    with autocast(True):
        rounded = compute()
    return plain, rounded


def assert_near(plain, rounded):
    assert all(mass.dtype == torch.float32 for mass in rounded)
    assert any(not torch.equal(a, b) for a, b in zip(plain, rounded, strict=True))
    for a, b in zip(plain, rounded, strict=True):
        torch.testing.assert_close(b, a, **NEAR)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attention_mass_and_forward_with_mass(kind, layout):
    model, batch = abft.enable(tiny(kind)), batch_of(layout)
    assert_near(*both(lambda: abft.attention_mass(model, **batch)))
    assert_near(*both(lambda: forward_with_mass(model, **batch).attentions))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["full", "restricted", "checkpointed"])
def test_layer_masses_and_their_gradients(way, layout, model):
    names = [item.name for item in train_parameters(model)]
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch, gradients = batch_of(layout), []

    def compute():
        model.zero_grad()
        masses = layer_masses(model, **batch, detach=way == "restricted")
        torch.stack([mass.square().sum() for mass in masses]).sum().backward()
        gradients.append(torch.cat([model.get_parameter(name).grad.flatten() for name in names]))
        return [mass.detach() for mass in masses]

    assert_near(*both(compute))
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_gradients_inside_the_forward_pass(model):
    """`on_mass` calls backward under autocast, as restricted training does."""
    names = [item.name for item in train_parameters(model)]

    def backward(mass):
        with torch.autocast("cpu", enabled=False):
            mass.square().sum().backward()
        return mass.detach()

    plain, rounded = both(lambda: layer_masses(model, **batch_of("packed"), detach=True, on_mass=backward))
    assert_near(plain, rounded)
    assert all(model.get_parameter(name).grad.dtype == torch.float32 for name in names)


def test_label_logits_are_not_rounded(model, toy_prompts):
    batch = Collator(toy_prompts.pad_token_id)(toy_prompts[:8])
    plain, rounded = both(lambda: label_logits(model, batch, toy_prompts.label_token_ids))
    assert_near([plain], [rounded])
    assert not torch.equal(rounded, rounded.bfloat16().float())


def test_evaluation_of_prompts_and_heads(model, toy_prompts):
    plain, rounded = both(lambda: abft.evaluate(model, toy_prompts, progress=False).probabilities)
    assert_near([plain], [rounded])
    plain, rounded = both(lambda: abft.head_statistics(model, toy_prompts, progress=False))
    assert_near([plain.mass_correct, plain.mass_wrong], [rounded.mass_correct, rounded.mass_wrong])


def test_evaluation_of_targets(model):
    targets = [AttentionTarget(range(3, 3 + n), [n - 1], [1, 2], label_id=4) for n in (8, 12, 9)]
    plain, rounded = both(lambda: abft.evaluate(model, targets, progress=False))
    assert_near([plain.positive_mass, plain.negative_mass], [rounded.positive_mass, rounded.negative_mass])


def test_momentum(model, toy_prompts):
    plain, rounded = both(lambda: abft.evaluate(model, toy_prompts, progress=False, momentum=0.1).probabilities)
    assert_near([plain], [rounded])
    with autocast(True):
        assert momentum_gain(model, toy_prompts[:8], [0.1], progress=False).n == 8


def test_the_probes_of_implicit_fine_tuning(model, toy_builder):
    demonstrations = [Example(f"w{i} w{i + 1}", i % 2) for i in range(4)]
    queries = [Example(f"w{i + 7} w{i}", i % 2) for i in range(6)]

    def compute():
        found = compare_with_fine_tuning(model, toy_builder, demonstrations, queries, progress=False)
        return [found.sim_am_before, found.sim_am]

    assert_near(*both(compute))


def test_induction_heads_of_random_tokens(model):
    plain, rounded = both(lambda: induction_scores(model, length=48, vocabulary=range(3, 50), progress=False))
    assert_near([plain], [rounded])


def test_only_a_half_precision_base_with_float32_masters_switches_autocast_on(model):
    assert not torch.is_autocast_enabled("cpu")
    half = abft.enable(tiny("llama")).bfloat16()
    for plain in (model, half):
        with computing(plain):
            assert not torch.is_autocast_enabled("cpu")
    for item in train_parameters(half):
        half.get_parameter(item.name).data = half.get_parameter(item.name).data.float()
    with computing(half):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", torch.float16), computing(half):
        assert torch.get_autocast_dtype("cpu") == torch.float16
