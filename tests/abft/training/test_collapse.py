"""The share objective in the trainer, and the end of a run whose induction heads vanish."""

import warnings

import pytest
import torch
from tiny_models import tiny
from trainers import LABEL_LOOKERS, assert_same_trajectory, losses, state_of, trained, trainer_of
from transformers import TrainerCallback

from abft.losses import MassAwardController, share_loss
from abft.models.attention import enable
from abft.models.masses import attention_mass
from abft.prompts.collation import MASS_INPUTS, Collator

COUNTS = ("correct_demonstrations", "demonstrations", "prompt_lengths")


def run(prompts, builder, folder, **changes):
    return trained(tiny("llama", **LABEL_LOOKERS), prompts, builder, folder, **changes)


def test_the_share_trains(toy_prompts, toy_builder, tmp_path):
    changes = {"method": "share", "head_filter": False, "num_train_epochs": 10}
    trainer = run(toy_prompts, toy_builder, tmp_path, **changes)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = (sum(entry["loss"] for entry in some) for some in (entries[:2], entries[-2:]))
    assert last < 0.85 * first
    assert "wrong_penalty" not in entries[0]


def test_its_award_follows_the_heads(toy_prompts, toy_builder, tmp_path):
    changes = {"method": "share", "num_train_epochs": 4, "mass_award": 0.2, "learning_rate": 3e-3}
    trainer = run(toy_prompts, toy_builder, tmp_path, **changes)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    controller = MassAwardController(0.2)
    steered = [0.2, *(controller.update(entry["induction_heads"]) for entry in entries)]
    assert [entry["mass_award"] for entry in entries] == pytest.approx(steered[:-1])
    assert len(set(steered)) > 3
    assert trainer.objective.controller.weight == pytest.approx(steered[-1])


@pytest.mark.parametrize("award", [0.0, 0.1, 0.5])
def test_its_first_loss_is_that_of_the_masses(award, toy_prompts, toy_builder, tmp_path):
    prompts = toy_prompts[:32]
    trainer = run(prompts, toy_builder, tmp_path, method="share", num_train_epochs=1, mass_award=award)
    model = enable(tiny("llama", **LABEL_LOOKERS))
    batch = Collator()(list(prompts))
    masses = attention_mass(model, **{name: batch[name] for name in MASS_INPUTS if name in batch})
    want = share_loss(
        masses, *(batch[name] for name in COUNTS), row_weights=batch["row_weights"], mass_award=award
    ).loss
    assert losses(trainer)[0] == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("change", [{"packing": True, "tokens_per_batch": 64}, {"gradient_checkpointing": True}])
def test_its_trajectory_does_not_depend_on_the_passes(toy_prompts, toy_builder, tmp_path, change):
    plain = run(toy_prompts, toy_builder, tmp_path / "a", method="share")
    if "gradient_checkpointing" in change:
        change = {**change, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert_same_trajectory(plain, run(toy_prompts, toy_builder, tmp_path / "b", method="share", **change))


def test_restricted_gradients_of_the_share(toy_prompts, toy_builder, tmp_path):
    trainer = run(toy_prompts, toy_builder, tmp_path, method="share", restricted_gradient=True, learning_rate=3e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]


class Weights(TrainerCallback):
    """Keeps the trained weights after each step, by step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = {
            name: p.detach().clone() for name, p in kwargs["model"].named_parameters() if p.requires_grad
        }


class Shrink(TrainerCallback):
    """Makes attention uniform after a step: then no head looks at labels."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                for name, parameter in kwargs["model"].named_parameters():
                    if "q_proj" in name:
                        parameter.zero_()


def test_training_stops_with_the_weights_before_the_collapse(toy_prompts, toy_builder, tmp_path):
    weights = Weights()
    trainer = trainer_of(
        tiny("llama", **LABEL_LOOKERS),
        toy_prompts,
        toy_builder,
        tmp_path,
        callbacks=[weights, Shrink(3)],
        stop_on_collapse=True,
        learning_rate=1e-4,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    # The heads of step 4 are counted with the weights after step 3, which are uniform.
    assert trainer.state.global_step == 4
    found = next(entry for entry in trainer.state.log_history if "restored_step" in entry)
    assert found["step"] == 4
    mine = state_of(trainer)
    # The count of step 3 was that of the weights after step 2, the last that were measured and healthy.
    assert found["restored_step"] == 2
    assert all(torch.equal(mine[name], weight) for name, weight in weights.after[2].items())
    assert any("training ends with the weights after step 2" in str(entry.message) for entry in caught)


def test_without_the_option_training_goes_on(toy_prompts, toy_builder, tmp_path):
    trainer = trainer_of(
        tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, callbacks=[Shrink(3)], learning_rate=1e-4
    )
    with pytest.warns(UserWarning, match="attention is collapsing.*stop_on_collapse"):
        trainer.train()
    assert trainer.state.global_step == 8


def test_the_rate_warms_up(toy_prompts, toy_builder, tmp_path):
    trainer = run(toy_prompts, toy_builder, tmp_path, method="share", warmup_steps=4, learning_rate=1e-3)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3])
