"""Checks before training, and the advice of an out-of-memory error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from abft.models.loading import context_of
from abft.models.projections import TrainedParameter
from abft.prompts.targets import AttentionTarget
from abft.training.config import ABFTConfig
from abft.training.objectives.objective import Objective

__all__ = ["Samples", "check_decay", "check_engine", "check_lengths", "out_of_memory_advice"]

Samples: TypeAlias = Sequence[AttentionTarget]


def check_lengths(model: PreTrainedModel, args: ABFTConfig, samples: Samples) -> None:
    """Raise ValueError if a sample is longer than the model's context or the budget of a pass."""
    longest = max(sample.length for sample in samples)
    context = context_of(model.config)
    if context is not None and longest > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, the model's context {context}; lower k, or take shorter texts"
        )
    if isinstance(args.tokens_per_batch, int) and longest > args.tokens_per_batch:
        raise ValueError(
            f"the longest prompt has {longest} tokens, over tokens_per_batch={args.tokens_per_batch}; raise it"
        )


def check_decay(args: ABFTConfig, trained: Sequence[TrainedParameter]) -> None:
    """Raise ValueError for weight decay on a fused projection, which would move v."""
    if args.weight_decay and any(item.fused for item in trained):
        raise ValueError(
            f"weight_decay={args.weight_decay} would move the value part of {trained[0].name}; "
            "set it to 0, or train with LoRA"
        )


def check_engine(trainer: Trainer, objective: Objective, trained: Sequence[TrainedParameter]) -> None:
    """Raise an error if the engine that splits the parameters (tensor parallel, FSDP, DeepSpeed) cannot train them.

    Args:
        trainer: with the engine set up, and options in `trainer.args`.
        objective: of the run.
        trained: W_Q and W_K; empty with LoRA.

    Raises:
        ValueError: the model is not split as `tensor_parallel_size` says.
        NotImplementedError: the engine does not serve an option.
    """
    args: ABFTConfig = trainer.args  # type: ignore[assignment]
    fused = any(item.fused for item in trained)
    _check_tensor_parallel(trainer.get_tp_size(), args, objective, fused)
    version = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", None)
    if trainer.is_fsdp_enabled and version != 2:
        raise NotImplementedError('FSDP 1 is not served; use FSDP 2 (fsdp_config={"version": 2})')
    split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trained and (trainer.is_deepspeed_enabled or (split and fused)):
        raise NotImplementedError(
            f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'FSDP'} splits W_Q and W_K, which training them in "
            f"full does not serve{'' if trainer.is_deepspeed_enabled else ' where they are fused with W_V'}; use "
            "lora=True, or plain data parallelism (torchrun)"
        )
    if trainer.is_fsdp_enabled and isinstance(args.tokens_per_batch, int):
        raise NotImplementedError(
            "with tokens_per_batch processes take different numbers of passes, for which FSDP would wait for ever; "
            "set per_device_train_batch_size instead"
        )
    if split and args.restricted_gradient:
        raise NotImplementedError(
            "restricted_gradient takes gradients inside the forward pass, where FSDP and DeepSpeed have none of "
            "their own; use plain data parallelism (torchrun): this mode needs the memory of inference only"
        )


def _check_tensor_parallel(processes: int, args: ABFTConfig, objective: Objective, fused: bool) -> None:
    if processes != args.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={args.tensor_parallel_size}, but the model is split over "
            f'{processes} processes; load it with tp_plan="auto" under torchrun'
        )
    if args.tensor_parallel_size == 1:
        return
    apart = args.world_size > args.tensor_parallel_size
    refused = [
        *objective.mixing(args),
        *(["lora"] if args.lora else []),
        *(["restricted_gradient and data parallelism"] if args.restricted_gradient and apart else []),
        *(["fused projections"] if fused else []),
    ]
    if refused:
        raise NotImplementedError(f"tensor parallelism does not serve {refused[0]}; use data parallelism")


def out_of_memory_advice(
    error: BaseException, inputs: dict[str, Tensor], args: ABFTConfig, objective: Objective
) -> str:
    """Return a message that names what did not fit and the remedies, first those that change no result."""
    prompts, tokens = len(inputs["labels"]), inputs["input_ids"].numel()
    advice = []
    if prompts > 1:
        advice.append(f"tokens_per_batch={tokens // 2} or less")
    if not args.restricted_gradient and not args.gradient_checkpointing:
        advice.append("gradient_checkpointing=True")
    if objective.restrictable and not args.restricted_gradient:
        advice.append("restricted_gradient=True")
    advice.append("more GPUs (FSDP or tensor parallelism), or a 4-bit base with lora=True")
    return (
        f"out of memory in a pass of {prompts} prompts and {tokens} tokens. In this order: {'; '.join(advice)}. "
        f"`abft plan` says beforehand what fits. ({str(error).splitlines()[0]})"
    )
