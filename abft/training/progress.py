"""Training progress as one line: step, loss, induction heads, A."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["TrainingProgress"]


class TrainingProgress(TrainerCallback):
    """A progress bar that replaces the Trainer's log lines.

    Args:
        description: text before the bar.
        enabled: show the bar.
    """

    def __init__(self, description: str, enabled: bool = True) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            disable=not enabled,
            transient=True,
        )
        self.task = self.progress.add_task(description, figures="", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "induction_heads": "heads", "wrong_penalty": "A", "mass_award": "κ"}
        figures = [f"{short} {logs[name]:.3g}" for name, short in names.items() if name in (logs or {})]
        if figures:
            self.progress.update(self.task, figures="  ".join(figures))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
