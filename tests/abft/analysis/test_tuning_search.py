"""The choice of demonstrations and rates by validation accuracy."""

import random

import pytest
from tiny_models import tiny

from abft.analysis import tuning_search
from abft.analysis.fine_tuning import fine_tune
from abft.analysis.tuning_search import choose_demonstrations, choose_rate, fitting
from abft.evaluation.classification import evaluate
from abft.prompts.builder import PromptBuilder
from abft.prompts.examples import Example


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(3)
    return [
        Example(" ".join(f"w{rng.randint(0, 42)}" for _ in range(rng.randint(3, 9))), rng.randint(0, 1))
        for _ in range(40)
    ]


def test_the_draw_of_the_best_icl_is_taken(toy_builder, examples):
    model, pool, validation = tiny("llama", spread=0.5), examples[:20], examples[20:]
    shown, choice = choose_demonstrations(model, toy_builder, pool, validation, count=4, seeds=range(5), progress=False)
    draws = [random.Random(seed).sample(pool, 4) for seed in range(5)]
    found = [evaluate(model, toy_builder.build_set((d, q) for q in validation), progress=False) for d in draws]
    assert choice.accuracy == {seed: result.accuracy for seed, result in enumerate(found)}
    assert len(set(choice.accuracy.values())) > 1
    best = max(range(5), key=lambda seed: (found[seed].accuracy, found[seed].true_label_likelihood))
    assert (choice.value, shown) == (best, draws[best])


def test_a_single_draw_needs_no_validation(toy_builder, examples, monkeypatch):
    monkeypatch.setattr(tuning_search, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    shown, choice = choose_demonstrations(
        tiny("llama"), toy_builder, examples[:20], examples[20:], count=3, seeds=[7], progress=False
    )
    assert shown == random.Random(7).sample(examples[:20], 3)
    assert choice.to_dict() == {"value": 7, "tried": []}


def test_the_best_rate_is_taken_and_divergence_is_none(toy_builder, examples):
    model, shown, validation = tiny("llama", spread=0.5), examples[:4], examples[20:]
    rates = [0.01, 1.0, 1e38, 2e38]
    choice = choose_rate(model, toy_builder, shown, validation, rates=rates, form="all", progress=False)
    prompts = toy_builder.build_set(([], query) for query in validation)
    found = {}
    for rate in rates[:2]:
        tuned, _, _ = fine_tune(model, toy_builder, shown, form="all", learning_rate=rate, progress=False)
        found[rate] = evaluate(tuned, prompts, progress=False)
    assert choice.accuracy == {**{rate: result.accuracy for rate, result in found.items()}, 1e38: None, 2e38: None}
    assert choice.value == max(found, key=lambda rate: (found[rate].accuracy, found[rate].true_label_likelihood))
    with pytest.raises(ValueError, match=r"diverges at every learning rate of \[1e\+38, 2e\+38\]"):
        choose_rate(model, toy_builder, shown, validation, rates=[1e38, 2e38], form="all", progress=False)
    with pytest.raises(ValueError, match="learning rates must be finite and over 0"):
        choose_rate(model, toy_builder, shown, validation, rates=[0.1, -1], form="all", progress=False)


def test_as_many_demonstrations_as_fit(toy_builder, examples):
    queries = examples[30:]
    longest = max(toy_builder.build(examples[:6], query).length for query in queries)
    for room, count in ((longest, 6), (longest - 1, 5)):
        builder = PromptBuilder(toy_builder.tokenizer, toy_builder.task, max_length=room)
        assert fitting(builder, examples[:6], queries) == examples[:count]
        for query in queries:
            builder.build(examples[:count], query)
    short = max(toy_builder.build([], query).length for query in queries)
    with pytest.raises(ValueError, match="no demonstration fits into"):
        fitting(PromptBuilder(toy_builder.tokenizer, toy_builder.task, max_length=short), examples[:6], queries)
