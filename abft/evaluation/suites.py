"""The tests of the paper's evaluation on one task: their prompts, and the results of a model.

| test | prompts | result |
|---|---|---|
| Normal | 512 queries × 2 draws of demonstrations | accuracy, macro-F1, likelihood, ECE, posterior bias |
| TempSensitivity | 9 templates × 100 queries | consistency of the predictions over templates |
| DemoSensitivity | 8 draws × 128 queries | consistency over demonstrations |
| GLER | Normal's, with 0, ¼ … 1 of the labels wrong | slope of accuracy over the share of correct labels |
| Bias | Normal's demonstrations, with empty queries and with random words | entropy of the mean answer |
| Unseen | no demonstration carries the gold label | as Normal, without the bias |
| ZeroShot | 512 queries without demonstrations | as Unseen |
| (Calibration) | Normal's, divided by the mean answer to 512 empty queries | as Unseen |

Source: StaICC (arXiv 2501.15708) and arXiv 2505.14233, section 4; contextual calibration: arXiv 2102.09690.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from abft.evaluation.classification import Evaluation, evaluate, evaluate_with_heads
from abft.evaluation.metrics import calibrate, consistency, distribution_bias, gler, posterior_bias, staicc_metrics
from abft.evaluation.staicc import StaICCRandom, TaskData, template_variants
from abft.prompts.builder import Prompt, PromptBuilder, PromptSet
from abft.prompts.examples import Example

__all__ = ["TESTS", "StaICCPromptBuilder", "TaskSuite", "check_tests", "correct_by_query"]

TESTS = ("Normal", "TempSensitivity", "DemoSensitivity", "GLER", "Bias", "Unseen", "ZeroShot")
"""Names of the tests, as in StaICC and the paper."""
CALIBRATION = "Calibration"
"""A method that is a test of the untrained model: its answers to Normal's prompts, calibrated."""

NORMAL_DRAWS = 2
TEMPLATE_QUERIES = 100
DEMONSTRATION_DRAWS, DEMONSTRATION_QUERIES = 8, 128
ERROR_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
CALIBRATION_PROMPTS = 512
DOMAIN_WORDS = 128
RAREST_DRAW = 1 / 512
"""Share of the draws without the gold label below which Unseen does not wait for one."""
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

    def _normal_draws(self) -> Iterator[tuple[int, Example, list[int]]]:
        """Yield number, query and demonstrations of each of StaICC's prompts, those over the limit included."""
        every = self.data.queries
        for number, drawn in enumerate(self.data.draws(self.k, NORMAL_DRAWS * len(every))):
            yield number, every[number % len(every)], drawn

    def _within_limit(self, number: int) -> bool:
        every = len(self.data.queries)
        return number % every < len(self._queries(every))

    @cached_property
    def normal(self) -> PromptSet:
        """StaICC's prompts: every query with two draws of demonstrations."""
        builder, pool = self.builder, self.data.demonstrations
        if self.staicc_compat:
            builder = StaICCPromptBuilder(self.tokenizer, self.data.task, max_length=self.max_length)
        return builder.build_set(
            ([pool[index] for index in drawn], query)
            for number, query, drawn in self._normal_draws()
            if self._within_limit(number)
        )

    def zero_shot(self) -> PromptSet:
        """Return every query once, without demonstrations."""
        return self.builder.build_set(((), query) for query in self._queries(len(self.data.queries)))

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

    def with_wrong_labels(self) -> list[PromptSet]:
        """Return Normal's prompts for each of `ERROR_RATES`, that share of the labels replaced by the next class.

        The number of wrong labels is rounded down. As in StaICC one generator draws them for all rates in turn.
        """
        pool, generator = self.data.demonstrations, StaICCRandom()
        classes = len(self.data.task.labels)

        def shown(drawn: Sequence[int], rate: float) -> list[Example]:
            wrong = set(generator.sample(drawn, int(self.k * rate)))
            return [
                replace(pool[index], label=(pool[index].label + 1) % classes) if index in wrong else pool[index]
                for index in drawn
            ]

        def prompts(rate: float) -> Iterator[tuple[list[Example], Example]]:
            for number, query, drawn in self._normal_draws():
                demonstrations = shown(drawn, rate)  # of those over the limit too: the generator moves on
                if self._within_limit(number):
                    yield demonstrations, query

        return [self.builder.build_set(prompts(rate)) for rate in ERROR_RATES]

    def unseen(self) -> PromptSet:
        """Return every query twice, with demonstrations of other classes only.

        As in StaICC's out-of-domain mode: a draw of Normal that shows the gold label is replaced, in turn, by the
        generator's next draw without it. Where fewer than `RAREST_DRAW` of all draws are without it (two classes and
        many demonstrations), they are drawn from the other classes directly.

        Raises:
            ValueError: fewer than k demonstrations of other classes.
        """
        pool, generator = self.data.demonstrations, StaICCRandom()
        others = {
            label: [example for example in pool if example.label != label]
            for label in range(len(self.data.task.labels))
        }
        if (fewest := min(map(len, others.values()))) < self.k:
            raise ValueError(f"k={self.k}, but only {fewest} demonstrations of other classes; lower k")
        direct = math.comb(fewest, self.k) < RAREST_DRAW * math.comb(len(pool), self.k)
        draws = [(number, query, generator.sample(pool, self.k)) for number, query, _ in self._normal_draws()]

        def without(label: int, drawn: list[Example]) -> list[Example]:
            while any(example.label == label for example in drawn):
                drawn = generator.sample(others[label] if direct else pool, self.k)
            return drawn

        replaced = [(number, query, without(query.label, drawn)) for number, query, drawn in draws]
        return self.builder.build_set((drawn, query) for number, query, drawn in replaced if self._within_limit(number))

    def empty_queries(self) -> PromptSet:
        """Return Normal's demonstrations, each with an empty query (StaICC's contextual bias)."""
        return self._with_queries(lambda: "")

    def random_word_queries(self) -> PromptSet:
        """Return Normal's demonstrations, each with 128 words drawn from the demonstrations' texts (domain bias).

        StaICC's draws never reach the last text, nor the last word of a text.
        """
        pool, words = self.data.demonstrations, StaICCRandom()

        def text() -> str:
            chosen = []
            for _ in range(DOMAIN_WORDS):
                of_text = pool[words.between(0, len(pool) - 1)].text.split(" ")
                chosen.append(of_text[words.between(0, len(of_text) - 1)])
            return " ".join(chosen)

        return self._with_queries(text)

    def _with_queries(self, text: Callable[[], str]) -> PromptSet:
        pool = self.data.demonstrations
        queries = [(number, Example(text(), 0), drawn) for number, _, drawn in self._normal_draws()]
        return self.builder.build_set(
            ([pool[index] for index in drawn], query) for number, query, drawn in queries if self._within_limit(number)
        )

    def calibration_prompts(self) -> PromptSet:
        """Return 512 empty queries with demonstrations from the training split, drawn with repetition as in StaICC."""
        generator, pool = StaICCRandom(), self.data.train
        return self.builder.build_set(
            ([pool[generator.between(0, len(pool))] for _ in range(self.k)], Example("", 0))
            for _ in range(CALIBRATION_PROMPTS)
        )

    # --- results --------------------------------------------------------------------------------------------

    def run(
        self, model: Any, tests: Sequence[str], *, batch_size: int = 32, progress: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Return a model's results, plain data by test.

        Beside Normal and Unseen stands the attention of the heads on their prompts, as `heads` and `unseen_heads`. Of
        Unseen all mass on labels is on wrong ones.

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
        if {"Normal", CALIBRATION} & set(tests):
            normal, heads = self._with_heads(model, self.normal, shared)
            if "Normal" in tests:
                results |= {"Normal": self._normal_results(normal), **({"heads": heads} if heads else {})}
            if CALIBRATION in tests:
                prior = evaluate(model, self.calibration_prompts(), **shared).probabilities.mean(dim=0)
                calibrated = calibrate(normal.probabilities, prior)
                results[CALIBRATION] = _plain(Evaluation.from_probabilities(calibrated, normal.labels))
        makers: dict[str, Callable[[Any, dict[str, Any]], dict[str, dict[str, Any]]]] = {
            "TempSensitivity": self._template_results,
            "DemoSensitivity": self._demonstration_results,
            "GLER": self._gler_results,
            "Bias": self._bias_results,
            "Unseen": self._unseen_results,
            "ZeroShot": self._zero_shot_results,
        }
        for test, make in makers.items():
            if test in tests:
                results |= make(model, shared)
        return results

    def _normal_results(self, normal: Evaluation) -> dict[str, Any]:
        found = {**_plain(normal), "posterior_bias": posterior_bias(normal.probabilities, normal.labels)}
        return {**found, "staicc": staicc_metrics(normal)} if self.staicc_compat else found

    def _with_heads(
        self, model: Any, prompts: PromptSet, shared: dict[str, Any]
    ) -> tuple[Evaluation, dict[str, Any] | None]:
        """Evaluate the prompts, and read the heads on the first ones of them if there are demonstrations."""
        if not self.k or self.staicc_compat:
            return evaluate(model, prompts, **shared), None
        first, heads = evaluate_with_heads(model, prompts[:HEAD_PROMPTS], **shared)
        if len(prompts) <= HEAD_PROMPTS:
            return first, heads.to_dict()
        rest = evaluate(model, prompts[HEAD_PROMPTS:], **shared)
        return Evaluation.from_probabilities(
            torch.cat([first.probabilities, rest.probabilities]), torch.cat([first.labels, rest.labels])
        ), heads.to_dict()

    def _template_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"TempSensitivity": _sensitivity([evaluate(model, prompts, **shared) for prompts in self.templates()])}

    def _demonstration_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        whole = evaluate(model, self.demonstration_draws(), **shared)
        queries = whole.n // DEMONSTRATION_DRAWS
        parts = zip(whole.probabilities.split(queries), whole.labels.split(queries), strict=True)
        return {"DemoSensitivity": _sensitivity([Evaluation.from_probabilities(p, y) for p, y in parts])}

    def _gler_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        accuracies = [evaluate(model, prompts, **shared).accuracy for prompts in self.with_wrong_labels()]
        shares = [1 - int(self.k * rate) / max(self.k, 1) for rate in ERROR_RATES]
        slope = gler(shares, accuracies) if len(set(shares)) > 1 else None
        return {"GLER": {"gler": slope, "correct_label_shares": shares, "accuracy": accuracies}}

    def _bias_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        empty, words = (
            evaluate(model, prompts, **shared) for prompts in (self.empty_queries(), self.random_word_queries())
        )
        return {
            "Bias": {
                "contextual": distribution_bias(empty.probabilities),
                "domain": distribution_bias(words.probabilities),
            }
        }

    def _unseen_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        found, heads = self._with_heads(model, self.unseen(), shared)
        return {"Unseen": _plain(found), **({"unseen_heads": heads} if heads else {})}

    def _zero_shot_results(self, model: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"ZeroShot": {**_plain(evaluate(model, self.zero_shot(), **shared)), "draws": 1}}


def correct_by_query(result: Mapping[str, Any]) -> np.ndarray:
    """Return how often each query was answered correctly, `(Q,)` in 0 … 1, over the draws of its demonstrations.

    Models are compared by queries, because two prompts with the same query are not independent.
    """
    correct = np.equal(result["predictions"], result["labels"])
    return correct.reshape(result.get("draws", NORMAL_DRAWS), -1).mean(axis=0)


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
