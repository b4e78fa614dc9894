"""Momentum attention trained from scratch, beside plain attention (Dai et al., arXiv 2212.10559, section 5).

    python -m bench.cases.momentum_training [--seeds 0 1 2] [--etas 0 0.1]

Each model is made by the demo's recipe (`bench.recipe`); those of one seed start from the same weights, meet the same
data, and differ in their attention alone. Measured are the perplexity of texts and of labels in prompts that no model
was trained on, and in-context accuracy on the demo's tasks. The file keeps every model that has been measured: the
same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from abft.demo import corpus
from abft.evaluation.classification import evaluate
from abft.files import write_json
from abft.models.attention import enable
from abft.prompts.builder import PromptBuilder, sample_prompts
from bench.recipe import IGNORE, Recipe, build_tokenizer, few_shot_batch, next_token_losses, pretrain
from bench.record import provenance

RESULT = Path(__file__).parents[1] / "results" / "momentum_training.json"
# Seeds of the recipe are small numbers.
HELD_OUT = 10**6


def perplexities(model: Any, recipe: Recipe, tokenizer: Any, batches: int) -> dict[str, float]:
    """Return exp of the mean loss of text tokens and of labels that an earlier demonstration shows, held out."""
    rng = random.Random(HELD_OUT)
    sums, counts = dict.fromkeys(("text", "labels"), 0.0), dict.fromkeys(("text", "labels"), 0)
    with torch.inference_mode():
        for _ in range(batches):
            ids, targets, is_label = few_shot_batch(rng, recipe, tokenizer)
            losses = next_token_losses(model, recipe, ids, targets).double()
            labels = is_label[:, 1:]
            for name, chosen in (("labels", labels), ("text", (targets[:, 1:] != IGNORE) & ~labels)):
                sums[name] += losses[chosen].sum().item()
                counts[name] += int(chosen.sum())
    return {name: math.exp(sums[name] / counts[name]) for name in sums}


def measure(recipe: Recipe, *, batches: int = 64, queries: int = 512, progress: bool = True) -> dict[str, Any]:
    """Train a model by the recipe; return its seed, η, perplexities and accuracy by task."""
    tokenizer = build_tokenizer(recipe.context)
    model = enable(pretrain(recipe, tokenizer, progress=progress))
    accuracy = {}
    for task in corpus.DEMO_TASKS:
        splits = corpus.demo_splits(task=task, test=queries)
        prompts = sample_prompts(
            PromptBuilder(tokenizer, task), splits.test, splits.demonstrations, corpus.DEMO_K, seed=0
        )
        accuracy[task.name] = evaluate(model, prompts, progress=False, **recipe.attention).accuracy
    return {
        "seed": recipe.seed,
        "eta": recipe.momentum,
        "perplexity": perplexities(model, recipe, tokenizer, batches),
        "accuracy": accuracy,
    }


def collect(
    path: Path,
    seeds: Sequence[int],
    etas: Sequence[float],
    measured: Callable[[Recipe], dict[str, Any]] = measure,
) -> dict[str, Any]:
    """Measure what the file lacks, write it after each model, and return its content.

    Raises:
        ValueError: η is not 0 or between 0 and 1.
    """
    recipes = [Recipe(seed=seed, momentum=eta) for seed in seeds for eta in etas]
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    for recipe in recipes:
        if any((row["seed"], row["eta"]) == (recipe.seed, recipe.momentum) for row in content["rows"]):
            continue
        content["rows"].append(measured(recipe))
        content = {"provenance": provenance(("torch", "transformers")), "rows": content["rows"]}
        write_json(path, content)
    return content


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cases.momentum_training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 0.1], help="0 is plain attention")
    options = parser.parse_args(arguments)
    try:
        content = collect(RESULT, options.seeds, options.etas)
    except ValueError as error:
        parser.error(str(error))
    for row in content["rows"]:
        accuracy = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["accuracy"].items())
        ppl = ", ".join(f"{name} {value:.3f}" for name, value in row["perplexity"].items())
        print(f"seed {row['seed']}, η = {row['eta']:g}: perplexity of {ppl}; {accuracy}")


if __name__ == "__main__":
    main()
