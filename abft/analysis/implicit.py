"""In-context learning (ICL) as implicit fine-tuning: Dai et al., arXiv 2212.10559, sections 4 and 5.

Does a model that reads demonstrations behave like the same model fine-tuned on them? Fine-tuning is restricted to what
attention to demonstrations can express: W_K and W_V alone, plain SGD, the demonstrations in their order, each a
zero-shot prompt. Predictions are compared (Rec2FTP), updates of attention outputs (SimAOU) and attention scores
(SimAM). The control of Rec2FTP is the share that ICL recovers of all that zero-shot gets wrong; the control of the
similarities is the model with a random update of W_K and W_V of the same norm, matrix by matrix (the paper draws random
outputs instead).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft.analysis.fine_tuning import fine_tune
from abft.analysis.observing import Observation, common_ending, observe
from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.models.attention import is_enabled
from abft.prompts.builder import PromptBuilder
from abft.prompts.collation import Collator, padding_id
from abft.prompts.examples import Example

__all__ = ["ImplicitFineTuning", "compare_with_fine_tuning"]


@dataclass(frozen=True, eq=False)
class ImplicitFineTuning:
    """The likeness of ICL and fine-tuning on the same demonstrations, over n queries and L layers.

    Args:
        n: queries.
        accuracy: by setting: "zero-shot", "icl", "fine-tuned", "random update".
        recovered: queries that fine-tuning gets right and zero-shot wrong.
        rec2ftp: of these, the share that ICL also gets right; None if there are none.
        rec2ftp_control: of all queries that zero-shot gets wrong, the share that ICL gets right, which Rec2FTP would
            be if ICL had nothing to do with fine-tuning; None if there are none.
        sim_aou: `(L,)` float32, cosine of (h_ICL − h_ZSL) and (h_FT − h_ZSL), the attention layer's output at the last
            token, normalised to length 1 in each setting; mean over queries. 0 for a query whose output did not move.
        sim_aou_random: `(L,)`, the same with the random update in place of fine-tuning.
        sim_am_before: `(L,)`, cosine of the scores before the softmax, of the last token over the query's own tokens,
            ICL and zero-shot; mean over heads and queries. A soft cap of the scores is left out.
        sim_am: `(L,)`, the same of ICL and fine-tuned.
        sim_am_random: `(L,)`, the same of ICL and the random update.
        losses: loss of each step of fine-tuning, before the step, nats.
    """

    n: int
    accuracy: Mapping[str, float]
    recovered: int
    rec2ftp: float | None
    rec2ftp_control: float | None
    sim_aou: Tensor
    sim_aou_random: Tensor
    sim_am_before: Tensor
    sim_am: Tensor
    sim_am_random: Tensor
    losses: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for JSON; values per layer also as their mean over layers, `…_mean`."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        layers = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {
            **plain,
            "accuracy": dict(self.accuracy),
            "losses": list(self.losses),
            **{name: value.tolist() for name, value in layers.items()},
            **{f"{name}_mean": value.mean().item() for name, value in layers.items()},
        }


@torch.no_grad()
def compare_with_fine_tuning(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    learning_rate: float = 0.01,
    epochs: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> ImplicitFineTuning:
    """Compute Rec2FTP, SimAOU and SimAM of ICL on a fixed list of demonstrations, against fine-tuning on the same.

    Scores are those of the last token over the query's own tokens, which are the tokens that the zero-shot and the ICL
    prompt end with alike: at least the label prefix, at most the whole zero-shot prompt. No N × N tensor exists.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`); it is not changed, and a copy of it is made.
        builder: of the prompts.
        demonstrations: in the order of the prompt; at least one.
        queries: at least one.
        learning_rate, epochs: as for :func:`fine_tune`.
        batch_size: prompts per forward pass.
        seed: of the random update.
        progress: show progress bars.

    Raises:
        ValueError: no queries, a model on another attention, logits that are not finite, or as :func:`fine_tune`.
        NotImplementedError: as there, as :func:`abft.evaluation.classification.label_logits`, or a layer's
            attention does not come through transformers' attention interface.
    """
    if not is_enabled(model):
        raise ValueError("the model runs on another attention than 'abft'; call abft.enable(model) first")
    shown = [builder.build(demonstrations, query) for query in queries]
    alone = [builder.build([], query) for query in queries]
    if not shown:
        raise ValueError("no queries to compare on; pass at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    tuned, update, losses = fine_tune(
        model, builder, demonstrations, learning_rate=learning_rate, epochs=epochs, progress=progress
    )
    random_update = update.random_like(torch.Generator().manual_seed(seed))
    collate = Collator(padding_id(builder.tokenizer))
    totals = _Totals()
    with evaluation_mode(model):
        for indices, icl_batch in length_sorted_batches(shown, collate, batch_size, "Comparing", progress):
            own = torch.tensor([common_ending(shown[i], alone[i]) for i in indices])
            zero_shot_batch = collate([alone[i] for i in indices])
            icl = observe(model, icl_batch, builder, own)
            zero_shot = observe(model, zero_shot_batch, builder, own)
            update.write()
            fine_tuned = observe(tuned, zero_shot_batch, builder, own)
            random_update.write()
            randomly = observe(tuned, zero_shot_batch, builder, own)
            totals.add(icl_batch["labels"], icl, zero_shot, fine_tuned, randomly)
    return totals.result(len(queries), losses)


@dataclass
class _Totals:
    """Sums over queries, from which :meth:`result` takes the means."""

    correct: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    icl_of_wrong: int = 0
    recovered: int = 0
    icl_of_recovered: int = 0
    layers: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, labels: Tensor, icl: Observation, zero_shot: Observation, fine_tuned: Observation, randomly: Observation
    ) -> None:
        settings = {"zero-shot": zero_shot, "icl": icl, "fine-tuned": fine_tuned, "random update": randomly}
        right = {name: observed.predictions == labels for name, observed in settings.items()}
        for name, hits in right.items():
            self.correct[name] = self.correct.get(name, 0) + int(hits.sum())
        wrong = ~right["zero-shot"]
        recovered = right["fine-tuned"] & wrong
        self.wrong += int(wrong.sum())
        self.icl_of_wrong += int((wrong & right["icl"]).sum())
        self.recovered += int(recovered.sum())
        self.icl_of_recovered += int((recovered & right["icl"]).sum())
        sums = {
            "sim_aou": _update_similarity(icl, fine_tuned, zero_shot),
            "sim_aou_random": _update_similarity(icl, randomly, zero_shot),
            "sim_am_before": _score_similarity(icl, zero_shot),
            "sim_am": _score_similarity(icl, fine_tuned),
            "sim_am_random": _score_similarity(icl, randomly),
        }
        for name, value in sums.items():
            self.layers[name] = self.layers.get(name, torch.zeros(())) + value.sum(1)

    def result(self, n: int, losses: tuple[float, ...]) -> ImplicitFineTuning:
        return ImplicitFineTuning(
            n=n,
            accuracy={name: hits / n for name, hits in self.correct.items()},
            recovered=self.recovered,
            rec2ftp=self.icl_of_recovered / self.recovered if self.recovered else None,
            rec2ftp_control=self.icl_of_wrong / self.wrong if self.wrong else None,
            losses=losses,
            **{name: value / n for name, value in self.layers.items()},
        )


def _update_similarity(a: Observation, b: Observation, origin: Observation) -> Tensor:
    """Return the cosine of the changes of attention outputs from `origin` to `a` and to `b`, `(L, B)`."""
    return torch.cosine_similarity(a.outputs - origin.outputs, b.outputs - origin.outputs, dim=-1, eps=1e-12)


def _score_similarity(a: Observation, b: Observation) -> Tensor:
    """Return the cosine of the scores, mean over heads, `(L, B)`."""
    return torch.cosine_similarity(a.scores, b.scores, dim=-1, eps=1e-12).mean(-1)
