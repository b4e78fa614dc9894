"""E2E trains the LM head beside W_Q and W_K: tied or not, in full or beside adapters, saved, loaded and merged."""

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_models import tiny
from trainers import arguments, assert_same_trajectory, logits_of, saved_and_loaded, trained, trainer_of
from transformers import AutoModelForCausalLM

import abft
from abft.models.projections import find_head, find_parts, find_qk, untie_head
from abft.models.weights import load_trained, merge
from abft.training.plan import plan


def end_to_end(folder, prompts, builder, model, **changes):
    """Train for four steps and save to `folder/trained`."""
    trainer = trained(model, prompts, builder, folder / "run", method="e2e", num_train_epochs=2, **changes)
    trainer.save_model(str(folder / "trained"))
    return trainer


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_head_moves_and_the_embeddings_stay(kind, tied, toy_prompts, toy_builder, tmp_path):
    model = saved_and_loaded(tmp_path / "base", kind, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {item.name: item for item in (*find_qk(model), *find_head(model))}
    trainer = end_to_end(tmp_path, toy_prompts, toy_builder, model)
    for name, tensor in model.state_dict().items():
        moved = tensor != before[name]
        if name in parts:
            assert parts[name].view(moved).float().mean() > 0.5, name
            assert moved.sum() == parts[name].view(moved).sum(), name
        else:
            assert not moved.any(), name
    head = model.get_output_embeddings().weight
    assert head is not model.get_input_embeddings().weight
    qk = sum(item.view(model.get_parameter(item.name)).numel() for item in find_qk(model))
    assert trainer.trained_parameters() == qk + head.numel()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("dtype", "lora"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["full", "lora", "lora-bfloat16"],
)  # fmt: skip
def test_what_is_saved_is_the_model(dtype, lora, tied, toy_prompts, toy_builder, tmp_path):
    """Loaded on top of the base, and merged into a folder that works without this package."""
    model = saved_and_loaded(tmp_path / "base", dtype=dtype, tie_word_embeddings=tied)
    untrained = logits_of(model)
    trainer = end_to_end(tmp_path, toy_prompts, toy_builder, model, lora=lora)
    want = logits_of(trainer.model)
    assert (want - untrained).abs().max() > 0.01
    loaded = abft.from_pretrained(tmp_path / "trained", str(tmp_path / "base"), dtype=dtype)
    assert isinstance(loaded, PeftModel) == lora
    torch.testing.assert_close(logits_of(loaded), want, atol=1e-6, rtol=1e-6)
    for name in ("accuracy", "true_label_likelihood"):
        found = [getattr(abft.evaluate(m, toy_prompts, progress=False), name) for m in (loaded, trainer.model)]
        assert found[0] == pytest.approx(found[1], abs=1e-6)
    merge(str(tmp_path / "base"), tmp_path / "trained", tmp_path / "merged", dtype=str(dtype).removeprefix("torch."))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == dtype
    if dtype == torch.float32:  # merging adapters into bfloat16 rounds W_Q and W_K
        torch.testing.assert_close(logits_of(plain), want, atol=1e-3, rtol=1e-3)
    head = (loaded.get_base_model() if lora else loaded).get_output_embeddings().weight
    assert torch.equal(plain.get_output_embeddings().weight, head.to(dtype))
    embeddings = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    assert torch.equal(plain.get_input_embeddings().weight, embeddings.to(dtype))


def test_evaluation_reads_the_trained_head(toy_prompts, toy_builder, tmp_path):
    """A head with its signs changed turns the order of the labels around."""
    model = saved_and_loaded(tmp_path / "base")
    trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path / "run", method="e2e", lora=True)
    head = trainer.model.get_base_model().get_output_embeddings().modules_to_save["default"]
    want = logits_of(trainer.model)  # of adapters that do nothing yet
    before = abft.evaluate(trainer.model, toy_prompts, progress=False)
    with torch.no_grad():
        head.weight.neg_()
    torch.testing.assert_close(logits_of(trainer.model), -want)
    after = abft.evaluate(trainer.model, toy_prompts, progress=False)
    assert torch.equal(after.predictions, before.probabilities.argmin(dim=1))


def test_adapters_keep_the_head_in_float32(toy_prompts, toy_builder, tmp_path):
    model = saved_and_loaded(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    end_to_end(tmp_path, toy_prompts, toy_builder, model, lora=True)
    with safe_open(tmp_path / "trained" / "adapter_model.safetensors", framework="pt") as file:
        saved = file.get_tensor("base_model.model.lm_head.weight")
    loaded = abft.from_pretrained(tmp_path / "trained", str(tmp_path / "base"), dtype=torch.bfloat16)
    weight = loaded.get_base_model().get_output_embeddings().weight
    assert saved.dtype == weight.dtype == torch.float32
    assert torch.equal(saved, weight)
    assert loaded.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


def test_projections_alone_leave_the_head(toy_prompts, toy_builder, tmp_path):
    model = saved_and_loaded(tmp_path / "base", tie_word_embeddings=True)
    before = model.get_output_embeddings().weight.clone()
    trained(model, toy_prompts, toy_builder, tmp_path, method="e2e_qk", num_train_epochs=1)
    assert torch.equal(model.get_output_embeddings().weight, before)
    assert model.config.tie_word_embeddings


def test_resumed_training_has_the_head(toy_prompts, toy_builder, tmp_path):
    changes = {"method": "e2e", "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    models = [saved_and_loaded(tmp_path / "base", tie_word_embeddings=True) for _ in range(2)]
    whole = trained(models[0], toy_prompts, toy_builder, tmp_path / "a", **changes)
    resume = str(tmp_path / "a" / "checkpoint-2")
    again = trained(models[1], toy_prompts, toy_builder, tmp_path / "b", resume=resume, **changes)
    assert_same_trajectory(whole, again)
    assert 0 < whole.checkpoint_seconds < whole.state.log_history[-1]["train_runtime"]


def test_a_head_of_another_size_changes_nothing(toy_prompts, toy_builder, tmp_path):
    end_to_end(tmp_path, toy_prompts, toy_builder, saved_and_loaded(tmp_path / "base", tie_word_embeddings=True))
    other = tiny("llama", vocab_size=60, tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(50, 32\) in .* but \(60, 32\) in the model"):
        load_trained(other, tmp_path / "trained")
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_untied_models_save_both_weights(tmp_path):
    model = saved_and_loaded(tmp_path / "base", tie_word_embeddings=True)
    untie_head(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "own")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_model_without_a_head_is_refused(toy_prompts, toy_builder, tmp_path, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match="has no LM head to train; use method='e2e_qk'"):
        trainer_of(model, toy_prompts, toy_builder, tmp_path, method="e2e")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_query_and_key_are_found_apart():
    """The key part of a fused projection follows its query part."""
    q, k = (find_parts(tiny("gpt2"), (part,)) for part in ("q", "k"))
    assert [(item.start, item.length) for item in (q[0], k[0])] == [(0, 32), (32, 32)]
    assert [item.name for item in find_parts(tiny("llama"), ("k",))] == [
        f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_its_memory_is_planned(lora, tmp_path):
    """Gradient and Adam's moments of the head in float32, and its own copy."""
    tiny("llama").config.save_pretrained(tmp_path)
    head, projections = (
        plan(str(tmp_path), context=64, mode=mode, precision="float32", lora=lora).parts for mode in ("e2e", "e2e_qk")
    )
    assert head["gradients and Adam"] - projections["gradients and Adam"] == 3 * 4 * 50 * 32


@pytest.mark.parametrize("method", ["e2e", "e2e_qk"])
def test_no_restricted_gradient(method, tmp_path):
    with pytest.raises(ValueError, match=f"method='{method}' has a loss at the last layer only"):
        arguments(tmp_path, method=method, restricted_gradient=True)
