"""One training run from its samples to its weights, resumed where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from abft.training.checkpoints import last_complete_checkpoint
from abft.training.checks import Samples
from abft.training.config import ABFTConfig
from abft.training.progress import TrainingProgress
from abft.training.trainer import ABFTTrainer

__all__ = ["FinishedTraining", "fit"]


@dataclass(frozen=True)
class FinishedTraining:
    """A training run that has ended.

    Args:
        trainer: holds the trained model (`trainer.model`).
        checkpoint: folder that the run was resumed from; None if it started anew.
    """

    trainer: ABFTTrainer
    checkpoint: str | None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Log entries of the optimizer steps, those before a resume included."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def seconds(self) -> float:
        """Run time of this process, without what it resumed and without saving checkpoints."""
        log = self.trainer.state.log_history
        whole = next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry)
        return whole - self.trainer.checkpoint_seconds


def fit(
    model: PreTrainedModel,
    config: ABFTConfig,
    samples: Samples,
    *,
    label: str | None = None,
    progress: bool = True,
    save_to: str | Path | None = None,
    on_resume: Callable[[str], object] | None = None,
) -> FinishedTraining:
    """Train, from the last complete checkpoint in `config.output_dir` if there is one, with one line of progress.

    Args:
        model, config, samples: as for :class:`abft.ABFTTrainer`.
        label: what the progress bar names; None for the method.
        progress: show the progress bar.
        save_to: folder of the weights; None leaves saving to the caller (`trainer.save_model()`).
        on_resume: called with the checkpoint's folder before a resumed run goes on.

    Raises:
        TypeError, ValueError, NotImplementedError: as :class:`abft.ABFTTrainer`.
    """
    bar = TrainingProgress(label or config.method.upper(), enabled=progress)
    trainer = ABFTTrainer(model, config, samples, callbacks=[bar])
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    checkpoint = last_complete_checkpoint(str(config.output_dir))
    if checkpoint is not None and on_resume is not None:
        on_resume(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if save_to is not None:
        trainer.save_model(str(save_to))
    return FinishedTraining(trainer, checkpoint)
