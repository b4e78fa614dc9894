"""MetaICL trains the whole model: every parameter moves, and what is saved is the model."""

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny
from trainers import arguments, assert_same_trajectory, logits_of, saved_and_loaded, trained
from transformers import AutoModelForCausalLM

import abft
from abft.analysis.weight_change import moved, trained_difference, weight_shift
from abft.models.projections import find_qk
from abft.models.weights import merge
from abft.training.plan import plan

OPTIONS = {"method": "metaicl", "num_train_epochs": 1}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_saved_is_the_whole_model(kind, tied, toy_prompts, toy_builder, tmp_path):
    model = saved_and_loaded(tmp_path / "base", kind, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    trainer = trained(model, toy_prompts, toy_builder, tmp_path / "run", **OPTIONS)
    trainer.save_model(str(tmp_path / "trained"))
    unmoved = {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])}
    assert not unmoved
    assert trainer.trained_parameters() == sum(tensor.numel() for tensor in before.values())
    with safe_open(tmp_path / "trained" / "qk_weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(before)
    loaded = abft.from_pretrained(tmp_path / "trained", str(tmp_path / "base"))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    merge(str(tmp_path / "base"), tmp_path / "trained", tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_way_from_the_base(kind, toy_prompts, toy_builder, tmp_path):
    """All that training added, and the base again; W_Q and W_K are measured apart from the rest."""
    model = saved_and_loaded(tmp_path / "base", kind, tie_word_embeddings=True)
    trainer = trained(model, toy_prompts, toy_builder, tmp_path / "run", **OPTIONS)
    trainer.save_model(str(tmp_path / "trained"))
    start = abft.enable(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    want = logits_of(start)
    difference = trained_difference(start, tmp_path / "trained")
    shift = weight_shift(start, difference)
    parts = {item.name: item for item in find_qk(start)}
    change = sum(
        (item.view(model.get_parameter(name)) - item.view(start.get_parameter(name))).square().sum()
        for name, item in parts.items()
    )
    torch.testing.assert_close((shift["q"].square() + shift["k"].square()).sum(), change.detach())
    with moved(start, [difference], [1.0]):
        torch.testing.assert_close(logits_of(start), logits_of(model))
    assert torch.equal(logits_of(start), want)


def test_resumed_training_has_all_parameters(toy_prompts, toy_builder, tmp_path):
    changes = {**OPTIONS, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    models = [saved_and_loaded(tmp_path / "base") for _ in range(2)]
    whole = trained(models[0], toy_prompts, toy_builder, tmp_path / "a", **changes)
    resume = str(tmp_path / "a" / "checkpoint-2")
    again = trained(models[1], toy_prompts, toy_builder, tmp_path / "b", resume=resume, **changes)
    assert_same_trajectory(whole, again)


def test_a_16_bit_model_trains_in_float32(toy_prompts, toy_builder, tmp_path):
    model = saved_and_loaded(tmp_path / "base", dtype=torch.bfloat16)
    trained(model, toy_prompts, toy_builder, tmp_path / "run", **OPTIONS)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_adapters_and_restricted_gradients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trains the whole model, not adapters; leave lora off"):
        arguments(tmp_path, method="metaicl", lora=True)
    with pytest.raises(ValueError, match="method='metaicl' has a loss at the last layer only"):
        arguments(tmp_path, method="metaicl", restricted_gradient=True)


def test_its_memory_is_planned(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    options = {"context": 64, "mode": "metaicl"}
    found = plan(str(tmp_path), precision="float32", **options).parts["gradients and Adam"]
    assert found == 3 * 4 * sum(tensor.numel() for tensor in model.parameters())
    with pytest.raises(ValueError, match="mode='metaicl' trains the whole model; leave lora and nf4 off"):
        plan(str(tmp_path), precision="float32", lora=True, **options)
