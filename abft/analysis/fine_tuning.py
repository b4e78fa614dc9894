"""Fine-tuning on demonstrations as in-context learning could do it: plain SGD on keys and values (arXiv 2212.10559).

The published code trains k_proj and v_proj, with their biases, on every token of a demonstration; the paper's
derivation needs the label alone. Both forms are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.analysis.query_vectors import QueryVectors
from abft.models.masses import forward
from abft.models.projections import TrainedParameter, find_kv
from abft.prompts.builder import PromptBuilder
from abft.prompts.examples import Example

__all__ = ["FORMS", "Diverged", "Form", "KeyValueUpdate", "demonstration_ids", "fine_tune"]

Form = Literal["all", "label"]
FORMS: tuple[Form, ...] = ("all", "label")
"""The tokens whose loss is trained: all of a demonstration but the first, or the first of its label."""


class Diverged(ValueError):
    """Fine-tuning whose loss is not finite: the learning rate is too high."""


class KeyValueUpdate:
    """An update of a model's W_K and W_V and their biases, zero at first; the model stays until :meth:`write`.

    Args:
        model: updates are added to the weights that it has now.

    Attributes:
        parts: W_K and W_V, which may be parts of parameters, then the biases that there are.
        deltas: float32, one of the shape of each part.

    Raises:
        ValueError: as :func:`find_kv`.
        NotImplementedError: as there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        weights = find_kv(model)
        self.parts = [*weights, *(bias for weight in weights if (bias := _bias(model, weight)) is not None)]
        self._parameters = [model.get_parameter(item.name) for item in self.parts]
        self._base = [item.view(p.detach()).clone() for item, p in zip(self.parts, self._parameters, strict=True)]
        self.deltas = [torch.zeros_like(base, dtype=torch.float32) for base in self._base]

    @contextmanager
    def trained(self) -> Iterator[list[nn.Parameter]]:
        """Yield the whole parameters, which require a gradient inside the block."""
        before = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield self._parameters
        finally:
            for parameter, required in zip(self._parameters, before, strict=True):
                parameter.requires_grad_(required)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Make one step of plain SGD and write it into the model; `gradients` are those of the whole parameters."""
        for item, delta, gradient in zip(self.parts, self.deltas, gradients, strict=True):
            delta.sub_(item.view(gradient).float(), alpha=learning_rate)
        self.write()

    def random_like(self, generator: torch.Generator) -> KeyValueUpdate:
        """Return a random update of the same model: each part normal, with the Frobenius norm of this one's."""
        other = copy.copy(self)
        noises = [torch.randn(delta.shape, generator=generator).to(delta.device) for delta in self.deltas]
        pairs = zip(noises, self.deltas, strict=True)
        other.deltas = [noise * (delta.norm() / noise.norm()) for noise, delta in pairs]
        return other

    @torch.no_grad()
    def write(self) -> None:
        """Set the model's weights to those at the start plus this update."""
        for item, parameter, base, delta in zip(self.parts, self._parameters, self._base, self.deltas, strict=True):
            item.view(parameter).copy_(base.float() + delta)


def _bias(model: PreTrainedModel, weight: TrainedParameter) -> TrainedParameter | None:
    """Return the part of the projection's bias that belongs to this part of its weight; None without a bias."""
    name = weight.name.removesuffix("weight") + "bias"
    if getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None) is None:
        return None
    return replace(weight, name=name, dim=None if weight.dim is None else 0)


def demonstration_ids(builder: PromptBuilder, demonstration: Example) -> list[int]:
    """Return the tokens of one demonstration alone: its zero-shot prompt and its whole label."""
    return [*builder.build([], demonstration).input_ids, *builder.label_ids[demonstration.label]]


def fine_tune(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    *,
    form: Form = "label",
    learning_rate: float = 0.01,
    epochs: int = 1,
    on_queries: Callable[[Tensor], None] | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, KeyValueUpdate, tuple[float, ...]]:
    """Fine-tune a copy of the model on the demonstrations as the paper does, to compare with ICL.

    One step of plain SGD per demonstration, in their order, each alone: cross-entropy over the whole vocabulary. Only
    W_K and W_V and their biases are trained, without dropout; in a fused projection the entries of k and v. Updates are
    summed in float32 whatever the model's dtype.

    Args:
        model: causal language model; it is not changed.
        builder: of the prompts.
        demonstrations: at least one.
        form: "all", the published form: the mean over all tokens but the first; "label": the label's first token after
            its zero-shot prompt.
        learning_rate: of SGD, above 0. The right value depends on the model: look at the losses.
        epochs: passes over the demonstrations; 1 in the paper.
        on_queries: called in each step, before its update, with the query vectors of the demonstration's tokens
            `(L, n, width)` (see :class:`QueryVectors`).
        progress: show a progress bar.

    Returns:
        The fine-tuned copy, in evaluation mode; its update, which can also set it to other weights; and the loss
        before each step, in nats.

    Raises:
        Diverged: a loss that is not finite; a ValueError.
        ValueError: no demonstrations, a number out of range, or quantized projections.
        NotImplementedError: a model under PEFT, or one whose W_K and W_V cannot be told from the rest.
    """
    if not demonstrations:
        raise ValueError("no demonstrations to fine-tune on; pass those that the prompts show")
    if epochs < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"epochs must be 1 or more and learning_rate finite and over 0, got {epochs} and {learning_rate}"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    find_kv(model)  # refuses before anything is copied
    tuned = copy.deepcopy(model).eval().requires_grad_(False)
    update = KeyValueUpdate(tuned)
    queries = None if on_queries is None else QueryVectors(tuned)
    losses: list[float] = []
    for demonstration in track([*demonstrations] * epochs, description="Fine-tuning", disable=not progress):
        recording = nullcontext() if queries is None else queries.recording()
        with torch.enable_grad(), update.trained() as parameters, recording:
            loss = _loss(tuned, builder, demonstration, form)
            gradients = torch.autograd.grad(loss, parameters)
        if queries is not None and on_queries is not None:
            on_queries(queries.vectors()[:, 0])
        losses.append(loss.item())
        if not loss.isfinite():
            raise Diverged(f"loss {loss.item()} in step {len(losses)} of fine-tuning; lower {learning_rate=}")
        update.step(gradients, learning_rate)
    return tuned, update, tuple(losses)


def _loss(model: PreTrainedModel, builder: PromptBuilder, demonstration: Example, form: Form) -> Tensor:
    """Return the loss of one demonstration, in nats."""
    ids = demonstration_ids(builder, demonstration)
    asked = len(ids) - len(builder.label_ids[demonstration.label])  # the label's first token
    first, last = (1, len(ids)) if form == "all" else (asked, asked + 1)
    device = next(model.parameters()).device
    logits = forward(model, input_ids=torch.tensor([ids], device=device), logits_to_keep=len(ids) - first + 1).logits
    rows = logits[0, : last - first].float()  # of the tokens before the targets
    return nn.functional.cross_entropy(rows, torch.tensor(ids[first:last], device=logits.device))
