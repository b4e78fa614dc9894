"""The optimizer steps of an objective: statistics of the micro-batches, gradients over processes, state, logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from abft.prompts.collation import Collator
from abft.training.config import ABFTConfig
from abft.training.objectives.objective import Objective

__all__ = ["HeadCountState"]


class HeadCountState(TrainerCallback, ExportableState):
    """Ends an objective's optimizer steps, and carries its state through the Trainer's checkpoints.

    A checkpoint keeps the state under the name of this class.

    Args:
        objective: of the run.
        args: options of the run.
        accelerator: accelerate's `Accelerator` of the trainer; reduces over the processes.
        collator: of the run. A resumed run takes passes of the size that it began with, whatever is free now: sums of
            other passes are rounded elsewhere.

    Attributes:
        logs: what the objective logs for the last step.
    """

    def __init__(self, objective: Objective, args: ABFTConfig, accelerator: Any, collator: Collator) -> None:
        self.objective, self.args, self.accelerator, self.collator = objective, args, accelerator, collator
        self.logs: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def empty(self) -> bool:
        """True if no micro-batch was added since the last step."""
        return not self._sums

    def add(self, per_sample: Tensor, statistics: dict[str, Tensor]) -> None:
        """Add a micro-batch to the step."""
        samples = torch.tensor(float(len(per_sample)), device=per_sample.device)
        for name, value in {"samples": samples, **statistics}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()

    def state(self) -> dict[str, dict[str, Any]]:
        size = {"tokens_per_batch": self.collator.tokens_per_batch}
        return {"args": {}, "attributes": self.objective.state_dict(), "passes": size}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.objective.load_state_dict(saved["attributes"])
            if self.args.tokens_per_batch == "auto" and "passes" in saved:
                self.collator.tokens_per_batch = saved["passes"]["tokens_per_batch"]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average restricted gradients over the processes: no data-parallel engine has seen them."""
        if not self.args.restricted_gradient or self.args.world_size == self.args.tensor_parallel_size:
            return
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.empty:
            return
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        self._sums = {}
        # Every process of a tensor-parallel group counts the same samples.
        samples = totals.pop("samples") / self.args.tensor_parallel_size
        self.logs = self.objective.end_step(totals, samples)
