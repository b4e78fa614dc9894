"""The choice of demonstrations and learning rate by validation accuracy, as in arXiv 2212.10559."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from abft.analysis.fine_tuning import Diverged, Form, fine_tune
from abft.evaluation.classification import Evaluation, evaluate
from abft.prompts.builder import PromptBuilder
from abft.prompts.examples import Example

__all__ = ["Choice", "choose_demonstrations", "choose_rate", "fitting"]


@dataclass(frozen=True)
class Choice:
    """A value that was chosen, and the validation accuracy of each.

    Args:
        value: the best one.
        accuracy: by value, empty if there was no choice; None where fine-tuning diverged.
    """

    value: float
    accuracy: Mapping[float, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        tried = [{"value": value, "accuracy": accuracy} for value, accuracy in self.accuracy.items()]
        return {"value": self.value, "tried": tried}


def fitting(builder: PromptBuilder, demonstrations: Sequence[Example], queries: Sequence[Example]) -> list[Example]:
    """Return as many of the demonstrations, from the first, as fit into the context with every query.

    Raises:
        ValueError: not even one fits.
    """
    longest = max(queries, key=lambda query: builder.build([], query).length)
    for count in range(len(demonstrations), 0, -1):
        kept = list(demonstrations[:count])
        try:
            builder.build(kept, longest)
        except ValueError:
            continue
        return kept
    raise ValueError(f"no demonstration fits into {builder.max_length} tokens with the longest query; drop long texts")


def choose_demonstrations(
    model: PreTrainedModel,
    builder: PromptBuilder,
    pool: Sequence[Example],
    validation: Sequence[Example],
    *,
    count: int,
    seeds: Sequence[int],
    queries: Sequence[Example] = (),
    progress: bool = True,
) -> tuple[list[Example], Choice]:
    """Choose the seed whose draw of demonstrations gives ICL the best validation accuracy.

    Args:
        model: causal language model.
        builder: of the prompts.
        pool: to draw from, without replacement.
        validation: examples that are neither tested nor shown; with a single seed they are not used.
        count: demonstrations; fewer where the model's context holds fewer.
        seeds: to try; ties go to the larger mean likelihood of the gold label, then to the first.
        queries: further examples that the prompts must have room for.
        progress: show progress bars.

    Raises:
        ValueError: no seeds, a pool that is too small, or demonstrations that do not fit.
    """
    if not seeds or not 1 <= count <= len(pool):
        raise ValueError(f"one seed or more and 1 to {len(pool)} demonstrations are needed, got {seeds} and {count}")
    draws = {
        seed: fitting(builder, random.Random(seed).sample(list(pool), count), [*validation, *queries]) for seed in seeds
    }
    if len(draws) == 1:
        return draws[seeds[0]], Choice(seeds[0], {})
    found: dict[float, Evaluation | None] = {
        seed: evaluate(model, builder.build_set((drawn, query) for query in validation), progress=progress)
        for seed, drawn in draws.items()
    }
    choice = _best(found)
    return draws[int(choice.value)], choice


def choose_rate(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    validation: Sequence[Example],
    *,
    rates: Sequence[float],
    form: Form,
    epochs: int = 1,
    progress: bool = True,
) -> Choice:
    """Choose the learning rate after which the fine-tuned model has the best zero-shot accuracy in validation.

    Args:
        model, builder, demonstrations, validation: as for :func:`choose_demonstrations`.
        rates: to try; with a single one nothing is trained.
        form, epochs: as for :func:`fine_tune`.
        progress: show progress bars.

    Raises:
        ValueError: no rates, one out of range, no validation examples, or every rate diverges.
    """
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning rates must be finite and over 0, one or more, got {list(rates)}")
    if len(rates) == 1:
        return Choice(rates[0], {})
    if not validation:
        raise ValueError("no validation examples to choose a learning rate on; pass at least one")
    prompts = builder.build_set(([], query) for query in validation)
    found: dict[float, Evaluation | None] = {}
    for rate in rates:
        found[rate] = None
        with suppress(Diverged):
            tuned, _, _ = fine_tune(
                model, builder, demonstrations, form=form, learning_rate=rate, epochs=epochs, progress=progress
            )
            # Of its errors only logits that are not finite depend on the rate.
            with suppress(ValueError):
                found[rate] = evaluate(tuned, prompts, progress=progress)
    return _best(found)


def _best(found: Mapping[float, Evaluation | None]) -> Choice:
    """Return the value of the best accuracy; ties go to the likelihood, then to the first.

    Raises:
        ValueError: none was evaluated.
    """
    known = {value: result for value, result in found.items() if result is not None}
    if not known:
        raise ValueError(f"fine-tuning diverges at every learning rate of {list(found)}; give lower ones")
    best = max(known, key=lambda value: (known[value].accuracy, known[value].true_label_likelihood))
    return Choice(best, {value: None if x is None else x.accuracy for value, x in found.items()})
