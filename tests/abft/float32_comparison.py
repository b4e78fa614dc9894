"""A comparison of mixed precision with float32 on one model: losses of each step, and directions of the updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trainers import losses, trained
from transformers import PreTrainedModel

from abft.models.loading import load_base
from abft.models.projections import find_qk


def compare_with_float32(base: PreTrainedModel, prompts: Any, folder: Path, **options: Any) -> tuple[list, list, float]:
    """Train a bfloat16 model as it is, and a float32 copy of it.

    Returns:
        The losses of both runs, and the cosine of their updates of W_Q and W_K.
    """
    exact = type(base)(base.config).to(base.dtype)
    exact.load_state_dict(base.state_dict())
    exact = exact.float()
    names = [item.name for item in find_qk(base)]
    before = {name: base.get_parameter(name).detach().float().clone() for name in names}
    runs = [trained(model, prompts, None, folder / name, **options) for name, model in (("m", base), ("f", exact))]
    updates = [
        torch.cat([(run.model.get_parameter(name).detach() - before[name]).flatten() for name in names]) for run in runs
    ]
    return losses(runs[0]), losses(runs[1]), torch.cosine_similarity(*updates, dim=0).item()


def check_mixed_precision(model: str | Path, prompts: Sequence, folder: Path, rel: float, **options: Any) -> None:
    """Assert that the model of a folder trains in bfloat16 with float32 masters as it trains in float32."""
    base = load_base(str(model), dtype="bfloat16")
    mixed, exact, cosine = compare_with_float32(base, prompts, folder, **options)
    assert len(mixed) == len(exact)
    for a, b in zip(mixed, exact, strict=True):
        assert abs(a - b) <= rel * abs(b), (mixed, exact)
    assert mixed != exact
    assert cosine > 0.9, cosine
