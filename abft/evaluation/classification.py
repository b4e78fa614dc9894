"""Evaluation of a causal language model: classification of prompts by label words, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.evaluation.label_attention import HeadStatistics, HeadSums
from abft.evaluation.retrieval import TargetEvaluation, read_targets
from abft.models.attention import is_enabled
from abft.models.masses import forward, forward_with_mass
from abft.models.mixed_precision import exactly
from abft.prompts.builder import Prompt, PromptSet
from abft.prompts.collation import MASS_INPUTS, MODEL_INPUTS, Collator
from abft.prompts.targets import AttentionTarget


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


# Operations of transformers' models on the output of their LM head: the configuration field, the operation, and the
# prefixes of the model types known to perform it ("" is any): HyperCLOVA X multiplies, Granite divides.
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
    """Metrics over n prompts and C classes, with the per-prompt results for paired comparisons.

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
        """Compute the metrics, with sums in fp64.

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
        """Return the metrics without the per-prompt tensors, ready for JSON."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}


@torch.inference_mode()
def label_logits(
    model: PreTrainedModel | PeftModel, batch: Mapping[str, Tensor], label_token_ids: Sequence[int], **arguments: Any
) -> Tensor:
    """Return the next-token logits of the label tokens at the end of each prompt.

    Run the decoder, then the C label rows of the LM head in fp32. The full logits are never computed, and none is
    rounded, under autocast neither: a bf16 head rounds logits between 16 and 32 to steps of 1/8, enough to tie labels.

    Args:
        model: causal language model of transformers, bare or wrapped by PEFT; on any device.
        batch: prompts from ``abft.Collator``, padded on either side: its ``MODEL_INPUTS`` and ``query_positions``
            (B, 1) are used.
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
    return _logits_and_masses(model, batch, label_token_ids, forward, MODEL_INPUTS, arguments)[0]


def _logits_and_masses(
    model: PreTrainedModel | PeftModel,
    batch: Mapping[str, Tensor],
    label_token_ids: Sequence[int],
    run: Callable[..., Any],
    names: Sequence[str],
    arguments: Mapping[str, Any],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the logits, and what `run(decoder, …)` of the batch's entries `names` leaves in `attentions`."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise NotImplementedError(f"PEFT's {model.peft_type} adds prompt tokens; evaluate LoRA or merged weights")
    if arguments and not is_enabled(model):
        raise ValueError(f"only the 'abft' attention knows {', '.join(arguments)}; call abft.enable(model) first")
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    output = causal_lm.get_output_embeddings()
    head = output.modules_to_save[output.active_adapters[0]] if isinstance(output, ModulesToSaveWrapper) else output
    # A quantized or adapted head is either not an nn.Linear, or its weight does not have a row per token.
    if not isinstance(head, nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        raise NotImplementedError(
            f"LM head of {type(causal_lm).__name__} is {type(head).__name__}, not a plain nn.Linear; "
            "exclude the LM head from quantization and adapters, or merge the adapter"
        )
    # The only other part is the decoder; a third, like BERT's prediction transform, would be silently skipped.
    parts = [p for p in causal_lm.children() if p is not output and next(p.parameters(), None) is not None]
    if len(parts) != 1:
        raise NotImplementedError(
            f"{type(causal_lm).__name__} does not consist of one decoder and an LM head, but of "
            f"{', '.join(name for name, _ in causal_lm.named_children())}; load it as AutoModelForCausalLM"
        )
    decoder = parts[0]
    inputs = {name: batch[name].to(causal_lm.device) for name in names if name in batch}
    outputs = run(decoder, **inputs, **arguments)
    hidden = outputs.last_hidden_state
    rows = batch["query_positions"][..., None].to(hidden.device)
    query = hidden.take_along_dim(rows, dim=1).squeeze(1).to(head.weight.device)

    ids = torch.tensor(label_token_ids, device=head.weight.device)
    bias = None if head.bias is None else head.bias[ids].float()
    with exactly(head.weight.device):
        logits = nn.functional.linear(query.float(), head.weight[ids].float(), bias)
    logits = _transform_logits(logits, causal_lm.config.get_text_config())
    return logits, outputs.attentions or ()


@overload
def evaluate(  # type: ignore[overload-overlap]  # a set of prompts is the narrower type
    model: PreTrainedModel | PeftModel,
    samples: PromptSet,
    *,
    batch_size: int = 32,
    progress: bool = True,
    **arguments: Any,
) -> Evaluation: ...
@overload
def evaluate(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[AttentionTarget],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> TargetEvaluation: ...
def evaluate(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[AttentionTarget],
    *,
    batch_size: int = 32,
    progress: bool = True,
    **arguments: Any,
) -> Evaluation | TargetEvaluation:
    """Evaluate the model on a set of prompts or on attention targets, in one pass over them, batched by length.

    A prompt is classified by its most probable label token. Of a target, the masses on its keys are read, for every
    head, and the most probable of all tokens; the LM head computes only the row of each last query position. Under
    tensor parallelism these masses are those of the process's own heads. The model runs in evaluation mode, and every
    module is put back into the mode it was in.

    Args:
        model: for prompts, as for ``label_logits``; for targets, on the `"abft"` attention (see :func:`abft.enable`).
            On any device.
        samples: a :class:`PromptSet`, as :func:`abft.sample_prompts` makes it, or attention targets; at least one.
        batch_size: samples per forward pass.
        progress: show a progress bar.
        arguments: for prompts only, as for ``label_logits``.

    Raises:
        TypeError: prompts that are not a :class:`PromptSet`; targets with ``arguments``.
        ValueError: there are no samples, ``batch_size`` is not positive, the model returned a logit that is not
            finite, targets on a model with another attention, or as ``label_logits``.
        NotImplementedError: as ``label_logits``.
    """
    if isinstance(samples, PromptSet):
        return _classify(model, samples, batch_size, progress, arguments)
    if arguments:
        raise TypeError(f"{', '.join(arguments)}: evaluation of targets takes no such argument; pass a set of prompts")
    for index, sample in enumerate(samples):
        if isinstance(sample, Prompt):
            raise TypeError(
                f"sample {index} is a Prompt in a {type(samples).__name__}, which does not know the label tokens; pass "
                "PromptSet(builder, prompts), or a slice of what sample_prompts returned"
            )
    return read_targets(model, samples, batch_size, progress)


def evaluate_with_heads(
    model: PreTrainedModel | PeftModel, prompts: PromptSet, *, batch_size: int = 32, progress: bool = True
) -> tuple[Evaluation, HeadStatistics]:
    """Evaluate the model on prompts, and read what its heads look at, in one pass.

    Args:
        model: as for :func:`evaluate`, on the `"abft"` attention.
        prompts, batch_size, progress: as there.

    Raises:
        ValueError, NotImplementedError: as there, or a model on another attention.
    """
    heads = HeadSums()
    return _classify(model, prompts, batch_size, progress, {}, heads), heads.statistics()


def _classify(
    model: PreTrainedModel | PeftModel,
    prompts: PromptSet,
    batch_size: int,
    progress: bool,
    arguments: dict[str, Any],
    heads: HeadSums | None = None,
) -> Evaluation:
    run, names = (forward, MODEL_INPUTS) if heads is None else (forward_with_mass, MASS_INPUTS)
    logits = torch.empty(len(prompts), len(prompts.label_token_ids))
    collate = Collator(prompts.pad_token_id)
    with evaluation_mode(model):
        for indices, batch in length_sorted_batches(prompts, collate, batch_size, "Evaluating", progress):
            found, masses = _logits_and_masses(model, batch, prompts.label_token_ids, run, names, arguments)
            logits[indices] = found.cpu()
            if heads is not None:
                heads.add(masses, batch)
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
                f"{name}={value}: its effect on the logits of model type {config.model_type!r} is not known here; "
                f"set it to None if it has none (known types: {', '.join(model_types)})"
            )
        logits = transform(logits, value)
    return logits
