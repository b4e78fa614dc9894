"""What a user should know of a tokenizer and label words before a run: notes, no errors."""

from __future__ import annotations

from collections.abc import Iterable

from abft.prompts.builder import PromptBuilder

__all__ = ["prompt_notes"]


def prompt_notes(builders: Iterable[PromptBuilder]) -> list[str]:
    """Return notes on how these builders write prompts and score labels, each once.

    They name labels of several tokens, a chat template, which in-context-learning prompts ignore, and a tokenizer
    without a padding token.
    """
    notes: dict[str, None] = {}
    for builder in builders:
        tokenizer = builder.tokenizer
        if getattr(tokenizer, "chat_template", None):
            notes["the tokenizer has a chat template; prompts are plain demonstrations and ignore it"] = None
        if tokenizer.pad_token_id is None:
            notes["the tokenizer has no padding token; batches are filled with EOS, which no token attends to"] = None
        for label, ids in zip(builder.task.labels, builder.label_ids, strict=True):
            if len(ids) > 1:
                first = tokenizer.convert_ids_to_tokens(ids[0])
                notes[
                    f"task {builder.task.name}: the label {label!r} has {len(ids)} tokens; it is scored, and attended "
                    f"to, by its first one, {first!r}"
                ] = None
    return list(notes)
