"""Momentum attention from scratch, on a model that a test can afford."""

import json
import math
from dataclasses import replace

import pytest

from abft.demo import corpus
from abft.models.attention import enable
from bench.cases.momentum_training import collect, measure, perplexities
from bench.recipe import Recipe, build_tokenizer, pretrain

TINY = Recipe(hidden_size=32, layers=1, heads=2, repeat_steps=2, prompt_steps=2, batch_size=4, momentum=0.2)


def test_a_model_is_measured_with_its_own_attention():
    row = measure(TINY, batches=2, queries=16, progress=False)
    assert (row["seed"], row["eta"]) == (0, 0.2)
    assert row["accuracy"].keys() == {task.name for task in corpus.DEMO_TASKS}
    tokenizer = build_tokenizer(TINY.context)
    model = enable(pretrain(TINY, tokenizer, progress=False))
    assert perplexities(model, TINY, tokenizer, 2) == row["perplexity"]
    assert perplexities(model, replace(TINY, momentum=0.0), tokenizer, 2) != row["perplexity"]


def test_perplexity_of_a_model_that_knows_nothing():
    """All logits 0: every token of the vocabulary is as likely."""
    tokenizer = build_tokenizer(TINY.context)
    recipe = replace(TINY, repeat_steps=0, prompt_steps=0)
    model = enable(pretrain(recipe, tokenizer, progress=False))
    model.get_output_embeddings().weight.data.zero_()
    found = perplexities(model, recipe, tokenizer, 1)
    assert found == pytest.approx({"text": len(tokenizer), "labels": len(tokenizer)}, rel=1e-4)


def test_an_interrupted_run_goes_on(tmp_path):
    made: list[tuple[int, float]] = []

    def measured(recipe):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((recipe.seed, recipe.momentum))
        return {"seed": recipe.seed, "eta": recipe.momentum, "perplexity": {"text": math.e}, "accuracy": {}}

    path = tmp_path / "momentum.json"
    with pytest.raises(KeyboardInterrupt):
        collect(path, [0, 1], [0.0, 0.1], measured)
    assert [(row["seed"], row["eta"]) for row in json.loads(path.read_text())["rows"]] == made
    made.pop(0)
    found = collect(path, [0, 1], [0.0, 0.1], measured)
    assert [(row["seed"], row["eta"]) for row in found["rows"]] == [(0, 0.0), (0, 0.1), (1, 0.0), (1, 0.1)]
    with pytest.raises(ValueError, match="momentum must lie between 0 and 1, got 2"):
        collect(path, [0], [2.0], measured)
