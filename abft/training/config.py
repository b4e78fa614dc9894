"""The options of training: `transformers.TrainingArguments` with the paper's defaults, and ABFT's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from abft.losses import Adaption

__all__ = ["ABFTConfig", "Method"]

Method = Literal["abft", "e2e"]


@dataclass
class ABFTConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults, and ABFT's own options.

    Adam without weight decay or clipping at a constant rate, two epochs, gradients averaged over pseudo-batches of
    32 prompts.

    Args:
        method: `"abft"`, or `"e2e"`: cross-entropy of the gold label token at the last position.
        pseudo_batch_size: prompts whose gradients are averaged for one optimizer step, over all processes.
            Sets `gradient_accumulation_steps`.
        wrong_penalty: A, weight of the mass on wrong labels; its first value if it is adapted.
        correct_award: B, weight of the mass missing on correct labels.
        adaption: what steers A by the number of induction heads: `"PID"`, `"P"` or `"none"`.
        pid_proportional, pid_integral, pid_derivative: its factors Cp, Ci, Cd.
        head_filter: train induction heads only.
        per_head_mean: divide a prompt's loss by its number of induction heads.
        restricted_gradient: a head's loss trains its own layer's W_Q and W_K alone: hidden states carry no gradient.
            Each layer's gradient is taken and freed inside the forward pass, at about the memory of inference.
        packing: prompts of a batch one behind the other, without padding.
        tokens_per_batch: with `packing`, most tokens of one pass; a batch with more takes several.
        tensor_parallel_size: processes that share a model loaded with `tp_plan="auto"`; the others hold other prompts.
        offload_activations: keep what the backward pass needs in the CPU's memory (full gradients only).
        lora: train LoRA adapters on the q and k projections instead of W_Q and W_K themselves.
        lora_r, lora_alpha, lora_target_modules: of LoRA.
        learning_rate: None for the paper's 2e-5 (full) or 1e-4 (LoRA).

    Raises:
        ValueError: an option outside its range; the message names it.
    """

    method: Method = field(default="abft", metadata={"help": "abft, or e2e for the cross-entropy baseline"})
    pseudo_batch_size: int = field(default=32, metadata={"help": "prompts averaged for one optimizer step"})
    wrong_penalty: float = field(default=0.5, metadata={"help": "A: weight of the mass on wrong labels"})
    correct_award: float = field(default=1.0, metadata={"help": "B: weight of the mass missing on correct labels"})
    adaption: Adaption = field(default="PID", metadata={"help": "what steers A: PID, P or none"})
    pid_proportional: float = field(default=0.03, metadata={"help": "Cp"})
    pid_integral: float = field(default=0.005, metadata={"help": "Ci"})
    pid_derivative: float = field(default=0.005, metadata={"help": "Cd"})
    head_filter: bool = field(default=True, metadata={"help": "train induction heads only"})
    per_head_mean: bool = field(default=False, metadata={"help": "divide by the number of induction heads"})
    restricted_gradient: bool = field(
        default=False, metadata={"help": "a head's loss trains its own layer alone, at the memory of inference"}
    )
    packing: bool = field(default=False, metadata={"help": "pack prompts without padding"})
    tokens_per_batch: int | None = field(default=None, metadata={"help": "with packing, most tokens of one pass"})
    tensor_parallel_size: int = field(default=1, metadata={"help": "processes that split the model's heads"})
    offload_activations: bool = field(default=False, metadata={"help": "keep activations in the CPU's memory"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters on q and k instead of W_Q and W_K"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=32, metadata={"help": "alpha of LoRA"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "modules that LoRA adapts"})

    learning_rate: float | None = field(default=None, metadata={"help": "None: 2e-5 (full), 1e-4 (LoRA)"})  # type: ignore[assignment]
    num_train_epochs: float = 2
    per_device_train_batch_size: int = 8
    lr_scheduler_type: str = "constant"
    max_grad_norm: float = 0.0
    logging_steps: float = 1
    save_strategy: str = "epoch"
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser reads the order)

    def __post_init__(self) -> None:
        if self.method not in ("abft", "e2e"):
            raise ValueError(f"method must be 'abft' or 'e2e', got {self.method!r}")
        for name in ("wrong_penalty", "correct_award"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self._check_passes()
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.lora else 2e-5
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # no nn.DataParallel, which would change the pseudo-batch; use torchrun
        if self.pseudo_batch_size < 1 or self.per_device_train_batch_size < 1:
            raise ValueError(
                "pseudo_batch_size and per_device_train_batch_size must be at least 1, got "
                f"{self.pseudo_batch_size} and {self.per_device_train_batch_size}"
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size would change the pseudo-batch; use packing and tokens_per_batch")
        if self.restore_callback_states_from_checkpoint:
            raise ValueError("A and its history are always restored; leave restore_callback_states_from_checkpoint off")
        if self.tensor_parallel_size < 1 or self.world_size % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} does not divide the {self.world_size} processes"
            )
        replicas = self.world_size // self.tensor_parallel_size
        prompts_at_once = self.per_device_train_batch_size * replicas
        if self.pseudo_batch_size % prompts_at_once:
            raise ValueError(
                f"pseudo_batch_size={self.pseudo_batch_size} is no multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × {replicas} processes; choose a batch size that divides it"
            )
        steps = self.pseudo_batch_size // prompts_at_once
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts pseudo_batch_size="
                f"{self.pseudo_batch_size}, which sets it to {steps}; give pseudo_batch_size alone"
            )
        self.gradient_accumulation_steps = steps

    def _check_passes(self) -> None:
        if self.tokens_per_batch is not None and (not self.packing or self.tokens_per_batch < 1):
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} limits packed prompts: it needs packing=True, and 1 or more"
            )
        if not self.restricted_gradient:
            return
        if self.method != "abft":
            raise ValueError("restricted_gradient is ABFT's; method='e2e' has a loss at the last layer only")
        for name in ("per_head_mean", "gradient_checkpointing", "offload_activations", "fp16", "torch_compile"):
            if getattr(self, name):
                raise ValueError(
                    "restricted_gradient takes each layer's gradient inside the forward pass and keeps no "
                    f"activations; {name}=True does not go with it"
                )
