"""`abft plan`: what fits, from a model's configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from abft.cli.command import Command
from abft.models.model_options import ModelOptions

__all__ = ["COMMAND", "PlanOptions"]


@dataclass(kw_only=True)
class PlanOptions(ModelOptions):
    """Estimate memory of a run on some GPUs."""

    context: int = field(default=2048, metadata={"help": "tokens of one pass: of a prompt, or of packed prompts"})
    mode: str = field(
        default="full", metadata={"help": "full or restricted gradients, e2e, e2e_qk, or inference (evaluation)"}
    )
    precision: str = field(default="bfloat16", metadata={"help": "of the base: float32, bfloat16, float16 or nf4"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters; always with nf4"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute each layer in the backward pass"})
    gpus: int = field(default=1, metadata={"help": "number of GPUs"})
    gpu_memory: float = field(default=80.0, metadata={"help": "GiB of each GPU"})


def run(options: PlanOptions) -> int:
    """Print the plan; return 0 if it fits, else 1."""
    from rich.console import Console

    from abft.training.plan import plan

    arguments = asdict(options)
    del arguments["gguf_file"]  # it is part of the model's name by now
    result = plan(**arguments)
    Console(width=110).print(*result.tables(), sep="\n")
    return 0 if result.fits else 1


COMMAND = Command(
    "plan",
    "estimate memory by part, the longest context and a launch line, from a model's configuration alone",
    run,
    lambda: (PlanOptions,),
)
