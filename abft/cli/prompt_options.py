"""Options of the commands that build prompts from files of labelled texts, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abft.models.model_options import ModelOptions

__all__ = ["PromptOptions"]


@dataclass(kw_only=True)
class PromptOptions(ModelOptions):
    """The model, and how its prompts are made."""

    task: str | None = field(default=None, metadata={"help": "built-in template and label words, such as SST2 or 0"})
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "label words in class order; default: the task's, else those in the file, sorted"},
    )
    text_prefix: str | None = field(
        default=None, metadata={"help": "before each text; default: the task's or 'sentence:'"}
    )
    label_prefix: str | None = field(
        default=None, metadata={"help": "before each label; default: the task's or 'sentiment:'"}
    )
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    k: int = field(default=4, metadata={"help": "demonstrations per prompt"})
    prompt_seed: int = field(default=0, metadata={"help": "seed for drawing the demonstrations"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "of the base: float32, bfloat16 or float16; auto: the model's own. W_Q and W_K train in float32"
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "load the base in 4-bit NF4 with double quantisation (bitsandbytes); needs --lora True"},
    )

    def make_task(self, labels: Sequence[str] | None = None) -> Any:
        """Return the task of these options; `labels` are those found in a file."""
        from abft.prompts.tasks import Task, Template, get_task

        if self.task is not None:
            task = get_task(int(self.task) if self.task.isdigit() else self.task)
        else:
            task = Task("custom", tuple(self.labels or labels or ()), Template())
        given = {"text_prefix": self.text_prefix, "label_prefix": self.label_prefix}
        changes = {name: value for name, value in given.items() if value is not None}
        template = replace(task.template, **changes)
        return replace(task, template=template, labels=tuple(self.labels or task.labels))

    def known_labels(self) -> Sequence[str] | None:
        """Return the label words that the options name; None if a file is to say."""
        return None if self.labels is None and self.task is None else self.make_task().labels

    def load(self, path: str, labels: Sequence[str] | None) -> tuple[list[Any], tuple[str, ...]]:
        """Return the examples of a file and the label words in class order."""
        from abft.prompts.examples import load_examples

        return load_examples(path, labels, text_column=self.text_column, label_column=self.label_column)

    def make_builder(self, model: Any, labels: Sequence[str]) -> Any:
        """Return the builder of prompts within the model's context."""
        from abft.models.loading import context_of, load_tokenizer
        from abft.prompts.builder import PromptBuilder

        return PromptBuilder(load_tokenizer(self.model), self.make_task(labels), max_length=context_of(model.config))
