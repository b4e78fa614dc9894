"""The tests of the paper's evaluation on one task: their prompts, and the results of a model.

| test | prompts | result |
|---|---|---|
| Normal | 512 queries × 2 draws of demonstrations | accuracy, macro-F1, likelihood, ECE, posterior bias |
| TempSensitivity | 9 templates × 100 queries | consistency of the predictions over templates |
| DemoSensitivity | 8 draws × 128 queries | consistency over demonstrations |
| GLER | Normal's, with 0, ¼ … 1 of the labels wrong | slope of accuracy over the share of correct labels |
| Bias | empty queries; queries of random words | entropy of the mean answer |
| Unseen | no demonstration carries the gold label | as Normal |
| (Calibration) | Normal's, divided by the mean answer to empty queries | as Normal |

Source: StaICC (arXiv 2501.15708) and arXiv 2505.14233, section 4; contextual calibration: arXiv 2102.09690.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from abft.evaluation.classification import Evaluation, evaluate
from abft.evaluation.label_attention import head_statistics
from abft.evaluation.metrics import calibrate, consistency, distribution_bias, gler, posterior_bias, staicc_metrics
from abft.evaluation.staicc import StaICCRandom, TaskData, template_variants
from abft.prompts.builder import Prompt, PromptBuilder, PromptSet
from abft.prompts.examples import Example

__all__ = ["TESTS", "StaICCPromptBuilder", "TaskSuite", "check_tests", "correct_by_query"]

TESTS = ("Normal", "TempSensitivity", "DemoSensitivity", "GLER", "Bias", "Unseen")
"""Names of the tests, as in StaICC and the paper."""
CALIBRATION = "Calibration"
"""A method that is a test of the untrained model: its answers to Normal's prompts, calibrated."""

NORMAL_DRAWS = 2
TEMPLATE_QUERIES = 100
DEMONSTRATION_DRAWS, DEMONSTRATION_QUERIES = 8, 128
ERROR_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
CALIBRATION_PROMPTS = 128
DOMAIN_WORDS = 128
HEAD_PROMPTS = 256


class StaICCPromptBuilder(PromptBuilder):
    """Builds prompts and label tokens exactly as StaICC 0.1.1 does, to reproduce its numbers.

    The prompt ends in the space before the label and is tokenized in one piece. A label is scored by the last token of
    the label tokenized alone. Label positions are not known, so these prompts are for evaluation only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Any, *, max_length: int | None = None) -> None:
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.label_token_ids = [tokenizer(label).input_ids[-1] for label in task.labels]

    def build(self, demonstrations: Sequence[Example], query: Example) -> Prompt:
        ids = self.tokenizer(self.text(demonstrations, query) + " ").input_ids
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(f"prompt of {len(ids)} tokens exceeds max_length={self.max_length}; lower k")
        return Prompt(ids, (), (), query.label, label_id=self.label_token_ids[query.label])


@dataclass(frozen=True)
class TaskSuite:
    """The tests of one task for one tokenizer; prompts are made on first use and kept.

    Args:
        data: the task and its splits.
        tokenizer: of the models to test.
        k: demonstrations per prompt.
        max_length: the models' context; a longer prompt is refused.
        limit: queries of each test, at most. None for the published numbers.
        staicc_compat: StaICC's own prompts, label tokens and arithmetic in Normal, to reproduce its numbers.
    """

    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    k: int
    max_length: int | None = None
    limit: int | None = None
    staicc_compat: bool = False

    @cached_property
    def builder(self) -> PromptBuilder:
        """The builder of prompts in the task's own template."""
        return PromptBuilder(self.tokenizer, self.data.task, max_length=self.max_length)

    def _queries(self, published: int) -> list[Example]:
        return self.data.queries[: min(published, self.limit or published)]

    def _build(self, builder: PromptBuilder, queries: Sequence[Example], draws: Iterable[Sequence[int]]) -> PromptSet:
        """Build one prompt per draw; the queries are repeated in turn."""
        pool = self.data.demonstrations
        return builder.build_set(
            ([pool[index] for index in drawn], queries[number % len(queries)]) for number, drawn in enumerate(draws)
        )

    @cached_property
    def normal(self) -> PromptSet:
        """StaICC's prompts: every query with two draws of demonstrations."""
        queries = self._queries(len(self.data.queries))
        every = len(self.data.queries)
        draws = self.data.draws(self.k, NORMAL_DRAWS * every)
        kept = [drawn for number, drawn in enumerate(draws) if number % every < len(queries)]
        builder = self.builder
        if self.staicc_compat:
            builder = StaICCPromptBuilder(self.tokenizer, self.data.task, max_length=self.max_length)
        return self._build(builder, queries, kept)

    def templates(self) -> list[PromptSet]:
        """Return nine sets, one per template, each with the same 100 queries and demonstrations."""
        queries = self._queries(TEMPLATE_QUERIES)
        draws = self.data.draws(self.k, len(queries))
        builders = [
            PromptBuilder(self.tokenizer, replace(self.data.task, template=template), max_length=self.max_length)
            for template in template_variants(self.data.task)
        ]
        return [self._build(builder, queries, draws) for builder in builders]

    def demonstration_draws(self) -> PromptSet:
        """Return eight draws of demonstrations for 128 queries, draw by draw."""
        queries = self._queries(DEMONSTRATION_QUERIES)
        draws = self.data.draws(self.k, DEMONSTRATION_DRAWS * DEMONSTRATION_QUERIES)
        kept = [drawn for number, drawn in enumerate(draws) if number % DEMONSTRATION_QUERIES < len(queries)]
        return self._build(self.builder, queries, kept)

    def with_wrong_labels(self, rate: float) -> PromptSet:
        """Return Normal's prompts with that share of the labels, rounded down, replaced by the next class."""
        queries, pool, generator = self._queries(len(self.data.queries)), self.data.demonstrations, StaICCRandom()
        classes, every = len(self.data.task.labels), len(self.data.queries)
        pairs = []
        for number, drawn in enumerate(self.data.draws(self.k, NORMAL_DRAWS * every)):
            wrong = set(generator.sample(drawn, int(self.k * rate)))
            if number % every >= len(queries):
                continue
            shown = [
                replace(pool[index], label=(pool[index].label + 1) % classes) if index in wrong else pool[index]
                for index in drawn
            ]
            pairs.append((shown, queries[number % every]))
        return self.builder.build_set(pairs)

    def unseen(self) -> PromptSet:
        """Return every query with demonstrations of other classes only.

        Raises:
            ValueError: fewer than k demonstrations of other classes.
        """
        generator, pool = StaICCRandom(), self.data.demonstrations
        classes = range(len(self.data.task.labels))
        others = {label: [example for example in pool if example.label != label] for label in classes}
        if (fewest := min(map(len, others.values()))) < self.k:
            raise ValueError(f"k={self.k}, but only {fewest} demonstrations of other classes; lower k")
        return self.builder.build_set(
            (generator.sample(others[query.label], self.k), query)
            for _ in range(NORMAL_DRAWS)
            for query in self._queries(len(self.data.queries))
        )

    def empty_queries(self, pool: Sequence[Example], n: int) -> PromptSet:
        """Return n prompts with demonstrations from `pool` and an empty query."""
        generator = StaICCRandom()
        return self.builder.build_set((generator.sample(pool, self.k), Example("", 0)) for _ in range(n))

    def random_word_queries(self) -> PromptSet:
        """Return Normal's demonstrations, each with a query of 128 words drawn from the demonstrations' texts."""
        queries, pool, words = self._queries(len(self.data.queries)), self.data.demonstrations, StaICCRandom()

        def text() -> str:
            chosen = []
            for _ in range(DOMAIN_WORDS):
                of_text = pool[words.between(0, len(pool))].text.split(" ")
                chosen.append(of_text[words.between(0, len(of_text))])
            return " ".join(chosen)

        draws = self.data.draws(self.k, len(queries))
        return self.builder.build_set(([pool[i] for i in drawn], Example(text(), 0)) for drawn in draws)

    # --- results --------------------------------------------------------------------------------------------

    def run(
        self, model: Any, tests: Sequence[str], *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Return a model's results, plain data by test; with Normal also `heads`, the attention of its heads.

        Args:
            model: on the `"abft"` attention, with the suite's tokenizer.
            tests: some of `TESTS`, and `CALIBRATION`.
            batch_size: prompts per forward pass.
            progress: show progress bars.

        Raises:
            ValueError: an unknown test, or prompts that do not fit the model.
        """
        check_tests([test for test in tests if test != CALIBRATION])
        shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        results: dict[str, dict[str, Any]] = {}
        normal = None
        if {"Normal", CALIBRATION} & set(tests):
            normal = evaluate(model, self.normal, **shared)
        if normal is not None and "Normal" in tests:
            results["Normal"] = {
                **_plain(normal),
                "posterior_bias": posterior_bias(normal.probabilities, normal.labels),
            }
            if self.staicc_compat:
                results["Normal"]["staicc"] = staicc_metrics(normal)
            elif self.k:
                heads = head_statistics(model, self.normal[:HEAD_PROMPTS], **shared)
                results["heads"] = heads.to_dict()
        if normal is not None and CALIBRATION in tests:
            prior = evaluate(model, self.empty_queries(self.data.train, CALIBRATION_PROMPTS), **shared)
            calibrated = calibrate(normal.probabilities, prior.probabilities.mean(dim=0))
            results[CALIBRATION] = _plain(Evaluation.from_probabilities(calibrated, normal.labels))
        if "TempSensitivity" in tests:
            runs = [evaluate(model, prompts, **shared) for prompts in self.templates()]
            results["TempSensitivity"] = _sensitivity(runs)
        if "DemoSensitivity" in tests:
            whole = evaluate(model, self.demonstration_draws(), **shared)
            queries = whole.n // DEMONSTRATION_DRAWS
            parts = zip(whole.probabilities.split(queries), whole.labels.split(queries), strict=True)
            results["DemoSensitivity"] = _sensitivity([Evaluation.from_probabilities(p, y) for p, y in parts])
        if "GLER" in tests:
            runs = [evaluate(model, self.with_wrong_labels(rate), **shared) for rate in ERROR_RATES]
            accuracies = [run.accuracy for run in runs]
            shares = [1 - int(self.k * rate) / max(self.k, 1) for rate in ERROR_RATES]
            slope = gler(shares, accuracies) if len(set(shares)) > 1 else None
            results["GLER"] = {"gler": slope, "correct_label_shares": shares, "accuracy": accuracies}
        if "Bias" in tests:
            n = NORMAL_DRAWS * len(self._queries(len(self.data.queries)))
            empty = evaluate(model, self.empty_queries(self.data.demonstrations, n), **shared)
            words = evaluate(model, self.random_word_queries(), **shared)
            results["Bias"] = {
                "contextual": distribution_bias(empty.probabilities),
                "domain": distribution_bias(words.probabilities),
            }
        if "Unseen" in tests:
            results["Unseen"] = _plain(evaluate(model, self.unseen(), **shared))
        return results


def correct_by_query(result: Mapping[str, Any]) -> np.ndarray:
    """Return how often each query was answered correctly, `(Q,)` in 0 … 1, from a test that draws it twice.

    Models are compared by queries, because two prompts with the same query are not independent.
    """
    correct = np.equal(result["predictions"], result["labels"])
    return correct.reshape(NORMAL_DRAWS, -1).mean(axis=0)


def check_tests(tests: Sequence[str]) -> None:
    """Raise ValueError for a name that is no test."""
    if unknown := [test for test in tests if test not in TESTS]:
        raise ValueError(f"unknown test {unknown[0]!r}; known are {', '.join(TESTS)}")


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics, and the predictions and labels that paired comparisons need."""
    return {
        **evaluation.to_dict(),
        "predictions": evaluation.predictions.tolist(),
        "labels": evaluation.labels.tolist(),
    }


def _sensitivity(runs: Sequence[Evaluation]) -> dict[str, Any]:
    accuracies = [run.accuracy for run in runs]
    return {
        "consistency": consistency(torch.stack([run.predictions for run in runs])),
        "accuracy": accuracies,
        "accuracy_mean": sum(accuracies) / len(accuracies),
    }
