"""A run of the GPU suites, and the inputs and failures that every suite shares.

A suite yields rows (dicts); a row that could not be measured has a `reason` in place of figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.compared_steps import label_groups
from bench.gpu.budget import Budget

__all__ = ["ROOT", "Row", "Setting", "groups_of", "inputs", "shape", "tried"]

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


class Setting(NamedTuple):
    """The device, the time left, and the size of shapes of one run."""

    device: torch.device
    budget: Budget
    tiny: bool  # shapes for the interpreter: the code runs, nothing is measured
    planned: Callable[..., float | None] | None = None  # bytes that `abft plan` counts for a step, where it has

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def generator(self, seed: int = 0) -> torch.Generator:
        """Return a generator of its own: a failed graph capture may leave the default one unusable."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def random(self, generator: torch.Generator, *size: int) -> Tensor:
        """Return normal values on the device, which need a gradient."""
        return torch.randn(*size, device=self.device, dtype=self.dtype, generator=generator).requires_grad_()


def shape(setting: Setting, n: int, grouped: bool) -> tuple[int, int, int]:
    """Return batch, heads and KV heads: about 16k tokens, and fewer heads where one pass would take long."""
    if setting.tiny:
        return 1, 2, 1 if grouped else 2
    batch = max(1, 16384 // n)
    heads = 40 if n <= 16384 else 10
    return batch, heads, heads // 5 if grouped else heads


def inputs(setting: Setting, sizes: tuple[int, int, int], n: int, head_dim: int) -> list[Tensor]:
    """Return random q, k and v of `sizes` (batch, heads, KV heads)."""
    batch, heads, kv_heads = sizes
    generator = setting.generator()
    return [setting.random(generator, batch, h, n, head_dim) for h in (heads, kv_heads, kv_heads)]


def groups_of(x: Tensor, dense: bool) -> Tensor:
    """Return two groups of the keys of `x`: every key in one of them, or eight labels as in a prompt."""
    batch, n = x.shape[0], x.shape[2]
    if dense:
        return (torch.arange(n, device=x.device) % 2).to(torch.int8).expand(batch, n).contiguous()
    return label_groups(batch, n, x.device)


def tried(work: Callable[[], Row]) -> Row:
    """Return the row, or the reason for its absence: a competitor that cannot run is part of the comparison."""
    try:
        return work()
    except Exception as error:  # of memory, of a missing package, of a compiler
        lines = str(error).splitlines()
        return {"reason": f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
