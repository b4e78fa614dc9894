"""A run that is killed at any moment resumes as if it had not been interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from trainers import LABEL_LOOKERS, losses, state_of, trained

from abft.training.checkpoints import last_complete_checkpoint


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"method": "share"}),
        ("gpt2", {}),
        ("llama", {"method": "e2e"}),
        ("llama", {"lora": True}),
    ],
    ids=["abft", "share", "fused", "e2e", "lora"],
)
@pytest.mark.parametrize("step", [2, 3])
def test_resume_continues_the_trajectory(kind, changes, step, toy_prompts, toy_builder, tmp_path):
    changes = {**changes, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    whole = trained(tiny(kind, **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, **changes)
    again = trained(
        tiny(kind, **LABEL_LOOKERS),
        toy_prompts,
        toy_builder,
        tmp_path / "again",
        resume=str(tmp_path / f"checkpoint-{step}"),
        **changes,
    )
    assert losses(again) == losses(whole)
    assert again.objective.state_dict() == whole.objective.state_dict()
    if changes.get("method") != "e2e":
        controller = whole.objective.controller
        assert len(controller.head_counts) == 6
        assert controller.weight != (0.1 if "method" in changes else 0.5)
    mine, theirs = state_of(again), state_of(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


KILLED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from tiny_models import tiny
from trainers import LABEL_LOOKERS, trained
from abft.training.checkpoints import last_complete_checkpoint
torch.set_num_threads(1)
folder, inputs, result = sys.argv[1:]
prompts, builder = torch.load(inputs, weights_only=False)
trainer = trained(
    tiny("llama", **LABEL_LOOKERS), prompts, builder, folder, resume=last_complete_checkpoint(folder),
    save_strategy="steps", save_steps=1, num_train_epochs=10,
)
weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
log = [entry for entry in trainer.state.log_history if "loss" in entry]
torch.save({"log": log, "controller": trainer.objective.state_dict(), "weights": weights}, result)
"""


def test_kill_9(toy_prompts, toy_builder, tmp_path):
    """Killed four times, in the middle of a step or of a checkpoint; the same command each time."""
    torch.save((toy_prompts, toy_builder), tmp_path / "prompts.pt")
    (tmp_path / "script.py").write_text(KILLED)
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}

    def start(folder, result):
        command = [sys.executable, str(tmp_path / "script.py"), str(folder), str(tmp_path / "prompts.pt"), str(result)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole", tmp_path / "whole.pt")
    folder, kills = tmp_path / "killed", 0
    for number, pause in enumerate((0.0, 0.013, 0.031, 0.05), 1):
        process = start(folder, tmp_path / "killed.pt")
        deadline = time.monotonic() + 120
        # Killed a little after the next checkpoints have begun, wherever the run then is.
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.glob("checkpoint-*"))) >= 3 * number:
                time.sleep(pause)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait(timeout=120)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 4
    last = start(folder, tmp_path / "killed.pt")
    for process in (last, whole):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-3000:]
    mine, theirs = (torch.load(tmp_path / name) for name in ("killed.pt", "whole.pt"))
    assert len(theirs["log"]) == 20
    names = ("step", "loss", "induction_heads", "wrong_penalty", "mass_correct", "mass_wrong")
    assert [[e[n] for n in names] for e in mine["log"]] == [[e[n] for n in names] for e in theirs["log"]]
    assert mine["controller"] == theirs["controller"]
    assert all(torch.equal(mine["weights"][name], weight) for name, weight in theirs["weights"].items())


def test_a_checkpoint_cut_off_is_passed_over(toy_prompts, toy_builder, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trained(tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, **changes)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["HeadCountState"]["attributes"]["head_counts"]) == 3
