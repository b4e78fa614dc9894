"""The documents agree with the code: the table of models, and the examples run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_table import in_readme, table

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def test_the_table_of_models_is_the_one_that_is_tested():
    assert in_readme() == table(), "run python tests/abft/model_table.py --write"


def run(command, timeout=300):
    """Run a command that must succeed, and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def example(name, *switches, launcher=(), **options):
    """Run an example with these options, and return what it prints."""
    given = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    return run([sys.executable, *launcher, EXAMPLES / name, *given, *switches])


PREFIXES = {"text_prefix": "text:", "label_prefix": "topic:"}


def test_fine_tuning_on_a_csv(model_folder, files, tmp_path):
    output = tmp_path / "run"
    out = example("finetune_csv.py", "--cpu", model=model_folder, csv=files / "all.csv", output=output, **PREFIXES)
    assert "accuracy" in out
    assert {"heads.png", "qk_weights.safetensors", "abft_config.json"} <= set(os.listdir(output))


def test_induction_heads(model_folder, tmp_path):
    out = example("induction_heads.py", model=model_folder, tokens=96, output=tmp_path / "heads.png")
    assert len([line for line in out.splitlines() if "on the token to copy" in line]) == 8
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_four_bits_on_one_gpu(model_folder, files, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"prompts": 32, "tokens_per_batch": 128}
    folders = {"model": model_folder, "train": files / "train.jsonl", "output": tmp_path / "run"}
    out = example("qlora_one_gpu.py", **folders, **sizes, **PREFIXES)
    assert "adapter in" in out
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "run"))


def test_long_context_retrieval(tmp_path):
    sizes = {"seeds": 0, "records": 4, "pretraining_steps": 20, "targets": 64, "tests": 32, "threads": 1}
    out = example("long_context_retrieval.py", output=tmp_path / "result.json", **sizes)
    assert "16 records, mean over seeds: vanilla" in out
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert set(saved["accuracy_mean"]) == {"vanilla", "E2E", "targets"}
    trained_at = {name: of["16"]["best_head_positive_mass"] for name, of in saved["seeds"]["0"].items()}
    assert trained_at["targets"] > trained_at["vanilla"]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_several_processes(model_folder, files, tmp_path):
    """Data parallel only: accelerate offers its other engines on GPUs (`test_distributed` runs them all)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    folders = {"model": model_folder, "train": files / "train.jsonl", "output": tmp_path / "run"}
    out = example("several_gpus.py", launcher=launcher, **folders, prompts=32, **PREFIXES)
    assert "trained on 2 processes" in out
    assert "qk_weights.safetensors" in os.listdir(tmp_path / "run")
