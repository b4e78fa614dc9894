"""Short training runs of tiny models, and comparisons of two of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, tiny
from transformers import AutoModelForCausalLM

from abft.prompts.builder import PromptSet
from abft.training.config import ABFTConfig
from abft.training.trainer import ABFTTrainer

LABEL_LOOKERS: dict[str, Any] = {"spread": 0.7}  # random models with heads on both sides of the filter's threshold


def arguments(folder, **changes: Any) -> ABFTConfig:
    options: dict[str, Any] = dict(
        output_dir=str(folder),
        method="abft",
        learning_rate=1e-3,
        per_device_train_batch_size=8,  # several passes a step
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        num_train_epochs=4,
    )
    return ABFTConfig(**{**options, **changes})


def _as_set(samples, builder):
    """Return a list of prompts as a set that knows its builder."""
    plain = builder is not None and samples is not None and not isinstance(samples, PromptSet)
    return PromptSet(builder, samples) if plain else samples


def trainer_of(model, prompts, builder, folder, *, callbacks=None, eval_dataset=None, **changes: Any) -> ABFTTrainer:
    args = arguments(folder, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ABFTTrainer(model, args, _as_set(prompts, builder), _as_set(eval_dataset, builder), callbacks=callbacks)


def trained(*args: Any, resume: str | None = None, **changes: Any) -> ABFTTrainer:
    trainer = trainer_of(*args, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved_and_loaded(folder, kind="llama", dtype=torch.float32, **changes: Any):
    """Return a tiny model that was saved to the folder and loaded from it."""
    tiny(kind, **LABEL_LOOKERS, **changes).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_of(model):
    """Return the logits of two random prompts, (2, 16, V) float32."""
    with torch.no_grad():
        return model.eval()(torch.stack(random_prompts((16, 16))[0])).logits.float()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_trajectory(a, b, tolerance=1e-5):
    assert losses(a) == pytest.approx(losses(b), rel=tolerance, abs=1e-7)
    assert len(losses(a)) == a.state.global_step
    mine, theirs = a.objective.state_dict(), b.objective.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value == (pytest.approx(theirs[name], rel=1e-9) if name == "wrong_penalty" else theirs[name]), name
    assert_same_weights(state_of(a), state_of(b), tolerance)


def assert_same_weights(mine, theirs, tolerance=1e-5):
    """Compare by norm: Adam turns the rounding of a gradient near 0 into a visible step of that one element.

    A run moves weights by some 5e-3 of their norm, so 1e-5 is a five-hundredth of what training does.
    """
    assert mine.keys() == theirs.keys()
    for name in mine:
        error = (mine[name] - theirs[name]).norm()
        assert error <= tolerance * theirs[name].norm(), f"{name}: {error:.1e}"
