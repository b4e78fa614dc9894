"""Fine-tuning on demonstrations as in-context learning could do it: plain SGD on W_K and W_V (arXiv 2212.10559)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.models.masses import forward
from abft.models.projections import find_kv
from abft.prompts.builder import PromptBuilder
from abft.prompts.collation import Collator, padding_id
from abft.prompts.examples import Example

__all__ = ["KeyValueUpdate", "fine_tune"]


class KeyValueUpdate:
    """An update of a model's W_K and W_V, zero at first; the model does not change before :meth:`write`.

    Args:
        model: updates are added to the weights that it has now.

    Attributes:
        parts: W_K and W_V, which may be parts of parameters.
        deltas: float32, one of the shape of each part.

    Raises:
        ValueError: as :func:`find_kv`.
        NotImplementedError: as there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = find_kv(model)
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


def fine_tune(
    model: PreTrainedModel,
    builder: PromptBuilder,
    demonstrations: Sequence[Example],
    *,
    learning_rate: float = 0.01,
    epochs: int = 1,
    progress: bool = True,
) -> tuple[PreTrainedModel, KeyValueUpdate, tuple[float, ...]]:
    """Fine-tune a copy of the model on the demonstrations as the paper does, to compare with ICL.

    One step of plain SGD per demonstration, in their order: cross-entropy, over the whole vocabulary, of its label's
    first token after its zero-shot prompt. Only W_K and W_V are trained, without dropout; in a fused projection the
    entries of k and v. Updates are summed in float32 whatever the model's dtype.

    Args:
        model: causal language model; it is not changed.
        builder: of the prompts.
        demonstrations: at least one.
        learning_rate: of SGD, above 0. The right value depends on the model: look at the losses.
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
    collate = Collator(padding_id(builder.tokenizer))
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
