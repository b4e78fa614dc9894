"""`abft plan`: what it counts against what a step takes, and what it makes of it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CONFIGS
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from abft.cli.main import main
from abft.training.plan import GIB, modes, plan

ROOT = Path(__file__).parents[3]


def saved(folder, name="LlamaConfig", **changes):
    config = {"LlamaConfig": LlamaConfig, "Qwen2Config": Qwen2Config}[name](**changes)
    config.architectures = [name.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """Qwen2.5-7B's configuration."""
    return saved(
        tmp_path_factory.mktemp("7b"),
        "Qwen2Config",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def test_weights_of_a_known_model(seven_billion):
    """7.62 billion parameters; nothing of them is made."""
    before = torch.tensor(0).numel()
    result = plan(seven_billion, context=1024, mode="inference")
    assert before == 1
    assert result.parts["weights"] == pytest.approx(2 * 7_615_616_512, rel=1e-3)
    assert "gradients and Adam" not in result.parts
    gc.collect()


def test_precisions_and_adapters(seven_billion):
    half = plan(seven_billion, context=1024, mode="restricted", lora=True)
    four = plan(seven_billion, context=1024, mode="restricted", precision="nf4")
    linear = 7_615_616_512 - 2 * 152064 * 3584  # what 4 bits take in: all but embeddings and head
    assert half.parts["weights"] - four.parts["weights"] == pytest.approx(linear * (2 - 0.516), rel=1e-3)
    assert four.parts["4-bit weights unpacked"] == 2 * 18944 * 3584
    adapters = 28 * 16 * ((3584 + 3584) + (3584 + 512))  # which PEFT keeps in float32
    assert four.parts["gradients and Adam"] == half.parts["gradients and Adam"] == 3 * 4 * adapters
    full = plan(seven_billion, context=1024, precision="float32")
    assert full.parts["gradients and Adam"] == 3 * 4 * 28 * 3584 * (3584 + 512)


def test_mixed_precision_of_eight_billion(tmp_path):
    """Llama-3-8B: the frozen base in 2 bytes a weight, W_Q and W_K in 4, at least 13 GiB less than all in 4."""
    config = saved(
        tmp_path, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    mixed, exact = (plan(config, context=1024, precision=name) for name in ("bfloat16", "float32"))
    trained = 32 * 4096 * (4096 + 1024)
    assert mixed.parts["weights"] == pytest.approx(2 * (8_030_261_248 + trained), rel=1e-3)
    assert mixed.parts["gradients and Adam"] == exact.parts["gradients and Adam"] == 3 * 4 * trained
    assert mixed.parts["activations"] < 0.7 * exact.parts["activations"]
    assert exact.total - mixed.total > 13 * 2**30


def test_modes_in_their_order(seven_billion):
    by_mode = {mode: plan(seven_billion, context=4096, mode=mode, lora=mode != "metaicl") for mode in modes()}
    activations = {mode: result.parts["activations"] for mode, result in by_mode.items()}
    assert activations["restricted"] < 1.1 * activations["inference"]
    assert activations["restricted"] < activations["full"] / 10
    checkpointed = plan(seven_billion, context=4096, lora=True, gradient_checkpointing=True)
    assert checkpointed.parts["activations"] < activations["full"] / 4


def test_the_longest_context_is_where_it_stops_to_fit(seven_billion):
    result = plan(seven_billion, context=4096, lora=True)
    assert result.fits
    longest = result.longest_context
    at_limit = plan(seven_billion, context=longest, lora=True)
    assert at_limit.total == pytest.approx(80 * GIB, rel=0.01)
    assert not plan(seven_billion, context=int(1.05 * longest), lora=True).fits


def test_several_gpus(seven_billion):
    alone = plan(seven_billion, context=2048, mode="full", precision="float32", gpu_memory=24)
    shared = plan(seven_billion, context=2048, mode="full", precision="float32", gpu_memory=24, gpus=8)
    assert (alone.strategy, alone.fits) == ("one GPU", False)
    assert shared.strategy == "FSDP 2"
    assert "--fsdp full_shard" in shared.command
    assert shared.parts["weights"] == pytest.approx(alone.parts["weights"] / 8)
    assert plan(seven_billion, context=2048, lora=True, gpus=8).strategy == "data parallel"
    restricted = plan(seven_billion, context=2048, mode="restricted", lora=True, gpu_memory=12, gpus=4)
    assert restricted.strategy == "tensor parallel"
    assert "--tensor_parallel_size 4" in restricted.command


def test_the_command_line(seven_billion, capsys):
    options = ["--model", seven_billion, "--context", "8192", "--mode", "restricted", "--precision", "nf4"]
    assert main(["plan", *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fits in 80 GiB" in text
    assert "--restricted_gradient True --lora True --load_in_4bit True" in text
    assert main(["plan", "--model", seven_billion, "--precision", "float32", "--gpu_memory", "16"]) == 1
    assert "does not fit in 16 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"mode": "half"},
            "mode must be one of full, restricted, e2e, e2e_qk, metaicl, inference, got",
        ),
        ({"precision": "int8"}, "precision must be one of"),
        ({"context": 200_000}, "context=200000 is beyond the model's 131072 tokens"),
        ({"gpus": 0}, "must be positive"),
    ],
)
def test_bad_input(changes, match, seven_billion):
    with pytest.raises(ValueError, match=match):
        plan(seven_billion, **changes)


def test_no_such_model(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        plan(str(tmp_path / "nowhere"))


def test_what_has_no_shapes_is_told(tmp_path):
    config = transformers.Qwen3MoeConfig(**CONFIGS["qwen3_moe"][1], architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="cannot run Qwen3MoeForCausalLM in float32 on shapes alone"):
        plan(str(tmp_path), context=64, precision="float32")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mistral_window", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_other_architectures(kind, tmp_path):
    name, changes = CONFIGS[kind]
    config = getattr(transformers, name)(**changes)
    config.architectures = [name.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == config.model_type
    result = plan(str(tmp_path), context=64, mode="full")
    assert result.parts["activations"] > 0
    assert result.longest_context == 128


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
@pytest.mark.parametrize("method", ["full", "restricted"])
def test_within_ten_percent_of_the_measured_peak(method):
    """The plan is near the resident memory of one step of the benchmark's model in a separate process."""
    sys.path.insert(0, str(ROOT))
    from bench.cases.own_process import in_own_process
    from bench.cases.training_step import planned

    measured = in_own_process("training_step", method, 4096, returns_memory=True)["bytes"]
    assert planned(method, 4096) == pytest.approx(measured, rel=0.1)


def test_needs_no_memory(seven_billion):
    """Planning a 7B model stays within the memory of the imports and little more."""
    code = f"""
import resource
from abft.training.plan import plan
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan({seven_billion!r}, context=32768, lora=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 400 << 10
