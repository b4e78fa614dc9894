"""Label-word classification with a causal language model, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.models.attention import is_enabled
from abft.models.masses import forward
from abft.prompts.builder import Prompt, PromptBuilder
from abft.prompts.collation import MODEL_INPUTS


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


# What the models of transformers do to the output of their LM head: the configuration field, the operation,
# and how the model types known to perform it begin ("" is any): HyperCLOVA X multiplies, Granite divides.
_LOGIT_TRANSFORMS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[str, ...]]] = {
    "logit_scale": (torch.mul, ("cohere",)),
    "logits_scaling": (torch.div, ("granite", "minicpm3")),
    "logits_mup_width_multiplier": (torch.div, ("inkling",)),
    "lm_head_multiplier": (torch.mul, ("falcon_h1",)),
    "final_logit_softcapping": (_softcap, ("",)),
    "logits_soft_cap": (_softcap, ("recurrent_gemma",)),
    "output_logit_soft_cap": (_softcap, ("xlstm",)),
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics over n prompts and C classes, with the per-prompt results that paired comparisons need.

    Args:
        n: number of prompts.
        accuracy: share of prompts whose most probable label is the gold one.
        accuracy_stderr: standard error of the accuracy, √(a(1−a)/n).
        macro_f1: mean F1 over the classes that occur as gold label or as prediction.
        true_label_likelihood: mean probability of the gold label.
        ece: expected calibration error of the predicted label, in equal-width bins that are closed on the
            right.
        predictions: (n,) int64, predicted class of each prompt, in the order of the prompts.
        labels: (n,) int64, gold class.
        probabilities: (n, C) fp32, softmax over the label logits.
    """

    n: int
    accuracy: float
    accuracy_stderr: float
    macro_f1: float
    true_label_likelihood: float
    ece: float
    predictions: Tensor
    labels: Tensor
    probabilities: Tensor

    @classmethod
    def from_probabilities(cls, probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Evaluation:
        """Computes the metrics, with sums in fp64.

        Args:
            probabilities: (n, C) floating point, rows that sum to 1.
            labels: (n,) int64, gold classes.
            bins: number of bins of the calibration error; bin b holds confidences in (b/bins, (b+1)/bins],
                1.0 included.

        Raises:
            ValueError: there are no prompts, or the shapes do not fit.
        """
        if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
            raise ValueError(
                "probabilities must be (n, C) and labels (n,) with n of 1 or more, "
                f"got {tuple(probabilities.shape)} and {tuple(labels.shape)}"
            )
        n, classes = probabilities.shape
        confidences, predictions = probabilities.float().max(dim=1)
        correct = (predictions == labels).double()
        accuracy = correct.mean().item()

        confusion = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)
        support = confusion.sum(dim=0) + confusion.sum(dim=1)
        occurs = support > 0
        f1 = 2 * confusion.diagonal()[occurs].double() / support[occurs]

        bin_of = (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)
        gaps = torch.bincount(bin_of, weights=correct - confidences.double(), minlength=bins)
        return cls(
            n=n,
            accuracy=accuracy,
            accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / n),
            macro_f1=f1.mean().item(),
            true_label_likelihood=probabilities.double().gather(1, labels[:, None]).mean().item(),
            ece=gaps.abs().sum().item() / n,
            predictions=predictions,
            labels=labels,
            probabilities=probabilities,
        )

    def to_dict(self) -> dict[str, int | float]:
        """The metrics without the per-prompt tensors, ready for JSON."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}


@torch.inference_mode()
def label_logits(
    model: PreTrainedModel | PeftModel, batch: Mapping[str, Tensor], label_token_ids: Sequence[int], **arguments: Any
) -> Tensor:
    """The next-token logits of the label tokens at the end of each prompt.

    Runs the decoder, then the C label rows of the LM head in fp32. The full logits are never made; and logits
    that a half-precision head would round (to steps of 1/8 between 16 and 32, in bf16: enough to tie labels)
    are not rounded.

    Args:
        model: causal language model of transformers, bare or wrapped by PEFT; on any device.
        batch: from ``PromptCollator``, padded on either side: its ``MODEL_INPUTS`` and
            ``query_positions`` (B, 1) are used.
        label_token_ids: C token ids.
        arguments: handed to the decoder, for its attention: ``momentum``, ``attention_probe``.

    Returns:
        (B, C) fp32, on the device of the LM head.

    Raises:
        ValueError: there are ``arguments``, and the model runs on another attention than ``"abft"``, which would
            ignore them.
        NotImplementedError: the model is not one decoder and one head, or has a head other than a plain
            ``nn.Linear``, a scaling of its logits that is not known here, or PEFT prompt tokens.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise NotImplementedError(f"PEFT's {model.peft_type} adds prompt tokens; evaluate LoRA or merged weights")
    if arguments and not is_enabled(model):
        raise ValueError(f"only the 'abft' attention knows {', '.join(arguments)}; call abft.enable(model) first")
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = causal_lm.get_output_embeddings()
    # A quantized or adapted head is either no nn.Linear or one whose weight does not have a row per token.
    if not isinstance(head, nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        raise NotImplementedError(
            f"LM head of {type(causal_lm).__name__} is {type(head).__name__}, not a plain nn.Linear; "
            "exclude the LM head from quantization and adapters, or merge the adapter"
        )
    # The one other part is the decoder; a third, like BERT's prediction transform, would be silently skipped.
    parts = [p for p in causal_lm.children() if p is not head and next(p.parameters(), None) is not None]
    if len(parts) != 1:
        raise NotImplementedError(
            f"{type(causal_lm).__name__} is not made of one decoder and an LM head, but of "
            f"{', '.join(name for name, _ in causal_lm.named_children())}; load it as AutoModelForCausalLM"
        )
    decoder = parts[0]
    inputs = {name: batch[name].to(causal_lm.device) for name in MODEL_INPUTS if name in batch}
    hidden = forward(decoder, **inputs, **arguments).last_hidden_state
    rows = batch["query_positions"][..., None].to(hidden.device)
    query = hidden.take_along_dim(rows, dim=1).squeeze(1).to(head.weight.device)

    ids = torch.tensor(label_token_ids, device=head.weight.device)
    bias = None if head.bias is None else head.bias[ids].float()
    logits = nn.functional.linear(query.float(), head.weight[ids].float(), bias)
    return _transform_logits(logits, causal_lm.config.get_text_config())


def evaluate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Prompt],
    builder: PromptBuilder,
    *,
    batch_size: int = 32,
    progress: bool = True,
    **arguments: Any,
) -> Evaluation:
    """Classifies every prompt by its most probable label token and scores the result.

    Prompts are batched by length. The model runs in evaluation mode, and every module is put back into the mode
    it was in.

    Args:
        model: as for ``label_logits``.
        prompts: from ``builder``.
        builder: knows the label tokens and the padding.
        batch_size: prompts per forward pass.
        progress: show a progress bar.
        arguments: as for ``label_logits``.

    Raises:
        ValueError: there are no prompts, ``batch_size`` is not positive, the model returned a logit that is not
            finite, or as ``label_logits``.
        NotImplementedError: as ``label_logits``.
    """
    logits = torch.empty(len(prompts), len(builder.label_token_ids))
    with evaluation_mode(model):
        for indices, batch in length_sorted_batches(prompts, builder, batch_size, "Evaluating", progress):
            logits[indices] = label_logits(model, batch, builder.label_token_ids, **arguments).cpu()
    if bad := (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(
            f"label logits of {len(bad)} of {len(prompts)} prompts are not finite, first prompt {bad[0]}: "
            f"{logits[bad[0]].tolist()}; load the model in bfloat16 or float32, or train at a lower rate"
        )
    labels = torch.tensor([prompt.query_label for prompt in prompts])
    return Evaluation.from_probabilities(logits.softmax(dim=1), labels)


def _transform_logits(logits: Tensor, config: Any) -> Tensor:
    for name, (transform, model_types) in _LOGIT_TRANSFORMS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if not config.model_type.startswith(model_types):
            raise NotImplementedError(
                f"{name}={value}: what model type {config.model_type!r} does to logits is not known here; "
                f"set it to None if it does nothing (known types: {', '.join(model_types)})"
            )
        logits = transform(logits, value)
    return logits
