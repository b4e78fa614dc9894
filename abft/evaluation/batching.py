"""Passing many prompts through a model that is being looked at, not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.progress import track
from torch import Tensor, nn

from abft.prompts.builder import Prompt, PromptBuilder, PromptCollator
from abft.prompts.collation import Sample

__all__ = ["evaluation_mode", "length_sorted_batches", "length_sorted_chunks"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout and the like off; afterwards every module is back in the mode it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def length_sorted_batches(
    prompts: Sequence[Prompt], builder: PromptBuilder, batch_size: int, description: str, progress: bool
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches and the indices of their prompts, as :func:`length_sorted_chunks` divides them."""
    collate = PromptCollator(builder)
    for chunk in length_sorted_chunks(prompts, batch_size, description, progress):
        yield chunk, collate([prompts[i] for i in chunk])


def length_sorted_chunks(
    samples: Sequence[Sample], batch_size: int, description: str, progress: bool
) -> Iterator[list[int]]:
    """Indices of the samples of each batch, with a progress bar.

    Longest first, so that little is padded and a batch that does not fit in memory shows at once.

    Raises:
        ValueError: no samples, or ``batch_size`` is not positive.
    """
    if not samples:
        raise ValueError("no prompts to evaluate; pass one, or a target, or more")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    order = sorted(range(len(samples)), key=lambda i: samples[i].length, reverse=True)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    yield from track(chunks, description=description, disable=not progress)
