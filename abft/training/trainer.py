"""ABFT and its E2E baseline as a `transformers.Trainer`: logging, resume, callbacks and distributed launch are its.

    trainer = ABFTTrainer(model, ABFTConfig(output_dir="run"), prompts)
    trainer.train()
    trainer.save_model()

It takes prompts or other attention targets (`abft.prompts.targets`).

Source: arXiv 2505.14233, sections 3 and 4 for the loss and the defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from abft.evaluation.classification import evaluate
from abft.losses import ABFTLoss, HeadCountController, abft_loss
from abft.models.attention import enable
from abft.models.masses import forward, layer_masses
from abft.models.projections import TrainedParameter, lora_qk, train_qk
from abft.models.weights import load_trained, read_config, save_trained, whole_state_dict
from abft.prompts.builder import PromptBuilder, PromptSet
from abft.prompts.collation import MASS_INPUTS, MODEL_INPUTS, Collator, padding_id
from abft.prompts.targets import AttentionTarget
from abft.training.config import ABFTConfig

__all__ = ["ABFTConfig", "ABFTTrainer", "last_complete_checkpoint"]

_Samples: TypeAlias = Sequence[AttentionTarget]


class HeadCountState(TrainerCallback, ExportableState):
    """Ends ABFT's optimizer steps, and carries the controller's state through the Trainer's checkpoints."""

    def __init__(
        self, controller: HeadCountController | None = None, finish_step: Any = None, reduce_gradients: Any = None
    ) -> None:
        self.controller = controller or HeadCountController()
        self.finish_step, self.reduce_gradients = finish_step, reduce_gradients

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": self.controller.state_dict()}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.controller.load_state_dict(saved["attributes"])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.reduce_gradients()

    def on_step_end(self, args, state, control, **kwargs):
        self.finish_step()


class ABFTTrainer(Trainer):
    """Trains W_Q and W_K with the attention loss, or end to end, on in-context-learning prompts or attention targets.

    Args:
        model: a causal decoder of transformers; switched to the `"abft"` attention, its other parameters frozen (and
            wrapped by PEFT if `args.lora`: use `trainer.model` afterwards).
        args: options.
        train_dataset: prompts or other attention targets (:class:`abft.AttentionTarget`).
        builder: not needed: a set of prompts knows its builder.
        eval_dataset: what :meth:`evaluate` reports on, prompts or targets as above.
        kwargs: handed to `transformers.Trainer` (callbacks, optimizers, …).

    Raises:
        TypeError: a builder with samples that are not prompts.
        ValueError: no prompts; targets without `label_id` for `method="e2e"`; weight decay on a fused projection, which
            would move v.
        NotImplementedError: a model that cannot take the attention (see :func:`abft.models.attention.enable`).
    """

    args: ABFTConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: ABFTConfig,
        train_dataset: _Samples,
        builder: PromptBuilder | None = None,
        eval_dataset: _Samples | None = None,
        **kwargs: Any,
    ) -> None:
        if not len(train_dataset):
            raise ValueError("train_dataset is empty; pass the prompts to train on")
        if builder is not None:
            train_dataset = PromptSet(builder, train_dataset)  # type: ignore[arg-type]
            eval_dataset = eval_dataset and PromptSet(builder, eval_dataset)  # type: ignore[arg-type]
        _check_labels(train_dataset, args.method)
        _check_lengths(model, args, train_dataset)
        enable(model)
        self.trained: list[TrainedParameter] = []
        if args.lora:
            model = lora_qk(model, r=args.lora_r, alpha=args.lora_alpha, target_modules=args.lora_target_modules)  # type: ignore[assignment]
        else:
            self.trained = train_qk(model)
            if args.weight_decay and any(item.fused for item in self.trained):
                raise ValueError(
                    f"weight_decay={args.weight_decay} would move the value part of {self.trained[0].name}; "
                    "set it to 0, or train with LoRA"
                )
            if half := [dtype for dtype in _dtypes(model, self.trained) if dtype.itemsize < 4]:
                warnings.warn(
                    f"W_Q and W_K are in {half[0]}, which rounds most updates of learning_rate={args.learning_rate:g} "
                    "away. Load the model with dtype=torch.float32 and set bf16=True for speed, or use lora=True",
                    stacklevel=2,
                )
        self.controller = HeadCountController(
            args.wrong_penalty, args.adaption, args.pid_proportional, args.pid_integral, args.pid_derivative
        )
        self._step_sums: dict[str, Tensor] = {}
        self._step_logs: dict[str, float] = {}
        self._warned_collapse = False
        collator = Collator(
            padding_id(train_dataset, model.config.get_text_config()), packing=args.packing,
            tokens_per_batch=args.tokens_per_batch,
        )  # fmt: skip
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=collator,
            **kwargs,
        )  # fmt: skip
        self._check_engine()
        # The loss below is already a share of the pseudo-batch's mean; Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.add_callback(HeadCountState(self.controller, self._finish_step, self._reduce_gradients))

    def _check_engine(self) -> None:
        """What an engine that splits parameters can train."""
        if self.get_tp_size() != self.args.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.args.tensor_parallel_size}, but the model is split over "
                f'{self.get_tp_size()} processes; load it with tp_plan="auto" under torchrun'
            )
        if self.args.tensor_parallel_size > 1:
            apart = self.args.world_size > self.args.tensor_parallel_size
            for what, given in (
                ("per_head_mean", self.args.per_head_mean), ("lora", self.args.lora),
                ("restricted_gradient and data parallelism", self.args.restricted_gradient and apart),
                ("fused projections", any(item.fused for item in self.trained)),
            ):  # fmt: skip
                if given:
                    raise NotImplementedError(f"tensor parallelism does not serve {what}; use data parallelism")
        version = getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", None)
        if self.is_fsdp_enabled and version != 2:
            raise NotImplementedError('FSDP 1 is not served; use FSDP 2 (fsdp_config={"version": 2})')
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.trained and (self.is_deepspeed_enabled or (split and any(item.fused for item in self.trained))):
            raise NotImplementedError(
                f"{'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'} splits W_Q and W_K, which training them in "
                f"full does not serve{'' if self.is_deepspeed_enabled else ' where they are fused with W_V'}; use "
                "lora=True, or plain data parallelism (torchrun)"
            )
        if self.is_fsdp_enabled and self.args.tokens_per_batch is not None:
            raise NotImplementedError(
                "with tokens_per_batch processes take different numbers of passes, for which FSDP would wait for ever; "
                "set per_device_train_batch_size instead"
            )
        if split and self.args.restricted_gradient:
            raise NotImplementedError(
                "restricted_gradient takes gradients inside the forward pass, where FSDP and DeepSpeed have none of "
                "their own; use plain data parallelism (torchrun): this mode needs the memory of inference only"
            )

    # --- loss ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step, and the number of prompts in all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor(
            sum(len(part["labels"]) for batch in batches for part in batch.get("parts", [batch])), device=device
        )
        return batches, self.accelerator.gather(prompts).sum() if self.args.world_size > 1 else prompts

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a batch; one whose tokens are over the budget goes part by part."""
        parts = inputs.get("parts", [inputs])
        losses = []
        for number, part in enumerate(parts, 1):
            try:
                with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part, num_items_in_batch))
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(_out_of_memory(error, part, self.args)) from error
        # Each process of a tensor-parallel group holds the loss of its own heads; what is logged is the mean of all.
        heads_apart = self.args.tensor_parallel_size if self.args.method == "abft" else 1
        return torch.stack(losses).sum() * heads_apart

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch: its prompts' sum over the prompts of the whole pseudo-batch."""
        # Data-parallel engines average gradients over the processes; the pseudo-batch spans them all.
        count = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        share = (1 if num_items_in_batch is None else self.args.world_size) / count
        if self.args.method == "abft":
            per_prompt, outputs = self._abft_per_prompt(model, inputs, share)
        else:
            per_prompt, outputs = self._e2e_per_prompt(model, inputs)
        loss = per_prompt.sum() * share
        if not loss.requires_grad and model.training:
            loss.requires_grad_()  # its gradient has been taken; the Trainer's own backward pass finds nothing to do
        return (loss, outputs) if return_outputs else loss

    def _loss_of(self, masses: Sequence[Tensor], inputs: dict[str, Tensor]) -> ABFTLoss:
        return abft_loss(
            masses, inputs["correct_demonstrations"], inputs["demonstrations"], inputs["prompt_lengths"],
            wrong_penalty=self.controller.wrong_penalty, correct_award=self.args.correct_award,
            head_filter=self.args.head_filter, per_head_mean=self.args.per_head_mean,
            row_weights=inputs.get("row_weights"),
        )  # fmt: skip

    def _abft_per_prompt(
        self, model: nn.Module, inputs: dict[str, Tensor], share: Tensor | float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses `(B,)` and masses; with restricted gradients those of `share` times the losses' sum are taken here."""
        passed: dict[str, Any] = {name: inputs[name] for name in MASS_INPUTS if name in inputs}
        if self.args.restricted_gradient and model.training:

            def backward(mass: Tensor) -> Tensor:
                loss = self._loss_of([mass], inputs).per_prompt.sum() * share
                with torch.autocast(mass.device.type, enabled=False):
                    loss.backward()
                return mass.detach()

            # No engine wraps this pass: there is no backward pass behind it that it could wait for.
            inner = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():
                masses = layer_masses(inner, **passed, detach=True, on_mass=backward)
        else:
            offload = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
            with self.accelerator.autocast(), offload if self.args.offload_activations else nullcontext():
                masses = layer_masses(model, **passed)
        result = self._loss_of(masses, inputs)
        counts = result.head_counts.sum().to(torch.float32)
        sums = {
            "prompts": torch.tensor(float(len(result.per_prompt)), device=counts.device),
            "heads": counts,
            "mass_correct": torch.nan_to_num(result.mass_correct) * counts,
            "mass_wrong": torch.nan_to_num(result.mass_wrong) * counts,
        }
        for name, value in sums.items() if model.training else ():
            self._step_sums[name] = self._step_sums.get(name, torch.zeros_like(value)) + value.detach()
        return result.per_prompt, masses

    def _reduce_gradients(self) -> None:
        """Restricted gradients arise outside of any data-parallel engine: their mean over the processes."""
        if not self.args.restricted_gradient or self.args.world_size == self.args.tensor_parallel_size:
            return
        for parameter in self.model.parameters():  # type: ignore[union-attr]
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _e2e_per_prompt(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        last = inputs["query_positions"][:, -1]
        wanted, column = last.unique(return_inverse=True)
        passed = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        outputs = forward(model, **passed, logits_to_keep=wanted)
        # A model without logits_to_keep gives the logits of every position.
        kept = column if outputs.logits.shape[1] == len(wanted) else last
        rows = torch.arange(len(last), device=last.device)
        logits = outputs.logits[torch.zeros_like(rows) if "cu_seqlens" in inputs else rows, kept]
        return F.cross_entropy(logits.float(), inputs["label_ids"], reduction="none"), outputs

    # --- steps, logs --------------------------------------------------------------------------------------

    def _finish_step(self) -> None:
        """After an optimizer step: head counts over all processes, the next A, the log line."""
        if not self._step_sums:
            return
        names = list(self._step_sums)
        sums = torch.stack([self._step_sums[name] for name in names])
        totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        self._step_sums = {}
        used_penalty = self.controller.wrong_penalty
        head_count = totals["heads"] / (totals["prompts"] / self.args.tensor_parallel_size)
        self.controller.update(head_count)
        heads = max(totals["heads"], 1.0)
        self._step_logs = {
            "induction_heads": head_count,
            "wrong_penalty": used_penalty,
            "mass_correct": totals["mass_correct"] / heads,
            "mass_wrong": totals["mass_wrong"] / heads,
        }
        if self.controller.collapsed and not self._warned_collapse:
            self._warned_collapse = True
            first = self.controller.head_counts[0]
            warnings.warn(
                f"step {len(self.controller.head_counts)}: induction heads per prompt fell from {first:.2f} to "
                f"{head_count:.2f}; attention is collapsing. Lower the learning rate (now {self.args.learning_rate:g})"
                if first
                else "no head passes the induction-head filter, so nothing is trained: this model does not "
                "look at label tokens, or at the keys of targets. Use a larger model, more demonstrations, or "
                "head_filter=False",
                stacklevel=2,
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._step_logs}
        super().log(logs, *args, **kwargs)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: _Samples | None = None,
        ignore_keys: Iterable[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The current model on `eval_dataset`: in-context accuracy, macro-F1, likelihood and ECE of prompts; of targets
        next-token accuracy and masses (:class:`abft.evaluation.retrieval.TargetEvaluation`)."""
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

    # --- saving -------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.trained:
            super()._save(output_dir, state_dict)
            return
        state_dict = whole_state_dict(self.accelerator.unwrap_model(self.model), self.trained, state_dict)
        if self.args.should_save:
            options = {key: value for key, value in asdict(self.args).items() if key in _RECORDED}
            model = self.accelerator.unwrap_model(self.model)
            save_trained(model, self.trained, output_dir or str(self.args.output_dir), state_dict, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.trained or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        method = read_config(resume_from_checkpoint).get("method")
        if method != self.args.method:
            raise ValueError(
                f"{resume_from_checkpoint} is of a run with method={method!r}, this one has {self.args.method!r}; give "
                "it an output_dir of its own"
            )
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _out_of_memory(error: BaseException, inputs: dict[str, Tensor], args: ABFTConfig) -> str:
    """What did not fit, and the options that would save most, first those that change no result."""
    prompts, tokens = len(inputs["labels"]), inputs["input_ids"].numel()
    advice = []
    if prompts > 1:
        advice.append("packing=True with tokens_per_batch below that" if args.packing else "packing=True, or "
                      f"per_device_train_batch_size below {args.per_device_train_batch_size}")  # fmt: skip
    if not args.restricted_gradient and not args.gradient_checkpointing:
        advice.append("gradient_checkpointing=True")
    if args.method == "abft" and not args.restricted_gradient:
        advice.append("restricted_gradient=True")
    advice.append("more GPUs (FSDP or tensor parallelism), or a 4-bit base with lora=True")
    return (
        f"out of memory in a pass of {prompts} prompts and {tokens} tokens. In this order: {'; '.join(advice)}. "
        f"`abft plan` says beforehand what fits. ({str(error).splitlines()[0]})"
    )


def _check_labels(samples: _Samples, method: str) -> None:
    """Raise ValueError if a sample to be trained end to end does not say which token should follow."""
    if method == "e2e":
        for index, sample in enumerate(samples):
            if sample.label_id is None:
                raise ValueError(f"target {index} has no label_id, the token that method='e2e' trains; give it one")


def _check_lengths(model: PreTrainedModel, args: ABFTConfig, prompts: _Samples) -> None:
    """No prompt may be longer than the model's context or the budget of a pass."""
    longest = max(prompt.length for prompt in prompts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens, the model's context {context}; lower k, or take shorter texts"
        )
    if args.tokens_per_batch is not None and longest > args.tokens_per_batch:
        raise ValueError(
            f"the longest prompt has {longest} tokens, over tokens_per_batch={args.tokens_per_batch}; raise it"
        )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint without it was cut off.
    """
    checkpoints = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rsplit("-", 1)[1].isdigit() and (path / TRAINER_STATE_NAME).is_file()
    ]
    return str(max(checkpoints)[1]) if checkpoints else None


_RECORDED = (
    "method", "pseudo_batch_size", "wrong_penalty", "correct_award", "adaption", "pid_proportional", "pid_integral",
    "pid_derivative", "head_filter", "per_head_mean", "learning_rate", "num_train_epochs", "seed",
)  # fmt: skip


def _dtypes(model: nn.Module, trained: list[TrainedParameter]) -> list[torch.dtype]:
    parameters = dict(model.named_parameters())
    return [parameters[item.name].dtype for item in trained]
