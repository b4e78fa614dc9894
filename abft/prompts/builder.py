"""In-context-learning prompts whose label positions are known by construction."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from transformers import PreTrainedTokenizerBase

from abft.prompts.collation import padding_id
from abft.prompts.examples import Example
from abft.prompts.targets import AttentionTarget
from abft.prompts.tasks import Task

__all__ = ["Prompt", "PromptBuilder", "PromptSet", "sample_prompts"]

# Texts that a piece is encoded after, most neutral first: many tokenizers merge ":" with a newline, but no letter.
_ANCHORS = ("a", ":", "1")


@dataclass(frozen=True)
class Prompt(AttentionTarget):
    """A tokenized prompt: k demonstrations and a query that stops after its label prefix.

    As an attention target, its row is the last token; its positive keys are the demonstration labels equal to the gold
    label (there may be none), its negative keys the others.

    Args:
        input_ids: token ids, with those that the tokenizer puts first (BOS), without those it appends (EOS).
        label_positions: for each demonstration, the position of the first token of its label.
        demonstration_labels: for each demonstration, its class index.
        query_label: class index of the query's gold label.
        label_id: first token of the gold label; None if it is not known.

    Raises:
        TypeError, ValueError: as :class:`abft.AttentionTarget`; different numbers of positions and labels.
    """

    query_positions: tuple[int, ...] = field(init=False, repr=False)
    positive: tuple[int, ...] = field(init=False, repr=False)
    negative: tuple[int, ...] = field(init=False, repr=False)
    label_id: int | None = field(default=None, kw_only=True)
    label_positions: Sequence[int]
    demonstration_labels: Sequence[int]
    query_label: int

    _REQUIRED = ("input_ids", "query_positions")

    def __post_init__(self) -> None:
        by_label = list(zip(self.label_positions, self.demonstration_labels, strict=True))
        derived = {
            "label_positions": tuple(self.label_positions),
            "demonstration_labels": tuple(self.demonstration_labels),
            "query_positions": (len(self.input_ids) - 1,),
            "positive": tuple(position for position, label in by_label if label == self.query_label),
            "negative": tuple(position for position, label in by_label if label != self.query_label),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def label(self) -> int:
        """The label that a prediction is compared with: the class index ``query_label``."""
        return self.query_label


class PromptSet(Sequence[Prompt]):
    """Prompts with the builder that made them, which knows their label tokens; a slice is such a set, too.

    Args:
        builder: the builder of the prompts.
        prompts: any number of them.

    Raises:
        TypeError: something other than a prompt.
    """

    def __init__(self, builder: PromptBuilder, prompts: Iterable[Prompt]) -> None:
        self.builder = builder
        self.prompts = tuple(prompts)
        for index, prompt in enumerate(self.prompts):
            if not isinstance(prompt, Prompt):
                raise TypeError(f"sample {index} is {type(prompt).__name__}, not a Prompt; pass targets as a list")

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        return PromptSet(self.builder, self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def __eq__(self, other: object) -> bool:
        """Return True for a set of equal prompts that are scored on the same label tokens."""
        if not isinstance(other, PromptSet):
            return NotImplemented
        return self.prompts == other.prompts and self.label_token_ids == other.label_token_ids

    def __hash__(self) -> int:
        return hash(self.prompts)

    def __repr__(self) -> str:
        return f"PromptSet of {len(self)} prompts of task {self.builder.task.name!r}"

    @property
    def label_token_ids(self) -> list[int]:
        """For each class, the token that a model is scored on."""
        return self.builder.label_token_ids

    @property
    def pad_token_id(self) -> int:
        """The padding token of the prompts' tokenizer, or its EOS, or 0 if it has neither."""
        return padding_id(self.builder.tokenizer)


class PromptBuilder:
    """Lays out demonstrations and query by a task's template, and tokenizes them piece by piece.

    A piece ends where a label begins or ends, so that label positions are known and nothing is searched for. It is
    encoded as the tokenizer encodes it *inside* a text: after an anchor whose own tokens are then removed. That is
    exact if these tokens are a prefix of the whole, and is refused otherwise. So tokenizers that put a space before
    every text (SentencePiece, Metaspace) need no special case, and a separator that a tokenizer drops (a newline, in
    WordPiece) takes no token here either.

    Args:
        tokenizer: any tokenizer of transformers.
        task: label words and template.
        max_length: refuse prompts of more tokens than this. Default: no limit.

    Attributes:
        label_ids: for each class, the tokens of its label.
        label_token_ids: for each class, the first of them, on which a model is scored.

    Raises:
        ValueError: a label yields no token, starts with the unknown token, or starts with the same token as
            another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, *, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        template = task.template
        self._question_ids: dict[tuple[str, bool], list[int]] = {}
        self._leading = self._leading_special_tokens()
        self.label_ids = [
            self._encode_after(template.label_prefix_segment, template.label_segment(label)) for label in task.labels
        ]
        self.label_token_ids = self._first_label_tokens()

    def build(self, demonstrations: Sequence[Example], query: Example) -> Prompt:
        """Build one prompt; without demonstrations it is zero-shot.

        Raises:
            ValueError: a label that is no class of the task, or a prompt longer than ``max_length``.
        """
        for example in (*demonstrations, query):
            if not 0 <= example.label < len(self.label_ids):
                raise ValueError(
                    f"{example} is in none of the {len(self.label_ids)} classes of task {self.task.name!r}, "
                    f"{self.task.labels}; load the examples with labels=task.labels"
                )
        ids = list(self._leading)
        positions: list[int] = []
        for demonstration in demonstrations:
            ids += self._encode_question(demonstration.text, first=not positions)
            positions.append(len(ids))
            ids += self.label_ids[demonstration.label]
        ids += self._encode_question(query.text, first=not positions)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens exceeds max_length={self.max_length}; "
                f"use fewer demonstrations than {len(positions)}, drop long texts, or raise max_length"
            )
        labels = [demonstration.label for demonstration in demonstrations]
        return Prompt(ids, positions, labels, query.label, label_id=self.label_token_ids[query.label])

    def build_set(self, pairs: Iterable[tuple[Sequence[Example], Example]]) -> PromptSet:
        """Build the set of prompts of these pairs of demonstrations and query.

        Raises:
            ValueError: as :meth:`build`.
        """
        return PromptSet(self, [self.build(demonstrations, query) for demonstrations, query in pairs])

    def text(self, demonstrations: Sequence[Example], query: Example) -> str:
        """Return the prompt as text, which :meth:`build` tokenizes piece by piece."""
        template, labels = self.task.template, self.task.labels
        pieces = [template.instruction]
        for example in demonstrations:
            pieces += [template.text_segment(example.text), template.label_prefix_segment]
            pieces += [template.label_segment(labels[example.label]), template.separator]
        return "".join([*pieces, template.text_segment(query.text), template.label_prefix_segment])

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _leading_special_tokens(self) -> list[int]:
        plain, full = self._ids(_ANCHORS[0]), self._ids(_ANCHORS[0], add_special_tokens=True)
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return full[: next(starts, 0)]

    def _encode_question(self, text: str, *, first: bool) -> list[int]:
        ids = self._question_ids.get((text, first))
        if ids is None:
            template = self.task.template
            question = template.text_segment(text) + template.label_prefix_segment
            if first:
                ids = self._ids(template.instruction + question)
            else:
                ids = self._encode_after("", template.separator + question)
            self._question_ids[text, first] = ids
        return ids

    def _encode_after(self, context: str, piece: str) -> list[int]:
        for anchor in _ANCHORS:
            head = self._ids(anchor + context)
            ids = self._ids(anchor + context + piece)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        raise ValueError(
            f"{type(self.tokenizer).__name__} merges the start of {piece!r} with the text before it, "
            "so that no token begins there; change the template's prefixes or separator"
        )

    def _first_label_tokens(self) -> list[int]:
        owner: dict[int, str] = {}
        for label, ids in zip(self.task.labels, self.label_ids, strict=True):
            if not ids:
                raise ValueError(f"label {label!r} yields no token; choose another label word")
            token = self.tokenizer.convert_ids_to_tokens(ids[0])
            if ids[0] == self.tokenizer.unk_token_id:
                raise ValueError(f"label {label!r} starts with the unknown token {token!r}; choose another label word")
            if ids[0] in owner:
                raise ValueError(
                    f"labels {owner[ids[0]]!r} and {label!r} start with the same token {token!r} ({ids[0]}), "
                    "so that it cannot tell them apart; choose other label words"
                )
            owner[ids[0]] = label
        return list(owner)


def sample_prompts(
    builder: PromptBuilder,
    queries: Sequence[Example],
    pool: Sequence[Example],
    k: int,
    seed: int,
    *,
    unseen_label: bool = False,
) -> PromptSet:
    """Build one prompt for every query, with demonstrations drawn from the pool without replacement.

    An example with the query's text is never its demonstration. By default the draw ignores labels: a prompt in which
    no demonstration carries the gold label is legal in ABFT, where its loss has the wrong-label term alone.

    Args:
        builder: builder of the prompts.
        queries: one prompt each, in this order.
        pool: examples to draw from; queries may be among them.
        k: demonstrations per prompt, 0 or more.
        seed: seed of one ``random.Random`` for all queries in turn.
        unseen_label: draw only demonstrations of classes other than the query's (StaICC's unseen-label prompts).

    Raises:
        ValueError: ``k`` is negative, or the pool holds fewer demonstrations for some query.
    """
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}")
    return builder.build_set(_pairs(queries, pool, k, random.Random(seed), unseen_label))


def _pairs(
    queries: Sequence[Example], pool: Sequence[Example], k: int, rng: random.Random, unseen_label: bool
) -> Iterator[tuple[list[Example], Example]]:
    candidates = {
        label: [e for e in pool if e.label != label] if unseen_label else pool for label in {q.label for q in queries}
    }
    copies = Counter(example.text for example in pool)
    for query in queries:
        source = candidates[query.label]
        # As many more are drawn as the pool has copies of the query: k are left without these, still uniformly.
        drawn = rng.sample(source, min(k + copies[query.text], len(source)))
        demonstrations = [example for example in drawn if example.text != query.text][:k]
        if len(demonstrations) < k:
            raise ValueError(
                f"k={k}, but the pool of {len(pool)} offers {len(demonstrations)} demonstrations for {query} "
                f"(unseen_label={unseen_label}); lower k or supply a larger pool"
            )
        yield demonstrations, query
