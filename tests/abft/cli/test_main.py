"""The command line as a new user meets it: a local model folder, their own texts, no network."""

import json
import subprocess
import sys

import pytest
import torch

import abft
from abft.cli.main import main
from abft.models.weights import from_pretrained


def train(model_folder, files, output, *extra):
    return main(
        [
            "train",
            "--model",
            str(model_folder),
            "--train_file",
            str(files / "train.jsonl"),
            "--num_prompts",
            "32",
            "--text_prefix",
            "text:",
            "--label_prefix",
            "topic:",
            "--pseudo_batch_size",
            "8",
            "--learning_rate",
            "1e-3",
            "--use_cpu",
            "True",
            "--disable_tqdm",
            "True",
            "--output_dir",
            str(output),
            *extra,
        ]
    )


def test_version_as_installed():
    command = [sys.executable, "-m", "abft.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"abft {abft.__version__}\n"


def test_unknown_command_is_named(capsys):
    assert main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


def test_train_then_eval(model_folder, files, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(model_folder, files, run, "--method", "abft", "--head_filter", "False") == 0
    assert "ABFT: 8 steps over 32 prompts" in " ".join(capsys.readouterr().out.split())
    history = json.loads((run / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))
    assert (run / "training.png").stat().st_size > 1000

    output = tmp_path / "eval.json"
    arguments = ["eval", "--model", str(model_folder), "--trained", str(run), "--test_file", str(files / "test.csv"),
                 "--demonstration_file", str(files / "train.jsonl"), "--text_prefix", "text:",
                 "--label_prefix", "topic:", "--output", str(output), "--quiet"]  # fmt: skip
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "vanilla" in table
    assert "accuracy" in table
    runs = json.loads(output.read_text())["runs"]
    assert set(runs) == {"vanilla", str(run)}
    assert all(result["n"] == 40 for result in runs.values())
    shares = [torch.tensor(runs[name]["mass_correct"]).sum() for name in ("vanilla", str(run))]
    assert shares[1] > shares[0]  # ABFT without the filter raises every head's mass on correct labels
    assert (tmp_path / "eval-run.png").exists()


def test_lora_folder_loads_on_its_base(model_folder, files, tmp_path):
    run = tmp_path / "lora"
    assert train(model_folder, files, run, "--lora", "True", "--lora_r", "4", "--method", "e2e") == 0
    assert (run / "adapter_model.safetensors").exists()
    model = from_pretrained(run)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_training_goes_on_where_it_was_cut_off(model_folder, files, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(model_folder, files, whole) == 0
    assert train(model_folder, files, cut, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2") == 0
    # What a killed run leaves: checkpoints, the last of them incomplete, and no weights in the folder itself.
    for name in ("abft_config.json", "qk_weights.safetensors", "training.json", "training.png"):
        (cut / name).unlink()
    (cut / "checkpoint-4" / "trainer_state.json").unlink()
    assert train(model_folder, files, cut) == 0
    losses = [
        [entry["loss"] for entry in json.loads((run / "training.json").read_text())["history"] if "loss" in entry]
        for run in (whole, cut)
    ]
    assert losses[1] == losses[0]
    assert len(losses[0]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train_file", "missing.jsonl"], "missing.jsonl"),
        (["--num_prompts", "79"], "lower --num_prompts"),
        (["--task", "SST9"], "unknown task 'SST9'"),
        (["--labels", "music", "sport"], "food"),
        (["--labels", "music", "food", "opera"], "unknown token"),
        (["--pseudo_batch_size", "12", "--per_device_train_batch_size", "8"], "pseudo_batch_size=12"),
        (["--gradient_accumulation_steps", "3"], "give pseudo_batch_size alone"),
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
        (["--k", "-1"], "k must be"),
    ],
)
def test_bad_input_is_named_and_leaves_no_file(model_folder, files, tmp_path, capsys, change, message):
    output = tmp_path / "run"
    assert train(model_folder, files, output, *change) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not output.exists() or not any(output.iterdir())


def test_a_finished_run_is_not_overwritten(model_folder, files, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(model_folder, files, run) == 0
    before = (run / "qk_weights.safetensors").read_bytes()
    assert train(model_folder, files, run) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert (run / "qk_weights.safetensors").read_bytes() == before


def test_eval_names_a_folder_without_weights(model_folder, files, tmp_path, capsys):
    code = main(["eval", "--model", str(model_folder), "--test_file", str(files / "test.csv"),
                 "--demonstration_file", str(files / "train.jsonl"), "--trained", str(tmp_path)])  # fmt: skip
    assert code == 2
    assert "holds no trained weights" in capsys.readouterr().err


def test_doctor_finds_the_torch_backend(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "transformers" in output
    assert "works" in output


def test_doctor_names_every_gpu_and_why_it_is_refused(capsys, monkeypatch):
    """A card that is too old, beside one whose kernels run (here: on the CPU, under its name)."""
    from abft_kernels.triton.launch import GPU, family_of

    cards = {0: GPU("sm_75", family_of("sm_75"), 65_536), 1: GPU("sm_120", family_of("sm_120"), 101_376)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device[-1]}")
    monkeypatch.setattr("abft_kernels.triton.launch.gpu_of", lambda device: cards[device.index or 0])
    monkeypatch.setattr("abft.cli.commands.doctor.check_backend", lambda backend, device: f"works {device}")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cuda:0 Card 0" in shown
    assert "this GPU is sm_75; the kernels need sm_80 or newer" in shown
    assert "works cuda:1" in shown
