"""Classification tasks: label words, and the template that writes a demonstration as text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Template:
    r"""The segments of a demonstration, as in StaICC's prompts.

    A demonstration is ``text``, ``label_prefix``, ``label`` and ``separator``; the query stops after its
    label prefix, so that the space before a label belongs to the label. With the defaults and two texts::

        sentence: great movie sentiment: positive\nsentence: dull sentiment:

    Args:
        text_prefix: before the text, with a space between; may be empty.
        label_prefix: before the label; it ends the prompt.
        separator: after each demonstration.
        instruction: the start of the prompt, with the white space after it.

    Raises:
        ValueError: the label prefix is blank (the query's text would end the prompt), or ends in white space.
    """

    text_prefix: str = "sentence:"
    label_prefix: str = "sentiment:"
    separator: str = "\n"
    instruction: str = ""

    def __post_init__(self) -> None:
        if not self.label_prefix or self.label_prefix != self.label_prefix.rstrip():
            raise ValueError(
                f"label_prefix must be non-empty and must not end in white space, got {self.label_prefix!r}: "
                "the space before a label is part of the label; use for example 'sentiment:'"
            )

    def text_segment(self, text: str) -> str:
        """Return the first segment of a demonstration or the query."""
        return f"{self.text_prefix} {text}" if self.text_prefix else text

    @property
    def label_prefix_segment(self) -> str:
        """The segment between text and label; its last token is the row that predicts the label."""
        return f" {self.label_prefix}"

    def label_segment(self, label: str) -> str:
        """Return the segment of one label word."""
        return f" {label}"


@dataclass(frozen=True)
class Task:
    """A classification task without its data.

    Args:
        name: shown in reports.
        labels: the label words, in class order: ``labels[i]`` is the word of class ``i``.
        template: the prompt layout.
        index: the task's number in StaICC, None for other tasks.

    Raises:
        ValueError: fewer than two labels, a blank one, one with white space around it, or one given twice.
    """

    name: str
    labels: tuple[str, ...]
    template: Template = field(default_factory=Template)
    index: int | None = None

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task {self.name!r} needs two or more distinct labels, got {self.labels}")
        for label in self.labels:
            if not label or label != label.strip():
                raise ValueError(
                    f"task {self.name!r}: label {label!r} is blank or has white space around it; "
                    "give the bare word, the template adds the space before it"
                )


def _staicc(index: int, name: str, text_prefix: str, label_prefix: str, labels: str) -> Task:
    template = Template(text_prefix=f"{text_prefix}:", label_prefix=f"{label_prefix}:")
    return Task(name, tuple(labels.split()), template, index)


TASKS: tuple[Task, ...] = (
    _staicc(0, "SST2", "sentence", "sentiment", "negative positive"),
    _staicc(1, "MR", "review", "sentiment", "negative positive"),
    _staicc(2, "FP", "sentence", "sentiment", "negative neutral positive"),
    _staicc(3, "SST5", "sentence", "sentiment", "poor bad neutral good great"),
    _staicc(4, "TREC", "question", "target", "short entity description person location number"),
    _staicc(5, "AGNews", "news", "topic", "world sports business science"),
    _staicc(6, "SUBJ", "review", "subjectiveness", "objective subjective"),
    _staicc(7, "TEE", "tweet", "emotion", "anger joy positive sad"),
    _staicc(8, "TEH", "tweet", "hate speech", "normal hate"),
    _staicc(9, "HS18", "tweet", "hate speech", "normal hate skip relation"),
)
"""The ten tasks of StaICC, in its order: label words and templates, no data."""


def get_task(name_or_index: str | int) -> Task:
    """Return the built-in task of that name (upper or lower case) or StaICC index.

    Raises:
        ValueError: there is no such task; the message lists the known ones.
    """
    for task in TASKS:
        if name_or_index == task.index or (
            isinstance(name_or_index, str) and name_or_index.lower() == task.name.lower()
        ):
            return task
    known = ", ".join(f"{task.index} {task.name}" for task in TASKS)
    raise ValueError(f"unknown task {name_or_index!r}; known are {known}; for another, construct abft.Task")
