"""`abft merge`: trained weights put into their base for good."""

from __future__ import annotations

from dataclasses import dataclass, field

from abft.cli.command import Command
from abft.models.model_options import ModelOptions

__all__ = ["COMMAND", "MergeOptions"]


@dataclass(kw_only=True)
class MergeOptions(ModelOptions):
    """Merge trained weights into their base."""

    trained: str = field(metadata={"help": "folder that `abft train` wrote"})
    output_dir: str = field(metadata={"help": "folder to write; must not exist"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or float16; auto: the model's own"})


def run(options: MergeOptions) -> int:
    """Write the merged model; return 0."""
    from rich.console import Console

    from abft.models.weights import merge

    merge(options.model, options.trained, options.output_dir, dtype=options.dtype)
    Console().print(f"{options.model} with {options.trained} merged into it: {options.output_dir}")
    return 0


COMMAND = Command(
    "merge",
    "write the base with the trained weights merged into it, as a model folder",
    run,
    lambda: (MergeOptions,),
)
