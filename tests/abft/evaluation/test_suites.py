"""The tests' prompts and results, on the demo model."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from abft.evaluation.classification import evaluate
from abft.evaluation.suites import CALIBRATION, TESTS, TaskSuite, check_tests, correct_by_query
from abft.prompts.builder import PromptBuilder


@pytest.fixture
def suite(small_data, demo_tokenizer) -> TaskSuite:
    return TaskSuite(small_data, demo_tokenizer, k=4, max_length=2048)


def decoded(suite: TaskSuite, prompt) -> str:
    return suite.tokenizer.decode(prompt.input_ids)


def test_every_test_gives_its_results(suite, demo_model):
    results = suite.run(demo_model, (*TESTS, CALIBRATION), progress=False)
    assert set(results) == {*TESTS, CALIBRATION, "heads", "unseen_heads"}
    normal = results["Normal"]
    assert normal["n"] == len(normal["predictions"]) == 32
    right = sum(p == y for p, y in zip(normal["predictions"], normal["labels"], strict=True))
    assert normal["accuracy"] == right / 32
    assert len(results["TempSensitivity"]["accuracy"]) == 9
    assert len(results["DemoSensitivity"]["accuracy"]) == 8
    for test in ("TempSensitivity", "DemoSensitivity"):
        assert 0.25 <= results[test]["consistency"] <= 1
    assert results["GLER"]["correct_label_shares"] == [1, 0.75, 0.5, 0.25, 0]
    assert results["GLER"]["accuracy"][0] == normal["accuracy"]
    shares, accuracies = results["GLER"]["correct_label_shares"], results["GLER"]["accuracy"]
    assert results["GLER"]["gler"] == pytest.approx(np.polyfit(shares, accuracies, 1)[0])
    assert 0 < results["Bias"]["contextual"]["entropy"] <= math.log(4)
    assert results["Unseen"]["n"] == 32
    unseen = results["unseen_heads"]
    assert not np.any(unseen["mass_correct"])
    assert np.all(np.array(unseen["mass_wrong"]) > 0)
    assert results["ZeroShot"]["n"] == 16
    calibrated = results[CALIBRATION]
    assert calibrated["labels"] == normal["labels"]


def test_normal_asks_every_query_twice_with_other_demonstrations(suite, small_data):
    prompts = suite.normal
    draws = small_data.draws(4, 32)
    for number, prompt in enumerate(prompts):
        assert prompt.query_label == small_data.queries[number % 16].label
        assert list(prompt.demonstration_labels) == [small_data.demonstrations[i].label for i in draws[number]]
    assert draws[:16] != draws[16:]


def test_limit_keeps_the_first_queries_with_their_own_demonstrations(suite):
    few = replace(suite, limit=5)
    assert list(few.normal) == [*suite.normal[:5], *suite.normal[16:21]]
    assert [len(prompts) for prompts in few.templates()] == [5] * 9
    assert few.templates()[3] == suite.templates()[3][:5]
    whole = suite.demonstration_draws()
    assert list(few.demonstration_draws()) == [p for draw in range(8) for p in whole[16 * draw : 16 * draw + 5]]
    for make in ("unseen", "empty_queries", "random_word_queries"):
        assert list(getattr(few, make)()) == [p for i, p in enumerate(getattr(suite, make)()) if i % 16 < 5], make
    for some, all_of_them in zip(few.with_wrong_labels(), suite.with_wrong_labels(), strict=True):
        assert list(some) == [p for i, p in enumerate(all_of_them) if i % 16 < 5]
    assert few.zero_shot() == suite.zero_shot()[:5]


def test_wrong_labels_are_the_next_class(suite):
    right, _, half, _, all_wrong = suite.with_wrong_labels()
    assert right == suite.normal
    for before, after in zip(right, all_wrong, strict=True):
        assert [(label + 1) % 4 for label in before.demonstration_labels] == list(after.demonstration_labels)
        assert before.query_label == after.query_label
    changed = [
        sum(a != b for a, b in zip(p.demonstration_labels, q.demonstration_labels, strict=True))
        for p, q in zip(right, half, strict=True)
    ]
    assert set(changed) == {2}
    places = Counter(
        i
        for p, q in zip(right, half, strict=True)
        for i in range(4)
        if p.demonstration_labels[i] != q.demonstration_labels[i]
    )
    assert len(places) == 4


def test_unseen_label_never_shown(suite):
    prompts = suite.unseen()
    assert len(prompts) == 32
    assert all(prompt.query_label not in prompt.demonstration_labels for prompt in prompts)
    with pytest.raises(ValueError, match="demonstrations of other classes"):
        replace(suite, k=55).unseen()


def test_unseen_with_more_demonstrations_than_a_draw_would_miss(suite):
    """One draw in 140,000 shows no demonstration of the class: the others are drawn directly."""
    prompts = replace(suite, k=30).unseen()
    assert all(prompt.query_label not in prompt.demonstration_labels for prompt in prompts)
    assert all(len(prompt.demonstration_labels) == 30 for prompt in prompts)


def test_zero_shot_shows_the_query_alone(suite, small_data):
    prompts = suite.zero_shot()
    assert [decoded(suite, prompt) for prompt in prompts] == [
        decoded(suite, suite.builder.build([], query)) for query in small_data.queries
    ]
    assert decoded(suite, prompts[0]).count("topic :") == 1
    assert not any(prompt.demonstration_labels for prompt in prompts)


def test_templates_vary_four_parts(suite):
    builders = [prompts.builder for prompts in suite.templates()]
    for part in ("instruction", "text_prefix", "label_prefix", "separator"):
        values = Counter(getattr(builder.task.template, part) for builder in builders)
        assert sorted(values.values()) == [3, 3, 3]
    pairs = {(b.task.template.instruction, b.task.template.separator) for b in builders}
    assert len(pairs) == 9  # orthogonal


def test_bias_prompts_ask_nothing(suite, small_data):
    prompts = suite.empty_queries()
    assert decoded(suite, prompts[0]).endswith("text : topic :")
    assert [prompt.demonstration_labels for prompt in prompts] == [p.demonstration_labels for p in suite.normal]
    words = suite.random_word_queries()[0]
    query = decoded(suite, words).rsplit("text :", 1)[1].rsplit("topic :", 1)[0].split()
    known = {word for example in small_data.demonstrations for word in example.text.split()}
    assert len(suite.random_word_queries()) == 32
    assert len(query) == 128
    assert set(query) <= known


def test_calibration_divides_by_the_mean_answer_to_nothing(suite, demo_model, small_data):
    normal = evaluate(demo_model, suite.normal, progress=False)
    empty = suite.calibration_prompts()
    assert len(empty) == 512
    shown = {decoded(suite, prompt).rsplit("text :", 1)[1] for prompt in empty}
    assert shown == {" topic :"}
    prior = evaluate(demo_model, empty, progress=False).probabilities.mean(0)
    expected = (normal.probabilities / prior).argmax(1)
    found = suite.run(demo_model, [CALIBRATION], progress=False)[CALIBRATION]
    assert found["predictions"] == expected.tolist()


def test_sensitivity_counts_predictions_of_the_same_query(suite, demo_model):
    found = suite.run(demo_model, ["DemoSensitivity"], progress=False)["DemoSensitivity"]
    result = evaluate(demo_model, suite.demonstration_draws(), progress=False)
    by_query = result.predictions.view(8, 16).T.tolist()
    expected = sum(max(Counter(row).values()) / 8 for row in by_query) / 16
    assert found["consistency"] == pytest.approx(expected)
    by_draw = (result.predictions == result.labels).view(8, 16).double().mean(1)
    assert found["accuracy"] == pytest.approx(by_draw.tolist())


def test_instruction_and_text(demo_tokenizer, small_data):
    task = replace(small_data.task, template=replace(small_data.task.template, instruction="the theme : "))
    builder = PromptBuilder(demo_tokenizer, task)
    demonstrations, query = small_data.demonstrations[:2], small_data.queries[0]
    text = builder.text(demonstrations, query)
    assert text.startswith("the theme : text:")
    assert text.endswith("topic:")
    ids = builder.build(demonstrations, query).input_ids
    assert list(ids) == demo_tokenizer(text).input_ids


def test_queries_not_prompts_are_what_is_counted():
    """Prompts of the first draw, then of the second: query 0 is right twice, query 1 once, query 2 never."""
    result = {"predictions": [0, 0, 0, 0, 1, 0], "labels": [0, 1, 2, 0, 1, 2]}
    assert correct_by_query(result).tolist() == [1, 0.5, 0]
    assert correct_by_query({**result, "draws": 1}).tolist() == [1, 0, 0, 1, 1, 0]


def test_unknown_test():
    with pytest.raises(ValueError, match="unknown test 'Nomal'; known are Normal"):
        check_tests(["Nomal"])


def test_whole_pass_costs_little_more_than_its_forward_passes(suite, demo_model):
    """The model runs one forward pass of each prompt, and computes the labels' logits only."""
    tokens = []

    def count(module, arguments, keywords):
        tokens.append(keywords["attention_mask"].sum().item())

    hook = demo_model.model.register_forward_pre_hook(count, with_kwargs=True)
    head = []
    demo_model.lm_head.register_forward_hook(lambda *_: head.append(1))
    evaluate(demo_model, suite.normal, batch_size=8, progress=False)
    hook.remove()
    assert sum(tokens) == sum(prompt.length for prompt in suite.normal)
    assert len(tokens) == 4
    assert not head
    assert torch.is_grad_enabled()
