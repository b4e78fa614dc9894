"""In-context learning (ICL) as implicit fine-tuning: Dai et al., arXiv 2212.10559, sections 4 and 5.

Does a model that reads demonstrations behave like the same model fine-tuned on them? Fine-tuning is restricted to what
attention to demonstrations can express: keys and values alone, plain SGD, the demonstrations in their order, each by
itself. Predictions are compared (Rec2FTP), updates of attention outputs (SimAOU), attention scores (SimAM), and the
order of the attention to the demonstrations' tokens (Kendall's τ, recall of the top ones). Controls: for Rec2FTP the
share that ICL recovers of all that zero-shot gets wrong; for the similarities a random update of keys and values of the
same norm, matrix by matrix (the paper draws random outputs instead); for τ random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft.analysis.fine_tuning import Form, demonstration_ids, fine_tune
from abft.analysis.observing import Observation, common_ending, observe
from abft.analysis.query_vectors import QueryVectors
from abft.analysis.ranks import RankAgreement, agreement, top_count
from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.models.attention import is_enabled
from abft.prompts.builder import Prompt, PromptBuilder
from abft.prompts.collation import Collator, padding_id
from abft.prompts.examples import Example

__all__ = ["ImplicitFineTuning", "compare_forms", "compare_with_fine_tuning"]


@dataclass(frozen=True, eq=False)
class ImplicitFineTuning:
    """The likeness of ICL and fine-tuning on the same demonstrations, over n queries and L layers.

    Args:
        n: queries.
        demonstrations: in the prompt.
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
        kendall_token, kendall_example: `(L,)`, Kendall's τ of ICL's and fine-tuning's attention to the demonstrations'
            tokens, or to whole demonstrations (see `abft.analysis.ranks`); mean over queries.
        kendall_random_token, kendall_random_example: `(L,)`, of ICL's attention and random numbers.
        recall_token, recall_example: `(L,)`, share of the 100 tokens, or five demonstrations, that ICL attends to most
            which are among those of fine-tuning; of fewer where there are fewer than twice as many.
        chance: by "token" and "example", the recall of a random choice.
    """

    n: int
    demonstrations: int
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
    kendall_token: Tensor
    kendall_random_token: Tensor
    recall_token: Tensor
    kendall_example: Tensor
    kendall_random_example: Tensor
    recall_example: Tensor
    chance: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for JSON; values per layer also as their mean over layers, `…_mean`."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        layers = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {
            **plain,
            "accuracy": dict(self.accuracy),
            "chance": dict(self.chance),
            "losses": list(self.losses),
            **{name: value.tolist() for name, value in layers.items()},
            **{f"{name}_mean": value.mean().item() for name, value in layers.items()},
        }


def compare_with_fine_tuning(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    *,
    form: Form = "label",
    learning_rate: float = 0.01,
    **options: Any,
) -> ImplicitFineTuning:
    """Compare ICL on a fixed list of demonstrations with one form of fine-tuning on the same: :func:`compare_forms`.

    Args:
        model, builder, demonstrations, queries, options: as there.
        form, learning_rate: as for :func:`fine_tune`.

    Raises:
        ValueError, NotImplementedError: as there.
    """
    return compare_forms(model, builder, demonstrations, queries, {form: learning_rate}, **options)[form]


@torch.no_grad()
def compare_forms(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    queries: Sequence[Example],
    rates: Mapping[Form, float],
    *,
    epochs: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    random_draws: int = 3,
    progress: bool = True,
) -> dict[Form, ImplicitFineTuning]:
    """Compute Rec2FTP, SimAOU, SimAM, Kendall's τ and recall of ICL against forms of fine-tuning on its demonstrations.

    Scores are those of the last token over the query's own tokens, which are the tokens that the zero-shot and the ICL
    prompt end with alike: at least the label prefix, at most the whole zero-shot prompt. A demonstration's tokens are
    those that its place in the ICL prompt and the demonstration alone end with alike. No N × N tensor exists.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`); it is not changed, and a copy of it is made by form.
        builder: of the prompts.
        demonstrations: in the order of the prompt; at least one.
        queries: at least one.
        rates: form of fine-tuning → learning rate, as for :func:`fine_tune`.
        epochs: as there.
        batch_size: prompts per forward pass.
        seed: of the random updates and the random orders.
        random_draws: random updates, and random orders, over which the controls are averaged; each update costs a
            zero-shot pass.
        progress: show progress bars.

    Raises:
        ValueError: no queries, a number out of range, a model on another attention, logits that are not finite, or as
            :func:`fine_tune`.
        NotImplementedError: as there, as :func:`abft.evaluation.classification.label_logits`, or a layer's
            attention does not come through transformers' attention interface.
    """
    if not is_enabled(model):
        raise ValueError("the model runs on another attention than 'abft'; call abft.enable(model) first")
    shown = [builder.build(demonstrations, query) for query in queries]
    alone = [builder.build([], query) for query in queries]
    if not shown:
        raise ValueError("no queries to compare on; pass at least one")
    if batch_size < 1 or random_draws < 1:
        raise ValueError(f"batch_size and random_draws must be 1 or more, got {batch_size} and {random_draws}")
    spans = _spans(builder, demonstrations, shown[0])
    tuned = {
        form: _Tuned(model, builder, demonstrations, spans, form, rate, epochs, (seed, random_draws), progress)
        for form, rate in rates.items()
    }
    context = torch.cat([torch.arange(end - size, end) for end, size in spans])
    collate = Collator(padding_id(builder.tokenizer))
    totals = {form: _Totals() for form in rates}
    generator = np.random.default_rng(seed)
    with evaluation_mode(model):
        for indices, icl_batch in length_sorted_batches(shown, collate, batch_size, "Comparing", progress):
            own = torch.tensor([common_ending(shown[i].input_ids, alone[i].input_ids) for i in indices])
            batch = collate([alone[i] for i in indices])
            icl = observe(model, icl_batch, builder, own, context=context)
            zero_shot = observe(model, batch, builder, own)
            for form, trained in tuned.items():
                fine_tuned, randomly = trained.observe(batch, builder, own)
                assert icl.context is not None
                ranks = agreement(
                    icl.context, trained.attention(fine_tuned), [size for _, size in spans], generator, random_draws
                )
                totals[form].add(icl_batch["labels"], icl, zero_shot, fine_tuned, randomly, ranks)
    counts = {"token": len(context), "example": len(spans)}
    return {form: totals[form].result(len(queries), tuned[form].losses, counts) for form in rates}


def _spans(builder: PromptBuilder, demonstrations: Sequence[Example], prompt: Prompt) -> list[tuple[int, int]]:
    """Return for each demonstration where it ends in the prompt, and how many of its tokens stand there as alone."""
    special = set(builder.tokenizer.all_special_ids)
    found = []
    for position, demonstration in zip(prompt.label_positions, demonstrations, strict=True):
        alone = demonstration_ids(builder, demonstration)
        leading = next(i for i, token in enumerate(alone) if token not in special)
        end = position + len(builder.label_ids[demonstration.label])
        found.append((end, common_ending(prompt.input_ids[:end], alone[leading:])))
    return found


class _Tuned:
    """A fine-tuned copy of the model, its random controls, and the query vectors of the demonstrations' tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        builder: PromptBuilder,
        demonstrations: Sequence[Example],
        spans: Sequence[tuple[int, int]],
        form: Form,
        rate: float,
        epochs: int,
        random: tuple[int, int],
        progress: bool,
    ) -> None:
        steps: list[Tensor] = []
        self.model, self.update, self.losses = fine_tune(
            model,
            builder,
            demonstrations,
            form=form,
            learning_rate=rate,
            epochs=epochs,
            on_queries=steps.append,
            progress=progress,
        )
        kept = zip(steps[-len(spans) :], spans, strict=True)  # of the last epoch
        self.vectors = torch.cat([step[:, step.shape[1] - size :].cpu() for step, (_, size) in kept], dim=1)
        seed, draws = random
        generator = torch.Generator().manual_seed(seed)
        self.controls = [self.update.random_like(generator) for _ in range(draws)]
        self.queries = QueryVectors(self.model)

    def observe(
        self, batch: dict[str, Tensor], builder: PromptBuilder, own: Tensor
    ) -> tuple[Observation, list[Observation]]:
        """Return what the fine-tuned model does on zero-shot prompts, and what each random control does."""
        self.update.write()
        fine_tuned = observe(self.model, batch, builder, own, queries=self.queries)
        randomly = []
        for control in self.controls:
            control.write()
            randomly.append(observe(self.model, batch, builder, own))
        return fine_tuned, randomly

    def attention(self, observed: Observation) -> Tensor:
        """Return the scores of the last tokens on the demonstrations' tokens, `(L, B, T)`."""
        assert observed.queries is not None
        return observed.queries @ self.vectors.transpose(1, 2)


@dataclass
class _Totals:
    """Sums over queries, from which :meth:`result` takes the means."""

    correct: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    icl_of_wrong: int = 0
    recovered: int = 0
    icl_of_recovered: int = 0
    layers: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        labels: Tensor,
        icl: Observation,
        zero_shot: Observation,
        fine_tuned: Observation,
        randomly: Sequence[Observation],
        ranks: Mapping[str, RankAgreement],
    ) -> None:
        right = {
            name: observed.predictions == labels
            for name, observed in {"zero-shot": zero_shot, "icl": icl, "fine-tuned": fine_tuned}.items()
        }
        hits = {**right, "random update": torch.stack([x.predictions == labels for x in randomly]).float().mean(0)}
        for name, values in hits.items():
            self.correct[name] = self.correct.get(name, 0.0) + float(values.sum())
        wrong = ~right["zero-shot"]
        recovered = right["fine-tuned"] & wrong
        self.wrong += int(wrong.sum())
        self.icl_of_wrong += int((wrong & right["icl"]).sum())
        self.recovered += int(recovered.sum())
        self.icl_of_recovered += int((recovered & right["icl"]).sum())
        sums = {
            "sim_aou": _update_similarity(icl, fine_tuned, zero_shot),
            "sim_aou_random": torch.stack([_update_similarity(icl, x, zero_shot) for x in randomly]).mean(0),
            "sim_am_before": _score_similarity(icl, zero_shot),
            "sim_am": _score_similarity(icl, fine_tuned),
            "sim_am_random": torch.stack([_score_similarity(icl, x) for x in randomly]).mean(0),
            **{f"{name}_{level}": value for level, found in ranks.items() for name, value in vars(found).items()},
        }
        for name, value in sums.items():
            self.layers[name] = self.layers.get(name, torch.zeros(())) + value.sum(1)

    def result(self, n: int, losses: tuple[float, ...], counts: Mapping[str, int]) -> ImplicitFineTuning:
        return ImplicitFineTuning(
            n=n,
            demonstrations=counts["example"],
            accuracy={name: hits / n for name, hits in self.correct.items()},
            recovered=self.recovered,
            rec2ftp=self.icl_of_recovered / self.recovered if self.recovered else None,
            rec2ftp_control=self.icl_of_wrong / self.wrong if self.wrong else None,
            losses=losses,
            chance={level: top_count(level, count) / count for level, count in counts.items()},
            **{name: value / n for name, value in self.layers.items()},
        )


def _update_similarity(a: Observation, b: Observation, origin: Observation) -> Tensor:
    """Return the cosine of the changes of attention outputs from `origin` to `a` and to `b`, `(L, B)`."""
    return torch.cosine_similarity(a.outputs - origin.outputs, b.outputs - origin.outputs, dim=-1, eps=1e-12)


def _score_similarity(a: Observation, b: Observation) -> Tensor:
    """Return the cosine of the scores, mean over heads, `(L, B)`."""
    return torch.cosine_similarity(a.scores, b.scores, dim=-1, eps=1e-12).mean(-1)
