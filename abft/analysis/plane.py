"""Accuracy over the plane that two trained models span with the untrained one (arXiv 2505.14233, Eq. 2 and Fig. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from rich.progress import track
from transformers import PreTrainedModel

from abft.evaluation.classification import evaluate
from abft.prompts.builder import PromptSet

__all__ = ["measure_plane"]


def measure_plane(
    model: PreTrainedModel | PeftModel,
    at: Callable[[float, float], AbstractContextManager[None]],
    prompts: PromptSet,
    *,
    factors: Sequence[float],
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure accuracy and mean log-likelihood over the plane θ₀ + λ₁(θ₁ − θ₀) + λ₂(θ₂ − θ₀).

    Args:
        model: the model whose weights `at` sets.
        at: takes λ₁ and λ₂; inside its block the model has the weights of that point.
        prompts: the prompts to classify.
        factors: F values that λ₁ and λ₂ take.
        batch_size: prompts per forward pass.
        progress: show a progress bar over the F² points, and eleven more.

    Returns:
        Plain data: `factors`; `accuracy` and `loss` (mean −ln of the gold label's probability among the label words), F
        lists of F numbers, λ₁ by row; and `line`, the same along θ₁ … θ₂ at eleven equal steps.
    """
    grid = [(a, b) for a in factors for b in factors]
    steps = [step / 10 for step in range(11)]
    points = [*grid, *((1 - step, step) for step in steps)]
    found = []
    for point in track(points, description="Mode connectivity", disable=not progress):
        with at(*point):
            result = evaluate(model, prompts, batch_size=batch_size, progress=False)
        gold = result.probabilities.double().gather(1, result.labels[:, None])
        found.append((result.accuracy, -gold.clamp(min=1e-12).log().mean().item()))
    size = len(factors)
    rows = [found[start : start + size] for start in range(0, len(grid), size)]
    line = found[len(grid) :]
    return {
        "factors": list(factors),
        "accuracy": [[accuracy for accuracy, _ in row] for row in rows],
        "loss": [[loss for _, loss in row] for row in rows],
        "line": {"step": steps, "accuracy": [a for a, _ in line], "loss": [loss for _, loss in line]},
    }
