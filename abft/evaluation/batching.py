"""Passes of many samples through a model that is evaluated, not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import nn

from abft.prompts.collation import Collator
from abft.prompts.targets import AttentionTarget

__all__ = ["evaluation_mode", "length_sorted_batches"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off; afterwards every module is back in the mode it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in in_training:
            module.training = True


def length_sorted_batches(
    samples: Sequence[AttentionTarget], collate: Collator, batch_size: int, description: str, progress: bool
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield batches and the indices of their samples, with a progress bar.

    Longest first, so that there is little padding and a batch that does not fit in memory fails at once.

    Raises:
        ValueError: no samples, or ``batch_size`` is not positive.
    """
    if not samples:
        raise ValueError("no prompts or targets to evaluate; pass one or more")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    order = sorted(range(len(samples)), key=lambda i: samples[i].length, reverse=True)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for chunk in track(chunks, description=description, disable=not progress):
        yield chunk, collate([samples[i] for i in chunk])
