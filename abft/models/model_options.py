"""The options that name a model, which every command that loads one takes. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["MODEL_HELP", "ModelOptions"]

MODEL_HELP = "a local folder, a GGUF file, a name on the Hugging Face Hub, or smollm2 (of the extra abft[real])"


@dataclass(kw_only=True)
class ModelOptions:
    """The model to load.

    Args:
        model: a model folder, a GGUF file, `"smollm2"` or a name on the Hub.
        gguf_file: name of a GGUF file in the folder `model`; it becomes part of `model`.
    """

    model: str = field(metadata={"help": f"base model: {MODEL_HELP}"})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the folder --model"})

    def __post_init__(self) -> None:
        if self.gguf_file is not None:
            if not (path := Path(self.model) / self.gguf_file).is_file():
                raise ValueError(f"--gguf_file {self.gguf_file!r} is no file in the folder --model {self.model!r}")
            self.model, self.gguf_file = str(path), None
