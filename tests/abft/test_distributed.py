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

from abft.weights import load_trained

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
    "fused": ("gpt2", {}),
    "e2e": ("llama", {"method": "e2e"}),
    "packed": ("llama", {"packing": True, "tokens_per_batch": 120, "per_device_train_batch_size": 16}),
    "restricted": ("llama", {"restricted_gradient": True}),
    "lora": ("llama", {"lora": True}),
    "fsdp": ("llama", {**FSDP, **SAVED}),
    "fsdp_resumed": ("llama", {**FSDP, "resume": "fsdp/checkpoint-2"}),
    "fsdp_lora": ("llama", {**FSDP, "lora": True}),
}


def torchrun(script: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port), str(script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(toy_prompts, toy_builder, tmp_path_factory):
    """What the two processes left."""
    folder = tmp_path_factory.mktemp("two")
    torch.save((toy_prompts, toy_builder), folder / "prompts.pt")
    shared = dict(
        learning_rate=1e-3, use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=2, ddp_backend="gloo"
    )  # fmt: skip
    runs = []
    for name, (kind, options) in RUNS.items():
        options = dict(options)
        resume = options.pop("resume", None)
        resume = resume and str(folder / "output" / resume)
        runs.append({"name": name, "kind": kind, "resume": resume, "options": {**shared, **options}})
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(Path(__file__).with_name("distributed_run.py"), str(folder))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, folder, toy_prompts, toy_builder, tmp_path):
    kind, options = RUNS[name]
    alone = {key: value for key, value in options.items() if key not in (*FSDP, *SAVED, "resume")}
    one = trained(tiny(kind, spread=0.7), toy_prompts, toy_builder, tmp_path, num_train_epochs=2, **alone)
    two = torch.load(folder / f"{name}.pt")
    assert two["world"] == 2
    assert two["steps"] == (1 if "packing" in options else 2)
    assert (two["sharded"] > 0) == ("fsdp" in options)
    entries = [entry for entry in one.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for key in ("loss", "induction_heads", "mass_correct", "mass_wrong", "wrong_penalty"):
        if key in entries[0]:
            assert [e[key] for e in two["log"]] == pytest.approx([e[key] for e in entries], rel=1e-4), key
    assert two["controller"]["head_counts"] == one.controller.head_counts
    assert_same_weights(two["weights"], state_of(one), 1e-4 if "fsdp" in options else 1e-5)


@pytest.mark.parametrize("name", ["full", "fused", "fsdp", "lora", "fsdp_lora"])
def test_what_two_processes_save_loads_alone(name, folder):
    kind = RUNS[name][0]
    model = load_trained(tiny(kind, spread=0.7), folder / "final" / name)
    weights = torch.load(folder / f"{name}.pt")["weights"]
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[key], msg=key)
