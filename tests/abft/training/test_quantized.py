"""A 4-bit base with LoRA (NF4, double quantisation, through bitsandbytes): trained, resumed, reloaded, merged."""

import pytest
import torch
from tiny_models import packed, random_prompts, tiny
from trainers import losses, trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import abft.models.attention
from abft.models.masses import layer_masses
from abft.models.weights import from_pretrained, load_trained, merge

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", spread=0.7, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def quantized(base):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": "cpu"}, attn_implementation=abft.models.attention.ATTENTION
    )


@pytest.mark.parametrize("restricted", [False, True])
def test_trains_resumes_and_reloads(restricted, base, toy_prompts, toy_builder, tmp_path):
    changes = dict(
        lora=True,
        restricted_gradient=restricted,
        num_train_epochs=2,
        packing=True,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        head_filter=False,
    )
    whole = trained(quantized(base), toy_prompts, toy_builder, tmp_path, **changes)
    assert losses(whole)[-1] < losses(whole)[0]
    kinds = {type(module).__name__ for module in whole.model.modules()}
    assert "Linear4bit" in kinds
    again = trained(
        quantized(base), toy_prompts, toy_builder, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), **changes
    )
    assert losses(again) == losses(whole)
    whole.save_model(tmp_path / "final")
    loaded = load_trained(quantized(base), tmp_path / "final")
    batch = packed(*random_prompts((20, 13)))
    # Without gradients: with AVX-512 bitsandbytes computes differently for inputs that require them.
    with torch.no_grad():
        want = torch.stack(layer_masses(whole.model.eval(), **batch))
        torch.testing.assert_close(torch.stack(layer_masses(loaded.eval(), **batch)), want, atol=1e-6, rtol=1e-5)


def test_full_training_of_a_quantized_base_is_refused(base, toy_prompts, toy_builder, tmp_path):
    with pytest.raises(ValueError, match=r"is quantized to torch.uint8; train it with LoRA \(lora=True\)"):
        trained(quantized(base), toy_prompts, toy_builder, tmp_path)


def test_adapters_merge_into_the_base(base, toy_prompts, toy_builder, tmp_path):
    run = trained(
        quantized(base), toy_prompts, toy_builder, tmp_path, lora=True, num_train_epochs=1, learning_rate=1e-2
    )
    run.save_model(tmp_path / "final")
    merge(str(base), tmp_path / "final", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="sdpa")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    ids = random_prompts((20,))[0][0][None]
    wrapped = from_pretrained(tmp_path / "final", str(base), dtype="float32")
    torch.testing.assert_close(merged(ids).logits, wrapped.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(FileExistsError, match="merged exists; choose another folder"):
        merge(str(base), tmp_path / "final", tmp_path / "merged")
