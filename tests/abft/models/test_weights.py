"""Saved weights are loaded on top of a fresh base."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from tiny_models import random_prompts, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from abft.models.attention import is_enabled
from abft.models.projections import find_qk, lora_qk
from abft.models.weights import from_pretrained, is_trained_folder, load_trained, save_trained

IDS = torch.stack(random_prompts((16, 16))[0])


def changed(kind, folder=None):
    """A model whose W_Q and W_K are not the base's."""
    model = tiny(kind)
    if folder is not None:
        model.save_pretrained(folder)
        model.config.name_or_path = str(folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for item in find_qk(model):
            part = item.view(parameters[item.name])
            part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_saved_weights_on_a_fresh_base_are_the_model(kind, tmp_path):
    model = changed(kind)
    save_trained(model, find_qk(model), tmp_path)
    fresh = tiny(kind)
    assert not torch.equal(logits(fresh), logits(model))
    assert load_trained(fresh, tmp_path) is fresh
    assert torch.equal(logits(fresh), logits(model))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_file_holds_the_trained_part_alone(kind, tmp_path):
    model = changed(kind)
    trained = find_qk(model)
    save_trained(model, trained, tmp_path, method="abft", steps=3)
    parameters = dict(model.named_parameters())
    numbers = sum(item.view(parameters[item.name]).numel() for item in trained)
    assert numbers < sum(parameters[item.name].numel() for item in trained) or kind == "llama"
    with safe_open(tmp_path / "qk_weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == {item.name for item in trained}
    size = os.path.getsize(tmp_path / "qk_weights.safetensors")
    assert 4 * numbers < size < 4 * numbers + 1500
    assert sorted(os.listdir(tmp_path)) == ["abft_config.json", "qk_weights.safetensors"]
    config = json.loads((tmp_path / "abft_config.json").read_text())
    assert config == {
        "format_version": 1,
        "base_model_name_or_path": "",
        "model_type": kind,
        "method": "abft",
        "steps": 3,
    }


def test_loads_into_another_dtype(tmp_path):
    model = changed("llama")
    save_trained(model, find_qk(model), tmp_path)
    half = load_trained(tiny("llama").bfloat16(), tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(half), logits(model.bfloat16()))


def test_from_pretrained_finds_the_base(tmp_path):
    model = changed("llama", tmp_path / "base")
    save_trained(model, find_qk(model), tmp_path / "trained")
    loaded = from_pretrained(tmp_path / "trained")
    assert is_enabled(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    loaded = from_pretrained(tmp_path / "trained", attn_implementation="sdpa", dtype=torch.bfloat16)
    assert not is_enabled(loaded)
    assert loaded.dtype == torch.bfloat16
    elsewhere = from_pretrained(tmp_path / "trained", base_model=str(tmp_path / "base"))
    torch.testing.assert_close(logits(elsewhere), logits(model), atol=1e-5, rtol=1e-5)


def test_lora_adapter(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = base.name_or_path = str(tmp_path / "base")
    model = lora_qk(base, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(tmp_path / "adapter")
    assert is_trained_folder(tmp_path / "adapter")
    assert not torch.equal(logits(tiny("llama")), logits(model))
    torch.testing.assert_close(logits(load_trained(tiny("llama"), tmp_path / "adapter")), logits(model))
    torch.testing.assert_close(
        logits(from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "base"))),
        logits(model),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "adapter")), logits(model), atol=1e-5, rtol=1e-5)


def test_lora_adapter_of_another_base(tmp_path):
    model = lora_qk(tiny("llama"), r=4)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter does not fit this gpt2 model; it was trained on"):
        load_trained(tiny("gpt2"), tmp_path / "adapter")
    wider = LlamaForCausalLM(LlamaConfig(**{**tiny("llama").config.to_dict(), "hidden_size": 64}))
    with pytest.raises(ValueError, match=r"adapter does not fit this llama model.*size mismatch"):
        load_trained(wider, tmp_path / "adapter")


def assert_raises_and_changes_nothing(model, folder, match, error=ValueError):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        load_trained(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def trained_llama(tmp_path):
    model = changed("llama")
    save_trained(model, find_qk(model), tmp_path)
    return tmp_path


def test_another_kind_of_model(trained_llama):
    match = "was trained on a llama model .*, but this model is qwen2"
    assert_raises_and_changes_nothing(tiny("qwen2"), trained_llama, match)


def test_another_shape(trained_llama):
    # The first projections fit, a later one does not: nothing may be written before all are checked.
    model = tiny("llama", num_key_value_heads=4)
    match = r"k_proj.weight has shape \(16, 32\) in .* but \(32, 32\) in the model"
    assert_raises_and_changes_nothing(model, trained_llama, match)


def test_another_depth(trained_llama):
    match = "differ in 2 projections, such as model.layers.2.self_attn.k_proj.weight"
    assert_raises_and_changes_nothing(tiny("llama", num_hidden_layers=3), trained_llama, match)


def test_another_format_version(trained_llama):
    path = trained_llama / "abft_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    match = "has format version 2, this release reads 1"
    assert_raises_and_changes_nothing(tiny("llama"), trained_llama, match)


def test_missing_folder(tmp_path):
    assert not is_trained_folder(tmp_path)
    match = "holds no trained W_Q / W_K"
    assert_raises_and_changes_nothing(tiny("llama"), tmp_path / "none", match, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="nothing was trained into it"):
        from_pretrained(tmp_path)


def test_unknown_base(trained_llama):
    with pytest.raises(ValueError, match="does not name its base model; pass base_model="):
        from_pretrained(trained_llama)


def test_config_is_written_last(tmp_path, monkeypatch):
    model = changed("llama")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("abft.models.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_trained(model, find_qk(model), tmp_path)
    assert not is_trained_folder(tmp_path)
