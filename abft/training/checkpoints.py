"""Checkpoints of a run: which one to resume from, and the options that are recorded beside the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from abft.models.weights import read_config
from abft.training.config import ABFTConfig

__all__ = ["check_method", "last_complete_checkpoint", "recorded_options"]

_RECORDED = (
    "method", "pseudo_batch_size", "wrong_penalty", "correct_award", "adaption", "pid_proportional", "pid_integral",
    "pid_derivative", "pid_relative", "unmatched_weight", "mass_award", "mass_floor", "head_filter", "per_head_mean",
    "learning_rate", "num_train_epochs", "seed",
)  # fmt: skip


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that was written to its end, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint without it was cut off.
    """
    checkpoints = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rsplit("-", 1)[1].isdigit() and (path / TRAINER_STATE_NAME).is_file()
    ]
    return str(max(checkpoints)[1]) if checkpoints else None


def recorded_options(args: ABFTConfig) -> dict[str, Any]:
    """Return the options that `abft_config.json` holds."""
    options = asdict(args)
    return {name: options[name] for name in _RECORDED}


def check_method(checkpoint: str | Path, method: str) -> None:
    """Raise ValueError if the checkpoint is of a run with another method."""
    found = read_config(checkpoint).get("method")
    if found != method:
        raise ValueError(
            f"{checkpoint} is of a run with method={found!r}, this one has {method!r}; give it an output_dir of its own"
        )
