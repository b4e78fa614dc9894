"""Accuracy with momentum attention (Dai et al., arXiv 2212.10559, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from abft.analysis.observing import check_all_seen
from abft.evaluation.classification import evaluate
from abft.models.momentum import check_momentum
from abft.prompts.builder import PromptSet

__all__ = ["MomentumGain", "momentum_gain"]


@dataclass(frozen=True)
class MomentumGain:
    """Accuracy with plain and with momentum attention.

    Args:
        n: number of prompts.
        plain: accuracy of the model as it is.
        accuracy: by η.
    """

    n: int
    plain: float
    accuracy: Mapping[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON; `gains` lists η, accuracy and its difference to plain attention."""
        gains = [{"eta": eta, "accuracy": a, "gain": a - self.plain} for eta, a in self.accuracy.items()]
        return {"n": self.n, "plain": self.plain, "gains": gains}


def momentum_gain(
    model: PreTrainedModel,
    prompts: PromptSet,
    etas: Sequence[float],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> MomentumGain:
    """Measure accuracy with plain attention, and with momentum attention for each η.

    The model is used as it is; the paper instead trains its models with momentum attention from the start.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        prompts: at least one.
        etas: each between 0 and 1.
        batch_size: prompts per forward pass.
        progress: show progress bars.

    Raises:
        ValueError: no η or one out of range, or as :func:`abft.evaluate`.
        NotImplementedError: as there, or a layer's attention does not come through transformers' attention interface.
    """
    if not len(etas):
        raise ValueError("no etas to try; pass one or more numbers between 0 and 1")
    for eta in etas:
        check_momentum(eta)
    seen: set[nn.Module] = set()
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    plain = evaluate(model, prompts, **shared, attention_probe=lambda module, *_: seen.add(module)).accuracy
    check_all_seen(model, len(seen))
    accuracy = {eta: evaluate(model, prompts, **shared, momentum=eta).accuracy for eta in etas}
    return MomentumGain(len(prompts), plain, accuracy)
