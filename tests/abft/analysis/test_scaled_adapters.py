"""Adapters scaled on a base, quantized or not: the weights θ₀ + Σ factor·Δ, and the analyses of a 4-bit experiment."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from abft.analysis.scaled_adapters import ScaledAdapters
from abft.cli.main import main
from abft.experiments.analyses.connectivity import ConnectivityOptions
from abft.experiments.analyses.induction import InductionOptions
from abft.experiments.analyses.momentum_attention import MomentumOptions
from abft.experiments.analyze import AnalyzeOptions, analyze
from abft.experiments.experiment import Experiment
from abft.experiments.runs import read_run

IDS = torch.arange(3, 33)[None]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", spread=0.7, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base_folder, tmp_path_factory):
    """Two random adapters, of different ranks and scales."""
    made = {}
    for seed, (name, rank) in enumerate((("abft", 2), ("e2e", 4))):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        made[name] = tmp_path_factory.mktemp(name)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config).save_pretrained(made[name])
    return made


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_hand(model, folders, factors):
    """The logits of the float base with factor·Δ added to its weights one adapter after the other."""
    for name, factor in factors.items():
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name="unused")
        adapted.load_adapter(folders[name], adapter_name=name)
        adapted.set_adapter(name)
        for module in adapted.modules():
            if hasattr(module, "get_delta_weight") and name in module.lora_A:
                module.base_layer.weight.data += factor * module.get_delta_weight(name).detach()
        model = adapted.unload()
    return logits(model)


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_model_is_the_sum_of_scaled_changes(four_bit, base_folder, folders):
    options = {}
    if four_bit:
        pytest.importorskip("bitsandbytes")
        options = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            "device_map": {"": "cpu"},
        }

    def base():
        model = AutoModelForCausalLM.from_pretrained(base_folder, **options).eval()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # with AVX-512 bitsandbytes computes in bfloat16
                module.support_avx512bf16_for_cpu = False
        return model

    untrained = logits(base())
    adapters = ScaledAdapters(base(), folders)
    torch.testing.assert_close(logits(adapters.model), untrained, atol=0, rtol=0)
    for factors in ({"abft": 1.0}, {"e2e": -0.5, "abft": 1.5}, {}):
        with adapters.at(factors):
            got = logits(adapters.model)
        float_base = base().dequantize() if four_bit else base()
        torch.testing.assert_close(got, by_hand(float_base, folders, factors), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(logits(adapters.model), untrained, atol=0, rtol=0)
    with adapters.at({"e2e": 1.0}):
        assert (logits(adapters.model) - untrained).abs().max() > 0.1


def test_what_has_no_scale_is_refused(base_folder, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(ValueError, match="holds no adapter; a 4-bit base is analysed with LoRA adapters"):
        ScaledAdapters(model, {"abft": tmp_path})
    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), whole).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the adapter of e2e trained lm_head in full, which has no scale"):
        ScaledAdapters(model, {"abft": folders["abft"], "e2e": tmp_path})
    with (
        pytest.raises(ValueError, match="no adapter of 'b0'; there are abft, e2e"),
        ScaledAdapters(model, folders).at({"b0": 1.0}),
    ):
        pass


def test_analyses_of_a_4_bit_experiment(one_task_options, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    options = replace(
        one_task_options,
        output_dir=str(tmp_path),
        methods=["vanilla", "abft", "e2e_qk"],
        lora=True,
        learning_rate=2e-2,
        load_in_4bit=True,
        dtype="float32",
    )
    Experiment(options).run()
    found = analyze(
        AnalyzeOptions(experiment=str(tmp_path), prompts=12, quiet=True),
        ConnectivityOptions(plane_lowest=0, plane_highest=1, plane_steps=2, plane_methods=["e2e_qk", "abft"]),
        InductionOptions(tokens=64),
        MomentumOptions(etas=[0.1]),
    )
    assert set(found) == {"connectivity", "last_row", "induction", "momentum"}
    tested = {}
    for name in ("vanilla-topics", "abft-topics-n16-seed0", "e2e_qk-topics-n16-seed0"):
        normal = read_run(tmp_path / "runs" / name).tests["topics"]["Normal"]
        assert normal["n"] == 12
        tested[name.partition("-")[0]] = normal
    plane = found["connectivity"]
    assert plane["accuracy"][0][0] == tested["vanilla"]["accuracy"]
    assert plane["accuracy"][0][1] == tested["abft"]["accuracy"]
    assert plane["accuracy"][1][0] == tested["e2e_qk"]["accuracy"]
    assert len({plane["loss"][i][j] for i in (0, 1) for j in (0, 1)}) == 4  # four different models
    assert found["induction"]["vanilla"] != found["induction"]["abft"]
    assert main(["analyze", "--experiment", str(tmp_path), "--parts", "distance"]) == 2
    assert "ask for --parts connectivity last_row induction momentum" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "analysis.json").read_text())["parts"]) == set(found)
    assert main(["analyze", "--experiment", str(tmp_path), "--parts", "connectivity"]) == 2
    assert "e2e_qk in place of e2e" in capsys.readouterr().err
