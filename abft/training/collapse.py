"""End a training run whose induction heads vanish, with the weights from before."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from abft.training.objectives.objective import Objective

__all__ = ["StopOnCollapse"]


class StopOnCollapse(TrainerCallback):
    """Ends training when the objective has collapsed, and puts back the last trained weights that it found healthy.

    A step's head count is that of the weights before its update, so these are kept: two copies of the trained
    parameters in the CPU's memory. Until a step is healthy they are those of the beginning, or of a resumed checkpoint.

    Args:
        objective: of the run.

    Attributes:
        step: optimizer step after which the weights were as they would be put back.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.step = 0
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self._kept, self._before = (_copied(kwargs["model"]) for _ in range(2))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in _trained(kwargs["model"]).items():
            self._before[name].copy_(parameter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.objective.collapsed:
            for name, parameter in _trained(kwargs["model"]).items():
                parameter.copy_(self._kept[name])
            control.should_training_stop = True
            state.log_history.append({"step": state.global_step, "restored_step": self.step})
            warnings.warn(
                f"attention collapsed at step {state.global_step}: training ends with the weights after step "
                f"{self.step}. Lower the learning rate, or choose another loss",
                stacklevel=2,
            )
        elif self.objective.healthy:
            self.step = state.global_step - 1
            self._kept, self._before = self._before, self._kept


def _copied(model: Any) -> dict[str, Tensor]:
    return {name: parameter.to("cpu", copy=True) for name, parameter in _trained(model).items()}


def _trained(model: Any) -> dict[str, Tensor]:
    """Return this process's part of each trained parameter, without gradient."""
    return {
        name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
