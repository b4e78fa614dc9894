"""The options of training: `transformers.TrainingArguments` with the paper's defaults, and ABFT's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from abft.training.objectives.objective_registry import DEFAULT, OBJECTIVES, objective_of
from abft.training.options import TrainingOptions

__all__ = ["ABFTConfig"]

_METHODS = "; ".join(f"{name}: {objective.description}" for name, objective in OBJECTIVES.items())


def _token_limit(given: int | str | None) -> int | str | None:
    """Return a number, "auto" or None; the command line gives words."""
    if given is None or given in ("auto", "none"):
        return None if given == "none" else given
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"tokens_per_batch={given!r} must be a number of tokens from 1 on, 'auto', or None")
    return int(given)


@dataclass
class ABFTConfig(TrainingOptions, TrainingArguments):  # type: ignore[misc]  # learning_rate may be None at first
    """`transformers.TrainingArguments` with the paper's defaults, ABFT's own options, and those of `TrainingOptions`.

    Adam without weight decay or clipping at a constant rate, two epochs, gradients averaged over pseudo-batches of
    32 prompts, which set `gradient_accumulation_steps`.

    Args:
        method: name of the objective: `"abft"`; `"share"`; `"e2e"`, cross-entropy of the gold label token at the last
            position, on the LM head too; `"e2e_qk"`, the same without the head; or one that was registered
            (`abft.training.objectives.objective_registry`).
        tensor_parallel_size: processes that share a model loaded with `tp_plan="auto"`; the others hold other prompts.
        offload_activations: keep what the backward pass needs in the CPU's memory (full gradients only).
        lora_alpha, lora_target_modules: of LoRA.

    Raises:
        ValueError: an option outside its range; the message names it.
    """

    method: str = field(default=DEFAULT, metadata={"help": _METHODS, "choices": OBJECTIVES})
    tensor_parallel_size: int = field(default=1, metadata={"help": "processes that split the model's heads"})
    offload_activations: bool = field(default=False, metadata={"help": "keep activations in the CPU's memory"})
    lora_alpha: int = field(default=32, metadata={"help": "alpha of LoRA"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "modules that LoRA adapts"})

    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]  # None at first
        default=None, metadata={"help": "prompts at a time; None: all of a step, which tokens_per_batch divides"}
    )
    lr_scheduler_type: str = "constant"
    max_grad_norm: float = 0.0
    logging_steps: float = 1
    save_strategy: str = "epoch"
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser reads the order)

    def __post_init__(self) -> None:
        objective_of(self.method).check_options(self)
        self._check_passes()
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.lora else 2e-5
        all_at_once = self.per_device_train_batch_size is None
        if all_at_once:
            self.per_device_train_batch_size = 1  # until the number of processes is known
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            self.lr_scheduler_type = "constant_with_warmup"
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # no nn.DataParallel, which would change the pseudo-batch; use torchrun
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size would change the pseudo-batch; use packing and tokens_per_batch")
        if self.restore_callback_states_from_checkpoint:
            raise ValueError("A and its history are always restored; leave restore_callback_states_from_checkpoint off")
        if all_at_once:
            self.per_device_train_batch_size = self._prompts_of_a_step()
        self.gradient_accumulation_steps = self._accumulation_steps()

    def _check_passes(self) -> None:
        """Complete the options of a pass; raise ValueError for those that exclude each other."""
        self.tokens_per_batch = _token_limit(self.tokens_per_batch)
        # transformers 5.24 renamed these two, and warns of the old names.
        renamed = {f"gradient_{name}": f"activation_{name}" for name in ("checkpointing", "checkpointing_kwargs")}
        for old, new in renamed.items():
            if getattr(self, new, None) is not None:
                setattr(self, old, getattr(self, new))
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}  # reentrant loses the masses' gradients
        for old, new in renamed.items():
            if hasattr(self, new):
                setattr(self, new, getattr(self, old))
        for name in ("gradient_checkpointing", "offload_activations", "fp16", "torch_compile"):
            if self.restricted_gradient and getattr(self, name):
                raise ValueError(
                    "restricted_gradient takes each layer's gradient inside the forward pass and keeps no "
                    f"activations; {name}=True does not go with it"
                )

    def _prompts_of_a_step(self) -> int:
        """Return the prompts of a step on each process, or fewer for engines that cannot divide them by tokens."""
        prompts = max(1, self.pseudo_batch_size // max(1, self.world_size // max(1, self.tensor_parallel_size)))
        if self.gradient_accumulation_steps > 1 and prompts % self.gradient_accumulation_steps == 0:
            return prompts // self.gradient_accumulation_steps
        if not self.fsdp and not self.deepspeed:
            return prompts
        return max(size for size in range(1, min(8, prompts) + 1) if prompts % size == 0)

    def _accumulation_steps(self) -> int:
        """Return the passes of each process for one pseudo-batch.

        Raises:
            ValueError: the pseudo-batch cannot be divided among passes and processes.
        """
        at_once = self.per_device_train_batch_size or 0
        if self.pseudo_batch_size < 1 or at_once < 1:
            raise ValueError(
                "pseudo_batch_size and per_device_train_batch_size must be at least 1, got "
                f"{self.pseudo_batch_size} and {at_once}"
            )
        if self.tensor_parallel_size < 1 or self.world_size % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} does not divide the {self.world_size} processes"
            )
        replicas = self.world_size // self.tensor_parallel_size
        prompts_at_once = at_once * replicas
        if self.pseudo_batch_size % prompts_at_once:
            raise ValueError(
                f"pseudo_batch_size={self.pseudo_batch_size} is no multiple of per_device_train_batch_size="
                f"{at_once} × {replicas} processes; choose a batch size that divides it"
            )
        steps = self.pseudo_batch_size // prompts_at_once
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts pseudo_batch_size="
                f"{self.pseudo_batch_size}, which sets it to {steps}; give pseudo_batch_size alone"
            )
        return steps
