"""Two processes train as one does: data parallel, FSDP 2, restricted gradients, packing; over gloo, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from trainers import assert_same_weights, state_of, trained

from abft.models.attention import enable
from abft.models.masses import layer_masses
from abft.models.projections import train_parameters
from abft.models.weights import load_trained

HELPERS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip
SAVED = {"save_strategy": "steps", "save_steps": 2}
# name -> kind of model, options
RUNS: dict[str, tuple[str, dict]] = {
    "full": ("llama", {}),
    "share": ("llama", {"method": "share"}),
    "fused": ("gpt2", {}),
    "e2e": ("llama", {"method": "e2e"}),
    "packed": ("llama", {"packing": True, "tokens_per_batch": 120, "per_device_train_batch_size": 16}),
    "whole_step": ("llama", {"per_device_train_batch_size": None}),
    "restricted": ("llama", {"restricted_gradient": True}),
    "lora": ("llama", {"lora": True}),
    "tensor_parallel": ("llama", {"tensor_parallel_size": 2}),
    "tensor_parallel_e2e": ("llama", {"tensor_parallel_size": 2, "method": "e2e"}),
    "tensor_parallel_share": ("llama", {"tensor_parallel_size": 2, "method": "share"}),
    "tensor_parallel_restricted": ("llama", {"tensor_parallel_size": 2, "restricted_gradient": True}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "bfloat16_e2e": ("llama", {"dtype": "bfloat16", "method": "e2e"}),
    "bfloat16_tensor_parallel": ("llama", {"dtype": "bfloat16", "tensor_parallel_size": 2}),
    # FSDP stays on in a process that had it once.
    "fsdp": ("llama", {**FSDP, **SAVED}),
    "fsdp_resumed": ("llama", {**FSDP, "resume": "fsdp/checkpoint-2"}),
    "fsdp_lora": ("llama", {**FSDP, "lora": True}),
    "bfloat16_fsdp": ("llama", {"dtype": "bfloat16", **FSDP}),
    "bfloat16_fsdp_lora": ("llama", {"dtype": "bfloat16", **FSDP, "lora": True}),
}


def torchrun(script: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(HELPERS), str(HELPERS.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port), str(script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(toy_prompts, toy_builder, tmp_path_factory):
    """Return the files that the two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(toy_prompts, folder / "prompts.pt")
    shared = dict(
        method="abft", learning_rate=1e-3, use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=2,
        ddp_backend="gloo", per_device_train_batch_size=8,
    )  # fmt: skip
    runs = []
    for name, (kind, options) in RUNS.items():
        options = dict(options)
        resume, dtype = options.pop("resume", None), options.pop("dtype", "float32")
        resume = resume and str(folder / "output" / resume)
        runs.append({"name": name, "kind": kind, "dtype": dtype, "resume": resume, "options": {**shared, **options}})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(HELPERS / "distributed_run.py", str(folder))
    return folder


ROUNDED = "bfloat16_tensor_parallel"  # partial sums of each process in 16 bits


def test_split_heads_in_16_bits_take_the_same_way(folder, toy_prompts, toy_builder, tmp_path):
    model = tiny("llama", spread=0.7).to(torch.bfloat16)
    start = {name: tensor.detach().float().clone() for name, tensor in model.named_parameters()}
    one = trained(model, toy_prompts, toy_builder, tmp_path, num_train_epochs=2)
    two = torch.load(folder / f"{ROUNDED}.pt")
    assert two["sharded"] > 0
    losses = [[e["loss"] for e in log if "loss" in e] for log in (two["log"], one.state.log_history)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=5e-3)
    trained_names = {item.name for item in one.trained}
    ways = [
        torch.cat([(weights[name].detach().float() - start[name]).flatten() for name in sorted(trained_names)])
        for weights in (two["weights"], dict(model.named_parameters()))
    ]
    assert torch.cosine_similarity(*ways, dim=0) > 0.95
    assert {two["weights"][name].dtype for name in trained_names} == {torch.float32}
    rest = two["weights"].keys() - trained_names
    assert all(torch.equal(two["weights"][name], start[name].to(torch.bfloat16)) for name in rest)


@pytest.mark.parametrize("name", [name for name in RUNS if name != ROUNDED])
def test_two_processes_equal_one(name, folder, toy_prompts, toy_builder, tmp_path):
    kind, options = RUNS[name]
    alone = {
        key: value
        for key, value in options.items()
        if key not in (*FSDP, *SAVED, "resume", "tensor_parallel_size", "dtype")
    }
    dtype = getattr(torch, options.get("dtype", "float32"))
    one = trained(tiny(kind, spread=0.7).to(dtype), toy_prompts, toy_builder, tmp_path, num_train_epochs=2, **alone)
    two = torch.load(folder / f"{name}.pt")
    assert two["world"] == 2
    assert two["steps"] == (
        1 if "per_device_train_batch_size" in options else 4 if "tensor_parallel_size" in options else 2
    )
    split = "fsdp" in options or "tensor_parallel_size" in options
    assert (two["sharded"] > 0) == split
    entries = [entry for entry in one.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for key in ("loss", "induction_heads", "mass_correct", "mass_wrong", "wrong_penalty", "mass_award"):
        if key in entries[0]:
            assert [e[key] for e in two["log"]] == pytest.approx([e[key] for e in entries], rel=1e-4), key
    assert two["state"].get("head_counts") == one.objective.state_dict().get("head_counts")
    assert_same_weights(two["weights"], state_of(one), 1e-4 if split else 1e-5)


@pytest.mark.parametrize("name", ["full", "fused", "fsdp", "lora", "fsdp_lora", "tensor_parallel"])
def test_what_two_processes_save_loads_alone(name, folder):
    kind = RUNS[name][0]
    model = load_trained(tiny(kind, spread=0.7), folder / "final" / name)
    weights = torch.load(folder / f"{name}.pt")["weights"]
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[key], msg=key)


# --- one context over two processes -----------------------------------------------------------------------

CASES = [
    (kind, length, detach)
    for kind in ("llama", "gpt2", "mistral_window", "gemma2", "gpt_oss")
    for length, detach in ((24, False), (23, False), (24, True))
]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """Inputs, and what each of two processes made of them."""
    folder = tmp_path_factory.mktemp("context")
    cases = {}
    for kind, length, detach in CASES:
        generator = torch.Generator().manual_seed(length)
        cases[f"{kind}-{length}-{detach}"] = {
            "kind": kind, "detach": detach, "weights": torch.randn(2, 3, 4, 2, 2, generator=generator),
            "input_ids": torch.randint(3, 50, (3, length), generator=generator),
            "key_groups": torch.randint(-1, 2, (3, length), generator=generator),
            "query_positions": torch.tensor([[5, length - 1], [length - 1, 2], [length // 2, length - 2]]),
        }  # fmt: skip
    torch.save(cases, folder / "cases.pt")
    torchrun(HELPERS / "context_run.py", str(folder))
    return cases, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [f"{kind}-{length}-{detach}" for kind, length, detach in CASES])
def test_a_context_over_two_processes(name, contexts):
    """Masses and gradients of one process, in masses the same on both; windows, sinks and soft caps, an odd length."""
    cases, ranks = contexts
    case, (first, second) = cases[name], [rank[name] for rank in ranks]
    model = enable(tiny(case["kind"], spread=0.4))
    train_parameters(model)
    inputs = {key: case[key] for key in ("input_ids", "key_groups", "query_positions")}
    masses = torch.stack(layer_masses(model, **inputs, detach=case["detach"]))
    (masses * case["weights"]).sum().backward()
    assert torch.equal(first["masses"], second["masses"])
    torch.testing.assert_close(first["masses"], masses.detach(), atol=1e-6, rtol=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (first["gradients"][key] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 5e-5, f"{key}: {error:.1e}"


def test_a_spread_context_refuses_what_it_cannot(tmp_path):
    model = enable(tiny("llama"))
    ids, groups = torch.ones(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    for changes in ({"attention_mask": padded, "query_positions": padded[:, :1]}, {}):
        with pytest.raises(NotImplementedError, match="a context spread over processes takes prompts of one length"):
            layer_masses(model, input_ids=ids, key_groups=groups, context_group=object(), **changes)
