"""The size of a pass: the tokens that go through the model at a time, which change no gradient.

`tokens_per_batch="auto"` takes what fits and what is quick. Activations of a token are estimated from the widths of the
linear layers: each keeps its input and output for the backward pass, and what lies between them is as wide.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from abft.models.attention import transformer_of
from abft.training.checks import Samples
from abft.training.config import ABFTConfig

__all__ = ["activation_bytes", "can_pack", "tokens_per_pass"]

# On a CPU a pass is slow below some 150 tokens; beyond, time per token stays within a tenth and only memory grows. So
# the widest tensor of a pass is kept to what the cache of a core holds.
CACHED_BYTES = 2**21
FEWEST_ON_CPU, MOST_ON_CPU = 128, 2048
# Bytes of a step over those of the linear layers' inputs and outputs: the most over six kinds of models and all modes,
# as `abft plan` counts (`tests/abft/training/test_passes.py`).
OVERHEAD = 1.6
# Of the free memory; the rest is for fragments.
SHARE = 0.8


def can_pack(model: nn.Module) -> bool:
    """Return True if the model takes positions, without which packed prompts would be counted as one."""
    return "position_ids" in inspect.signature(transformer_of(model).forward).parameters


def _widths(model: nn.Module) -> tuple[int, int]:
    """Return inputs plus outputs of all linear layers of the decoder that a token meets, and the widest of these."""
    inner = transformer_of(model)
    head = inner.get_output_embeddings()
    experts = getattr(inner.config.get_text_config(), "num_experts_per_tok", None)
    total = widest = 0
    modules: Iterable[Any] = inner.modules()  # of layers that know their sizes
    for module in modules:
        if module is head:
            continue
        sizes: tuple[int, ...] = ()
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            sizes = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            sizes = (module.nx, module.nf)
        else:  # experts as one tensor (experts, inputs, outputs)
            sizes = tuple(
                sum(weight.shape[1:]) * min(experts or weight.shape[0], weight.shape[0])
                for weight in module.parameters(recurse=False)
                if weight.dim() == 3
            )
        total += sum(sizes)
        widest = max(widest, *sizes, 0)
    return total, widest


def activation_bytes(model: nn.Module, args: ABFTConfig) -> float:
    """Return an estimate of the bytes that one token of a pass takes, from above."""
    config = transformer_of(model).config.get_text_config()
    total, _ = _widths(model)
    size = 2 if args.bf16 or args.fp16 else transformer_of(model).dtype.itemsize
    layer = total / config.num_hidden_layers
    if args.restricted_gradient:
        kept = 2 * layer
    elif args.gradient_checkpointing:
        kept = 2 * layer + config.num_hidden_layers * config.hidden_size
    else:
        kept = total
    return OVERHEAD * size * kept


def _free_bytes(model: nn.Module, args: ABFTConfig, device: torch.device) -> float:
    """Return the bytes that are free for activations, after gradients and Adam's moments; infinite if not known."""
    to_come = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached - to_come
    if device.type == "cpu":
        return psutil.virtual_memory().available / args.world_size - to_come
    return float("inf")


def tokens_per_pass(model: nn.Module, args: ABFTConfig, samples: Samples, device: torch.device) -> int | None:
    """Return the most tokens of a pass on the device for `tokens_per_batch="auto"`: what fits, and what is quick.

    At least the longest sample, which cannot be split; None if nothing limits a pass.

    Args:
        model: on its device, with what is trained requiring a gradient.
        args: options of the run.
        samples: those to train on.
    """
    limit = SHARE * _free_bytes(model, args, device) / activation_bytes(model, args)
    if device.type == "cpu":
        _, widest = _widths(model)
        limit = min(limit, max(FEWEST_ON_CPU, min(MOST_ON_CPU, CACHED_BYTES // (4 * widest))))
    if limit == float("inf"):
        return None
    return max(max(sample.length for sample in samples), int(limit))
