"""The interface between a loss and the trainer, and its two kinds: losses on masses and losses on logits.

An objective says what it needs of the model (`outputs`), what a batch costs (`losses`), and what it logs and adapts
after an optimizer step (`end_step`). Batches, devices, accumulation, checkpoints and processes are the trainer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from abft.models.masses import forward, layer_masses
from abft.models.projections import Scope
from abft.prompts.collation import MASS_INPUTS, MODEL_INPUTS
from abft.training.options import TrainingOptions

__all__ = ["LogitObjective", "MassObjective", "Objective", "SampleLosses"]

Batch = Mapping[str, Any]


class SampleLosses(NamedTuple):
    """The losses of a batch, and the statistics that are logged."""

    per_sample: Tensor  # (B,), with gradient: sums of it over micro-batches average exactly
    statistics: dict[str, Tensor]  # scalars without gradient; the trainer sums them over an optimizer step


class Objective(ABC):
    """A loss that :class:`abft.ABFTTrainer` minimizes; one object per training run, which may hold state.

    Args:
        options: checked by :meth:`check_options`.

    Attributes:
        name: the value of `--method`.
        description: one phrase for the help of `--method`.
        restrictable: the loss is a sum over layers, so that each layer's gradient can be taken inside the forward pass
            (`restricted_gradient`).
        heads_apart: the loss is a sum over heads, of which each process of a tensor-parallel group has its own.
        trains: the parameters that are trained.
        sample_needs: attributes of a sample that must not be None.
        ignores: options that have no effect on it; any other value than their default is refused.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    restrictable: ClassVar[bool] = False
    heads_apart: ClassVar[bool] = False
    trains: ClassVar[Scope] = "qk"
    sample_needs: ClassVar[tuple[str, ...]] = ()
    ignores: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options

    @classmethod
    def plan_modes(cls) -> dict[str, bool]:
        """Return the modes of `abft plan` and whether their gradients are restricted."""
        return {cls.name: False, **({f"{cls.name}_restricted": True} if cls.restrictable else {})}

    @classmethod
    def check_options(cls, options: TrainingOptions) -> None:
        """Raise ValueError if an option is out of its range, or contradicts or does not concern this objective."""
        for option in fields(TrainingOptions):
            if option.name in cls.ignores and getattr(options, option.name) != option.default:
                raise ValueError(
                    f"{option.name}={getattr(options, option.name)} has no effect with method={cls.name!r}; leave it "
                    f"at {option.default}, or choose another method"
                )
        if cls.trains == "model" and options.lora:
            raise ValueError(f"method={cls.name!r} trains the whole model, not adapters; leave lora off")
        if not options.restricted_gradient:
            return
        if not cls.restrictable:
            raise ValueError(
                f"restricted_gradient needs a loss in every layer; method={cls.name!r} has a loss at the last layer "
                "only. Leave restricted_gradient off"
            )
        if names := cls.mixing(options):
            raise ValueError(
                "restricted_gradient takes each layer's gradient before it knows the other layers' masses; "
                f"{names[0]}=True does not go with it"
            )

    @classmethod
    def mixing(cls, options: TrainingOptions) -> tuple[str, ...]:
        """Return the options, switched on, under which the loss is no sum over layers and heads."""
        return ()

    def check_samples(self, samples: Sequence[Any]) -> None:
        """Raise ValueError for the first sample that lacks what the loss needs."""
        for index, sample in enumerate(samples):
            for name in self.sample_needs:
                if getattr(sample, name, True) is None:
                    raise ValueError(f"target {index} has no {name}, which method={self.name!r} trains; give it one")

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Return what the loss is computed from, with gradient: one forward pass of the model."""

    def restricted_outputs(self, model: nn.Module, batch: Batch, share: Tensor | float) -> Any:
        """Return the outputs without gradient, after each layer's gradient of `share` times its loss was taken.

        Args:
            model: without the wrapper of an engine, which would wait for a backward pass.
            batch: one micro-batch.
            share: factor that makes the sum over the samples a part of the pseudo-batch's mean.
        """
        raise NotImplementedError(f"{type(self).__name__} has no restricted gradients")

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> SampleLosses:
        """Compute the loss of each sample."""

    def end_step(self, sums: Mapping[str, float], samples: float) -> dict[str, float]:
        """Return what is logged for an optimizer step, and adapt what the next one uses.

        Args:
            sums: the statistics of :meth:`losses`, summed over all micro-batches and processes.
            samples: samples of the step.
        """
        return {}

    @property
    def collapsed(self) -> bool:
        """True if training has destroyed what the loss acts on, so that further steps do harm."""
        return False

    @property
    def healthy(self) -> bool:
        """True if the weights of the last step are worth going back to after a collapse."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        return None

    @classmethod
    @abstractmethod
    def trial_step(cls, model: nn.Module, tokens: int, restricted: bool) -> Any:
        """Run a step on one sample of `tokens` tokens with a stand-in loss, for `abft plan` to count its memory.

        What is returned stays alive until the count ends.
        """


class MassObjective(Objective):
    """A loss on the attention masses of every layer; a subclass computes :meth:`losses` from them.

    `outputs` are one mass `(B, H, R, 2)` per layer, on correct and wrong keys. The loss must be a sum over layers and
    heads, except under the options that :meth:`mixing` names: a process may see its own heads alone, and restricted
    gradients pass one layer at a time.
    """

    restrictable = True
    heads_apart = True

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        return layer_masses(model, **_entries(batch, MASS_INPUTS))

    def restricted_outputs(self, model: nn.Module, batch: Batch, share: Tensor | float) -> tuple[Tensor, ...]:
        def backward(mass: Tensor) -> Tensor:
            loss = self.losses([mass], batch).per_sample.sum() * share
            with torch.autocast(mass.device.type, enabled=False):
                loss.backward()
            return mass.detach()

        return layer_masses(model, **_entries(batch, MASS_INPUTS), detach=True, on_mass=backward)

    @abstractmethod
    def losses(self, outputs: Sequence[Tensor], batch: Batch) -> SampleLosses:
        """Compute the loss of each sample from its masses, one tensor `(B, H, R, 2)` per layer."""

    @classmethod
    def trial_step(cls, model: nn.Module, tokens: int, restricted: bool) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        inputs: dict[str, Any] = {"key_groups": ids, "query_positions": torch.full((1, 1), tokens - 1)}

        def backward(mass: Tensor) -> Tensor:
            mass.sum().backward()
            return mass.detach()

        if restricted:
            return layer_masses(model, input_ids=ids, **inputs, detach=True, on_mass=backward)
        return torch.stack([mass.sum() for mass in layer_masses(model, input_ids=ids, **inputs)]).sum().backward()


class LogitObjective(Objective):
    """A loss on the logits of each sample's last row; a subclass computes :meth:`losses` from `(B, V)` logits."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        last = batch["query_positions"][:, -1]
        if last.device.type == "cpu":
            wanted, column = last.unique(return_inverse=True)
        else:  # `unique` would wait for the GPU; a repeated position costs a row of logits
            wanted, column = last, torch.arange(len(last), device=last.device)
        logits = forward(model, **_entries(batch, MODEL_INPUTS), logits_to_keep=wanted).logits
        # A model without logits_to_keep gives the logits of every position.
        kept = column if logits.shape[1] == len(wanted) else last
        rows = torch.arange(len(last), device=last.device)
        return logits[torch.zeros_like(rows) if "cu_seqlens" in batch else rows, kept]

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch) -> SampleLosses:
        """Compute the loss of each sample from the logits `(B, V)` after its last token."""

    @classmethod
    def trial_step(cls, model: nn.Module, tokens: int, restricted: bool) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return forward(model, input_ids=ids, logits_to_keep=1).logits.float().sum().backward()


def _entries(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    return {name: batch[name] for name in names if name in batch}
