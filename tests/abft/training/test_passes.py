"""The size of a pass that is chosen by itself: what fits, and what is quick."""

import json
from dataclasses import fields
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from tiny_models import tiny
from trainers import LABEL_LOOKERS, arguments, state_of, trained, trainer_of
from transformers import AutoModelForCausalLM

from abft.training import pass_tokens as passes
from abft.training.config import ABFTConfig
from abft.training.plan import plan

WIDE = {"vocab_size": 500, "max_position_embeddings": 4096, "tie_word_embeddings": False}
KINDS = {
    "LlamaConfig": dict(hidden_size=256, intermediate_size=896, num_attention_heads=4, num_key_value_heads=2),
    "GPT2Config": dict(n_embd=256, n_head=4, n_positions=4096, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_estimate_is_above_the_count(name, tmp_path):
    """Between 1 and 5 times of what `abft plan` counts, in every mode."""
    shape = {**WIDE, **KINDS[name], "n_layer" if name == "GPT2Config" else "num_hidden_layers": 2}
    config = getattr(transformers, name)(**shape, architectures=[name.replace("Config", "ForCausalLM")])
    config.architectures = ["GPT2LMHeadModel"] if name == "GPT2Config" else config.architectures
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for mode, options in (
        ("full", {}), ("full", {"gradient_checkpointing": True}), ("restricted", {"restricted_gradient": True}),
    ):  # fmt: skip
        counted = plan(
            str(tmp_path), context=1024, mode=mode, precision="float32",
            gradient_checkpointing="gradient_checkpointing" in options,
        ).parts["activations"] / 1024  # fmt: skip
        estimated = passes.activation_bytes(model, arguments(tmp_path, **options))
        assert counted < estimated < 5 * counted, (mode, options, counted, estimated)


def test_what_fits_limits_a_pass(toy_prompts, tmp_path, monkeypatch):
    model, args = tiny("llama"), arguments(tmp_path)
    longest = max(prompt.length for prompt in toy_prompts)
    found = []
    for free in (1e12, 3e6, 1e3):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        model.requires_grad_(False)
        found.append(passes.tokens_per_pass(model, args, toy_prompts, torch.device("cpu")))
    assert found[0] == passes.MOST_ON_CPU
    assert found[1] == int(passes.SHARE * 3e6 / passes.activation_bytes(model, args))
    assert found[2] == longest < found[1] < found[0]


@pytest.mark.parametrize(("width", "tokens"), [(512, 1024), (1024, 512), (14336, 128)])
def test_on_a_cpu_the_widest_tensor_fits_the_cache(width, tokens, toy_prompts, tmp_path):
    with torch.device("meta"):
        model = tiny("llama", intermediate_size=width, num_hidden_layers=1)
    model.requires_grad_(False)
    assert passes.tokens_per_pass(model, arguments(tmp_path), toy_prompts, torch.device("cpu")) == tokens


def test_packs_where_the_model_takes_positions():
    assert passes.can_pack(tiny("llama"))
    without = tiny("llama")
    without.forward = lambda input_ids, attention_mask: None
    assert not passes.can_pack(without)


def test_the_options_reach_the_batches(toy_prompts, toy_builder, tmp_path):
    for given, limit in (("auto", passes.MOST_ON_CPU), ("none", None), (None, None), ("200", 200), (200, 200)):
        trainer = trainer_of(tiny("llama"), toy_prompts, toy_builder, tmp_path, tokens_per_batch=given)
        assert trainer.data_collator.tokens_per_batch == limit
        assert trainer.data_collator.packing
    assert not trainer_of(tiny("llama"), toy_prompts, toy_builder, tmp_path, packing=False).data_collator.packing


def test_a_resumed_run_keeps_the_size_of_its_passes(toy_prompts, toy_builder, tmp_path, monkeypatch):
    """With less free memory than at its start: the same bits all the same."""
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    model = tiny("llama", **LABEL_LOOKERS)
    whole = trained(model, toy_prompts, toy_builder, tmp_path, **options)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["HeadCountState"]["passes"] == {"tokens_per_batch": passes.MOST_ON_CPU}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e3))
    resumed = trained(
        tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, resume=str(tmp_path / "checkpoint-1"),
        **options,
    )  # fmt: skip
    assert resumed.data_collator.tokens_per_batch == passes.MOST_ON_CPU
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(resumed)[name]), name


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_of_its_names(name, tmp_path):
    """transformers 5.24 renamed the option; no run warns of it, and both names say the same."""
    known = {option.name for option in fields(ABFTConfig)}
    if name not in known:
        pytest.skip("this transformers has one name")
    args = arguments(tmp_path, **{name: True})
    values = [getattr(args, both) for both in ("gradient_checkpointing", "activation_checkpointing") if both in known]
    assert all(values)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not arguments(tmp_path).gradient_checkpointing
    with pytest.raises(ValueError, match="gradient_checkpointing=True does not go with it"):
        arguments(tmp_path, restricted_gradient=True, **{name: True})
