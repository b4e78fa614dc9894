"""Options that every command which trains takes: `abft train`, `abft experiment` and `abft prototype`."""

from __future__ import annotations

from dataclasses import dataclass, field

from abft.losses import Adaption

__all__ = ["TrainingOptions"]


@dataclass
class TrainingOptions:
    """The options of the paper's training, with its defaults. An option added here appears in every command.

    Args:
        learning_rate: None for the paper's 2e-5 (full) or 1e-4 (LoRA).
        num_train_epochs: passes over the training prompts.
        warmup_steps: optimizer steps over which the rate rises linearly to `learning_rate`; 0 in the paper.
        pseudo_batch_size: prompts whose gradients are averaged for one optimizer step, over all processes.
        wrong_penalty: A, weight of the mass on wrong labels; its first value if it is adapted.
        correct_award: B, weight of the mass missing on correct labels.
        adaption: what steers A, or κ of the share loss, by the number of induction heads: `"PID"`, `"P"` or `"none"`.
        pid_proportional, pid_integral, pid_derivative: its factors Cp, Ci, Cd.
        pid_relative: the head counts enter as shares of the first one, so that the factors fit models of any size.
        unmatched_weight: weight of prompts in which no demonstration carries the gold label; 1 in the paper.
        mass_award: with the share loss, κ of the award −κ·log S, which keeps attention on labels up; its first value if
            it is adapted.
        mass_floor: with the share loss, λ of the penalty λ·max(0, T − S) on heads with S > T/2.
        head_filter: train induction heads only.
        per_head_mean: divide a prompt's loss by its number of induction heads.
        restricted_gradient: a head's loss trains its own layer's W_Q and W_K alone: hidden states carry no gradient.
            Each layer's gradient is taken and freed inside the forward pass, at about the memory of inference.
        stop_on_collapse: end training when the induction heads fall to a tenth of their first number, with the weights
            of the last step that had half of them.
        packing: concatenate the prompts of a pass along the sequence dimension (batch size 1), without padding; None to
            do so if the model takes positions.
        tokens_per_batch: most tokens of one pass, padding included; a batch with more takes several. `"auto"` for what
            fits and is quick (`abft.training.pass_tokens`), None or `"none"` for no limit.
        gradient_checkpointing: recompute each layer in the backward pass.
        lora: train LoRA adapters on the q and k projections instead of W_Q and W_K themselves.
        lora_r: rank of LoRA.
    """

    learning_rate: float | None = field(default=None, metadata={"help": "None: 2e-5 (full), 1e-4 (LoRA)"})
    num_train_epochs: float = field(default=2, metadata={"help": "passes over the training prompts"})
    warmup_steps: int = field(default=0, metadata={"help": "optimizer steps in which the rate rises to its value"})
    pseudo_batch_size: int = field(default=32, metadata={"help": "prompts averaged for one optimizer step"})
    wrong_penalty: float = field(default=0.5, metadata={"help": "A: weight of the mass on wrong labels"})
    correct_award: float = field(default=1.0, metadata={"help": "B: weight of the mass missing on correct labels"})
    adaption: Adaption = field(default="PID", metadata={"help": "what steers A or the award: PID, P or none"})
    pid_proportional: float = field(default=0.03, metadata={"help": "Cp"})
    pid_integral: float = field(default=0.005, metadata={"help": "Ci"})
    pid_derivative: float = field(default=0.005, metadata={"help": "Cd"})
    pid_relative: bool = field(default=False, metadata={"help": "count heads as shares of their first number"})
    unmatched_weight: float = field(default=1.0, metadata={"help": "weight of prompts without a correct demonstration"})
    mass_award: float = field(default=0.1, metadata={"help": "with the share loss: weight of the mass on all labels"})
    mass_floor: float = field(default=0.0, metadata={"help": "with the share loss: penalty on heads below T"})
    head_filter: bool = field(default=True, metadata={"help": "train induction heads only"})
    per_head_mean: bool = field(default=False, metadata={"help": "divide by the number of induction heads"})
    restricted_gradient: bool = field(
        default=False, metadata={"help": "a head's loss trains its own layer alone, at the memory of inference"}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "end training when induction heads vanish, with the weights before it"}
    )
    packing: bool | None = field(default=None, metadata={"help": "prompts without padding; None: where it is possible"})
    tokens_per_batch: int | str | None = field(
        default="auto", metadata={"help": "most tokens of a pass: a number, none, or auto for what fits and is quick"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute each layer in the backward pass"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters on q and k instead of W_Q and W_K"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
