"""In-context learning (ICL) as implicit fine-tuning: Dai et al., arXiv 2212.10559, sections 4 and 5.

Does a model that reads demonstrations behave like the same model fine-tuned on them? Fine-tuning is restricted there to
what attention to demonstrations can stand for: W_K and W_V alone, plain SGD, the demonstrations in their order, each a
zero-shot prompt. Compared are predictions (Rec2FTP), updates of attention outputs (SimAOU) and attention scores
(SimAM). The controls: of Rec2FTP, what ICL recovers of everything that zero-shot gets wrong; of the similarities, the
model with a random update of W_K and W_V of the same size, matrix by matrix (the paper draws random outputs instead).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.evaluation.classification import evaluate, label_logits
from abft.models.attention import is_enabled
from abft.models.masses import forward
from abft.models.momentum import check_momentum
from abft.models.projections import KeyValueUpdate, attention_modules, find_kv
from abft.prompts.builder import Prompt, PromptBuilder, PromptCollator
from abft.prompts.examples import Example

__all__ = ["ImplicitFineTuning", "MomentumGain", "compare_with_fine_tuning", "fine_tune", "momentum_gain"]


@dataclass(frozen=True, eq=False)
class ImplicitFineTuning:
    """What ICL and fine-tuning on the same demonstrations have in common, over n queries and L layers.

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
        """Plain numbers and lists, for JSON; of what is per layer also the mean over layers, as `…_mean`."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        layers = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {
            **plain,
            "accuracy": dict(self.accuracy),
            "losses": list(self.losses),
            **{name: value.tolist() for name, value in layers.items()},
            **{f"{name}_mean": value.mean().item() for name, value in layers.items()},
        }


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
        """For JSON; `gains` is a list of η, accuracy and its difference to plain attention."""
        gains = [{"eta": eta, "accuracy": a, "gain": a - self.plain} for eta, a in self.accuracy.items()]
        return {"n": self.n, "plain": self.plain, "gains": gains}


def fine_tune(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    *,
    learning_rate: float = 0.01,
    epochs: int = 1,
    progress: bool = True,
) -> tuple[PreTrainedModel, KeyValueUpdate, tuple[float, ...]]:
    """Fine-tunes a copy of the model on the demonstrations as the paper does, to compare with ICL.

    One step of plain SGD per demonstration, in their order: cross-entropy, over the whole vocabulary, of its label's
    first token behind its zero-shot prompt. Only W_K and W_V are trained, without dropout; of a fused projection the
    rows of k and v. Updates are summed in float32 whatever the model's dtype.

    Args:
        model: causal language model, which stays as it is.
        builder: of the prompts.
        demonstrations: at least one.
        learning_rate: of SGD, more than 0. What works depends on the model: look at the losses.
        epochs: passes over the demonstrations; 1 in the paper.
        progress: show a progress bar.

    Returns:
        The fine-tuned copy, in evaluation mode; its update, which can also set it to other weights; and the loss
        before each step, in nats.

    Raises:
        ValueError: no demonstrations, a number out of range, quantized projections, or a loss that is not finite.
        NotImplementedError: a model under PEFT, or one whose W_K and W_V cannot be told from the rest.
    """
    if not demonstrations:
        raise ValueError("no demonstrations to fine-tune on; pass those that the prompts show")
    if epochs < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"epochs must be 1 or more and learning_rate finite and over 0, got {epochs} and {learning_rate}"
        )
    find_kv(model)  # refuses before anything is copied
    prompts = [builder.build([], demonstration) for demonstration in demonstrations]
    tuned = copy.deepcopy(model).eval().requires_grad_(False)
    update = KeyValueUpdate(tuned)
    device = next(tuned.parameters()).device
    collate = PromptCollator(builder)
    losses: list[float] = []
    for prompt in track(prompts * epochs, description="Fine-tuning", disable=not progress):
        batch = {name: tensor.to(device) for name, tensor in collate([prompt]).items()}
        with torch.enable_grad(), update.trained() as parameters:
            logits = forward(tuned, input_ids=batch["input_ids"], logits_to_keep=1).logits[:, -1]
            loss = nn.functional.cross_entropy(logits.float(), batch["label_ids"].to(logits.device))
            gradients = torch.autograd.grad(loss, parameters)
        losses.append(loss.item())
        if not loss.isfinite():
            raise ValueError(f"loss {loss.item()} in step {len(losses)} of fine-tuning; lower {learning_rate=}")
        update.step(gradients, learning_rate)
    return tuned, update, tuple(losses)


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
    """Rec2FTP, SimAOU and SimAM of ICL on a fixed list of demonstrations, against fine-tuning on the same.

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
    collate = PromptCollator(builder)
    totals = _Totals()
    with evaluation_mode(model):
        for indices, icl_batch in length_sorted_batches(shown, builder, batch_size, "Comparing", progress):
            own = torch.tensor([_common_ending(shown[i], alone[i]) for i in indices])
            zero_shot_batch = collate([alone[i] for i in indices])
            icl = _observe(model, icl_batch, builder, own)
            zero_shot = _observe(model, zero_shot_batch, builder, own)
            update.write()
            fine_tuned = _observe(tuned, zero_shot_batch, builder, own)
            random_update.write()
            randomly = _observe(tuned, zero_shot_batch, builder, own)
            totals.add(icl_batch["labels"], icl, zero_shot, fine_tuned, randomly)
    return totals.result(len(queries), losses)


def momentum_gain(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    builder: PromptBuilder,
    etas: Sequence[float],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> MomentumGain:
    """Accuracy with plain attention, and with momentum attention for each η.

    The model is taken as it is, whereas the paper trains its models with momentum attention from the start.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        prompts: at least one.
        builder: the prompts' builder.
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
    plain = evaluate(model, prompts, builder, **shared, attention_probe=lambda module, *_: seen.add(module)).accuracy
    _check_all_seen(model, len(seen))
    accuracy = {eta: evaluate(model, prompts, builder, **shared, momentum=eta).accuracy for eta in etas}
    return MomentumGain(len(prompts), plain, accuracy)


@dataclass(frozen=True, eq=False)
class _Observed:
    """What a batch of B prompts looks like inside a model, on the CPU."""

    predictions: Tensor  # (B,) int64
    outputs: Tensor  # (L, B, width), of length 1
    scores: Tensor  # (L, B, H, W), 0 in front of the query's own tokens


@dataclass
class _Totals:
    """Sums over queries of what is averaged over them in the end."""

    correct: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    icl_of_wrong: int = 0
    recovered: int = 0
    icl_of_recovered: int = 0
    layers: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, labels: Tensor, icl: _Observed, zero_shot: _Observed, fine_tuned: _Observed, randomly: _Observed
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


def _update_similarity(a: _Observed, b: _Observed, origin: _Observed) -> Tensor:
    """Cosine of what moved the attention outputs from `origin` to `a` and to `b`, `(L, B)`."""
    return torch.cosine_similarity(a.outputs - origin.outputs, b.outputs - origin.outputs, dim=-1, eps=1e-12)


def _score_similarity(a: _Observed, b: _Observed) -> Tensor:
    """Cosine of the scores, mean over heads, `(L, B)`."""
    return torch.cosine_similarity(a.scores, b.scores, dim=-1, eps=1e-12).mean(-1)


def _common_ending(a: Prompt, b: Prompt) -> int:
    """How many tokens both prompts end with."""
    pairs = zip(reversed(a.input_ids), reversed(b.input_ids), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.length, b.length))


def _check_all_seen(model: PreTrainedModel, seen: int) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    if seen != layers:
        raise NotImplementedError(
            f"{type(model).__name__} shows the attention of {seen} of {layers} layers: some of it does not go through "
            "transformers' AttentionInterface"
        )


def _observe(model: PreTrainedModel, batch: dict[str, Tensor], builder: PromptBuilder, own: Tensor) -> _Observed:
    """Predictions, attention outputs and scores at the last tokens; `own` `(B,)`: tokens of the query itself."""
    modules = attention_modules(model)
    outputs: dict[nn.Module, Tensor] = {}
    scores: dict[nn.Module, Tensor] = {}
    last = batch["query_positions"]

    def keep_output(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        row = hidden.take_along_dim(last[..., None].to(hidden.device), dim=1)[:, 0]
        outputs[module] = nn.functional.normalize(row.float(), dim=-1).cpu()

    def keep_scores(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        scores[module] = _last_scores(query, key, last.to(query.device), own.to(query.device), scale).cpu()

    with _hooked(modules, keep_output):
        logits = label_logits(model, batch, builder.label_token_ids, attention_probe=keep_scores)
    _check_all_seen(model, sum(module in scores and module in outputs for module in modules))
    if not logits.isfinite().all():
        raise ValueError("label logits that are not finite; load the model in float32, or lower the learning rate")
    return _Observed(
        logits.argmax(1).cpu(),
        torch.stack([outputs[module] for module in modules]),
        torch.stack([scores[module] for module in modules]),
    )


def _last_scores(query: Tensor, key: Tensor, last: Tensor, own: Tensor, scale: float) -> Tensor:
    """Scores before the softmax of row `last` `(B, 1)` over the `own` `(B,)` keys that end with it, `(B, H, W)`."""
    back = torch.arange(int(own.max()) - 1, -1, -1, device=key.device)
    keys = key.take_along_dim((last - back).clamp(min=0)[:, None, :, None], dim=2).float()  # [B, H_kv, W, D]
    rows = query.take_along_dim(last[:, None, :, None], dim=2).float()  # [B, H, 1, D]
    rows = rows.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, H_kv, H / H_kv, D]
    scores = (rows @ keys.transpose(2, 3)).flatten(1, 2) * scale
    return scores.masked_fill((back >= own[:, None])[:, None], 0.0)


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
