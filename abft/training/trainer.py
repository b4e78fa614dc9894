"""`ABFTTrainer`, a `transformers.Trainer`: logging, resume, callbacks and distributed launch are its.

    trainer = ABFTTrainer(model, ABFTConfig(output_dir="run"), prompts)
    trainer.train()
    trainer.save_model()

It takes prompts or other attention targets (`abft.prompts.targets`). It minimizes the objective of `ABFTConfig.method`
(`abft.training.objectives`).

Source: arXiv 2505.14233, sections 3 and 4 for the loss and the defaults.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from abft.evaluation.classification import evaluate
from abft.models.attention import enable
from abft.models.mixed_precision import float32_masters
from abft.models.projections import TrainedParameter, lora_qk, train_parameters
from abft.models.weights import load_trained, save_trained, whole_state_dict
from abft.prompts.collation import Collator, padding_id
from abft.training.checkpoints import check_method, recorded_options
from abft.training.checks import (
    Samples,
    check_decay,
    check_engine,
    check_lengths,
    out_of_memory_advice,
)
from abft.training.collapse import StopOnCollapse
from abft.training.config import ABFTConfig
from abft.training.objectives.objective import Objective
from abft.training.objectives.objective_registry import objective_of
from abft.training.pass_tokens import can_pack, tokens_per_pass
from abft.training.steps import HeadCountState

__all__ = ["ABFTTrainer"]


class ABFTTrainer(Trainer):
    """Trains W_Q and W_K with the attention loss, or end to end, on in-context-learning prompts or attention targets.

    Args:
        model: a causal decoder of transformers; switched to the `"abft"` attention, its other parameters frozen (and
            wrapped by PEFT if `args.lora`: use `trainer.model` afterwards).
        args: options.
        train_dataset: prompts or other attention targets (:class:`abft.AttentionTarget`).
        eval_dataset: what :meth:`evaluate` reports on, prompts or targets as above.
        kwargs: handed to `transformers.Trainer` (callbacks, optimizers, …).

    Attributes:
        objective: computes the loss of `args.method`, and holds its state.
        trained: what the objective trains: W_Q and W_K, the LM head too, or all parameters; empty with LoRA.
        checkpoint_seconds: time that saving checkpoints took so far, which `train_runtime` includes.

    Raises:
        ValueError: no prompts; targets without `label_id` for `method="e2e"`; weight decay on a fused projection, which
            would move v.
        NotImplementedError: a model that cannot take the attention (see :func:`abft.models.attention.enable`).
    """

    args: ABFTConfig
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        args: ABFTConfig,
        train_dataset: Samples,
        eval_dataset: Samples | None = None,
        **kwargs: Any,
    ) -> None:
        if not len(train_dataset):
            raise ValueError("train_dataset is empty; pass the prompts to train on")
        self.objective = objective_of(args.method)(args)
        self.objective.check_samples(train_dataset)
        check_lengths(model, args, train_dataset)
        enable(model)
        self.trained: list[TrainedParameter] = []
        self.checkpoint_seconds = 0.0
        if args.lora:
            model = lora_qk(  # type: ignore[assignment]
                model,
                r=args.lora_r,
                alpha=args.lora_alpha,
                target_modules=args.lora_target_modules,
                head=self.objective.trains == "qk_head",
            )
        else:
            self.trained = train_parameters(model, self.objective.trains)
            check_decay(args, self.trained)
            float32_masters(model, self.trained, args.device)
        pad_token_id = padding_id(train_dataset, model.config.get_text_config())
        collator = Collator(pad_token_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            **kwargs,
        )
        check_engine(self, self.objective, self.trained)
        self._size_passes(collator, train_dataset)
        # The loss below is already a share of the pseudo-batch's mean; Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.steps = HeadCountState(self.objective, args, self.accelerator, collator)
        self.add_callback(self.steps)
        if args.stop_on_collapse:
            self.add_callback(StopOnCollapse(self.objective))

    def _size_passes(self, collator: Collator, samples: Samples) -> None:
        """Set the layout and the size of the passes, the same in all processes."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        # FSDP and ZeRO communicate in every pass: each process must take as many.
        in_step = self.is_fsdp_enabled or self.is_deepspeed_enabled
        collator.packing = (can_pack(model) and not in_step) if args.packing is None else args.packing
        limit = args.tokens_per_batch
        if limit == "auto":
            limit = None if in_step else tokens_per_pass(model, args, samples, args.device)
            if limit is not None and args.world_size > 1:
                limit = int(self.accelerator.gather(torch.tensor([limit], device=args.device)).min())
        assert not isinstance(limit, str)
        collator.tokens_per_batch = limit

    # --- loss ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of one optimizer step, and the number of prompts in them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor(
            sum(len(part["labels"]) for batch in batches for part in batch.get("parts", [batch])), device=device
        )
        return batches, self.accelerator.gather(prompts).sum() if self.args.world_size > 1 else prompts

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a batch, part by part if its tokens are over the budget."""
        parts = inputs.get("parts", [inputs])
        losses = []
        for number, part in enumerate(parts, 1):
            try:
                with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part, num_items_in_batch))
            except torch.OutOfMemoryError as error:
                message = out_of_memory_advice(error, part, self.args, self.objective)
                raise torch.OutOfMemoryError(message) from error
        # Each process of a tensor-parallel group holds the loss of its own heads; what is logged is the mean of all.
        return torch.stack(losses).sum() * (self.args.tensor_parallel_size if self.objective.heads_apart else 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch: its prompts' sum over the prompts of the whole pseudo-batch."""
        # Data-parallel engines average gradients over the processes; the pseudo-batch spans them all.
        count = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        share = (1 if num_items_in_batch is None else self.args.world_size) / count
        offload = self.args.offload_activations
        saved = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext()
        with self.accelerator.autocast(), saved:
            if self.args.restricted_gradient and model.training:
                # No engine wraps this pass: there is no backward pass after it that it could wait for.
                outputs = self.objective.restricted_outputs(self.accelerator.unwrap_model(model), inputs, share)
            else:
                outputs = self.objective.outputs(model, inputs)
        per_sample, statistics = self.objective.losses(outputs, inputs)
        if model.training:
            self.steps.add(per_sample, statistics)
        loss = per_sample.sum() * share
        if not loss.requires_grad and model.training:
            loss.requires_grad_()  # its gradient has been taken; the Trainer's own backward pass finds nothing to do
        return (loss, outputs) if return_outputs else loss

    # --- logs, evaluation ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the objective's figures of the last step beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self.steps.logs}
        super().log(logs, *args, **kwargs)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Samples | None = None,
        ignore_keys: Iterable[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the current model on `eval_dataset`.

        Returns:
            Of prompts in-context accuracy, macro-F1, likelihood and ECE; of targets next-token accuracy and masses
            (:class:`abft.evaluation.retrieval.TargetEvaluation`).

        Raises:
            ValueError: there is nothing to evaluate on.
        """
        samples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise ValueError("no eval_dataset: pass the prompts to evaluate on")
        model: Any = self.model
        batch_size, progress = self.args.per_device_eval_batch_size, not self.args.disable_tqdm
        result = evaluate(model, samples, batch_size=batch_size, progress=progress)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.to_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def trained_parameters(self) -> int:
        """Return the number of entries that training moves: of fused projections those of q and k alone."""
        model = self.accelerator.unwrap_model(self.model)
        if self.trained:
            return sum(item.view(model.get_parameter(item.name)).numel() for item in self.trained)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    # --- saving -------------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.checkpoint_seconds += time.perf_counter() - started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.trained:
            super()._save(output_dir, state_dict)
            return
        model = self.accelerator.unwrap_model(self.model)
        state_dict = whole_state_dict(model, self.trained, state_dict)
        if self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            save_trained(model, self.trained, folder, state_dict, **recorded_options(self.args))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.trained or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_method(resume_from_checkpoint, self.args.method)
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
