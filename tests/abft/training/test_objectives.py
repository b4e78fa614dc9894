"""A new loss is one class that is registered: options, trainer, plan and command line take it as it is."""

import math

import pytest
import torch
from tiny_models import tiny
from trainers import LABEL_LOOKERS, arguments, assert_same_trajectory, losses, trained
from transformers import HfArgumentParser, LlamaConfig

from abft.models.masses import attention_mass
from abft.prompts.collation import MASS_INPUTS, Collator
from abft.training.config import ABFTConfig
from abft.training.fit import fit
from abft.training.objectives.objective import LogitObjective, MassObjective, SampleLosses
from abft.training.objectives.objective_registry import OBJECTIVES, objective_of, register
from abft.training.plan import modes, plan


class CorrectMass(MassObjective):
    """Sum over layers and heads of −ln m⁺, for prompts with a correct label; counts its steps."""

    name = "correct_mass"
    description = "negative logarithm of the mass on correct labels"

    def __init__(self, options):
        super().__init__(options)
        self.steps = 0

    def losses(self, outputs, batch):
        correct = torch.stack([mass[:, :, -1, 0] for mass in outputs])
        informative = batch["correct_demonstrations"][:, 0] > 0
        per_sample = -(correct.clamp(min=1e-9).log().sum(dim=(0, 2))) * informative
        return SampleLosses(per_sample, {"mass": correct.detach().sum()})

    def end_step(self, sums, samples):
        self.steps += 1
        return {"mass_per_prompt": sums["mass"] / samples, "steps_so_far": self.steps}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Entropy(LogitObjective):
    """Entropy of the next token: no labels needed."""

    name = "entropy"
    description = "entropy of the next token"

    def losses(self, outputs, batch):
        return SampleLosses(torch.distributions.Categorical(logits=outputs.float()).entropy(), {})


@pytest.fixture(autouse=True)
def registered():
    for objective in (CorrectMass, Entropy):
        register(objective)
    yield
    for objective in (CorrectMass, Entropy):
        del OBJECTIVES[objective.name]


def run(prompts, builder, folder, method="correct_mass", **changes):
    return trained(tiny("llama", **LABEL_LOOKERS), prompts, builder, folder, method=method, **changes)


def test_a_new_loss_trains(toy_prompts, toy_builder, tmp_path):
    trainer = run(toy_prompts, toy_builder, tmp_path, learning_rate=3e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["steps_so_far"] for entry in entries] == list(range(1, 9))
    assert "induction_heads" not in entries[0]


def test_its_first_loss_is_that_of_the_masses(toy_prompts, toy_builder, tmp_path):
    prompts = toy_prompts[:32]
    trainer = run(prompts, toy_builder, tmp_path, num_train_epochs=1)
    model = tiny("llama", **LABEL_LOOKERS)
    model.set_attn_implementation("abft")
    batch = Collator()(prompts)
    masses = torch.stack(attention_mass(model, **{name: batch[name] for name in MASS_INPUTS if name in batch}))
    masses = masses[:, :, :, 0, 0]
    per_prompt = -masses.clamp(min=1e-9).log().sum(dim=(0, 2)) * (batch["correct_demonstrations"][:, 0] > 0)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(per_prompt.mean().item(), rel=1e-5)
    assert entry["mass_per_prompt"] == pytest.approx(masses.sum().item() / 32, rel=1e-5)


@pytest.mark.parametrize("restricted", [False, True])
def test_layout_of_its_batches_does_not_matter(restricted, toy_prompts, toy_builder, tmp_path):
    changes = {"restricted_gradient": restricted, "num_train_epochs": 2}
    runs = [
        run(toy_prompts, toy_builder, tmp_path, **changes, **layout)
        for layout in ({}, {"packing": True, "per_device_train_batch_size": 32})
    ]
    assert_same_trajectory(*runs)


def test_restricted_gradients_are_its_own(toy_prompts, toy_builder, tmp_path):
    full, restricted = (
        run(toy_prompts, toy_builder, tmp_path, restricted_gradient=on, learning_rate=3e-3) for on in (False, True)
    )
    assert losses(full)[0] == pytest.approx(losses(restricted)[0], rel=1e-6)
    assert losses(full)[-1] != pytest.approx(losses(restricted)[-1], rel=1e-3)


def test_its_state_is_resumed(toy_prompts, toy_builder, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = run(toy_prompts, toy_builder, tmp_path, **changes)
    again = run(toy_prompts, toy_builder, tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **changes)
    assert losses(again) == losses(whole)
    assert again.objective.steps == whole.objective.steps == 4


def test_a_loss_on_logits_trains(toy_prompts, toy_builder, tmp_path):
    trainer = run(toy_prompts, toy_builder, tmp_path, method="entropy", learning_rate=3e-3)
    assert 0 < losses(trainer)[-1] < losses(trainer)[0] <= math.log(64)
    with pytest.raises(ValueError, match="method='entropy' has a loss at the last layer only"):
        arguments(tmp_path, method="entropy", restricted_gradient=True)


def test_the_command_line_offers_it(tmp_path):
    parser = HfArgumentParser([ABFTConfig])
    assert "{share,abft,e2e,e2e_qk,metaicl,correct_mass,entropy}" in parser.format_help()
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--method", "correct_mass", "--use_cpu", "True"]
    )
    assert objective_of(config.method) is CorrectMass


def test_a_run_of_it_can_be_planned(tmp_path):
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    assert modes() == (
        "full",
        "restricted",
        "e2e",
        "e2e_qk",
        "metaicl",
        "correct_mass",
        "correct_mass_restricted",
        "entropy",
        "inference",
    )
    of_mass, restricted, full = (
        plan(str(tmp_path), context=512, mode=mode) for mode in ("correct_mass", "correct_mass_restricted", "full")
    )
    assert of_mass.parts == full.parts
    assert restricted.parts["activations"] < of_mass.parts["activations"]
    assert "--method correct_mass --restricted_gradient True" in restricted.command


def test_names_are_unique():
    class Other(CorrectMass):
        pass

    register(CorrectMass)  # again
    with pytest.raises(ValueError, match="method 'correct_mass' is CorrectMass; choose another name"):
        register(Other)
    known = " or ".join(map(repr, ("share", "abft", "e2e", "e2e_qk", "metaicl", "correct_mass")))
    with pytest.raises(ValueError, match=f"method must be {known}"):
        objective_of("Correct_mass")


# --- one run from samples to weights ----------------------------------------------------------------------


def test_fit_resumes_and_saves(toy_prompts, toy_builder, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    resumed = []

    def once(steps):
        return fit(
            tiny("llama", **LABEL_LOOKERS),
            arguments(tmp_path / "run", max_steps=steps, **changes),
            toy_prompts,
            progress=False,
            save_to=tmp_path / "weights",
            on_resume=resumed.append,
        )

    first = once(2)
    assert first.checkpoint is None
    assert (tmp_path / "weights" / "abft_config.json").is_file()
    second = once(-1)
    assert resumed == [second.checkpoint] == [str(tmp_path / "run" / "checkpoint-2")]
    assert [entry["step"] for entry in second.history] == [1, 2, 3, 4]
    assert second.history[:2] == first.history
    assert second.seconds > 0
