"""In-context-learning prompts whose label positions are known by construction, and their batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from abft.prompts.collation import CORRECT_LABELS, NO_GROUP, WRONG_LABELS, Collator, padding_id
from abft.prompts.examples import Example
from abft.prompts.tasks import Task

# What to encode a piece behind, most neutral first: many tokenizers merge ":" with a newline, but no letter.
_ANCHORS = ("a", ":", "1")


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: k demonstrations and a query that stops after its label prefix.

    Args:
        input_ids: token ids, with what the tokenizer puts in front (BOS), without what it appends (EOS).
        label_positions: for each demonstration, the position of the first token of its label.
        demonstration_labels: for each demonstration, its class index.
        query_label: class index of the query's gold label.
    """

    input_ids: tuple[int, ...]
    label_positions: tuple[int, ...]
    demonstration_labels: tuple[int, ...]
    query_label: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)


class PromptBuilder:
    """Lays out demonstrations and query by a task's template, and tokenizes them piece by piece.

    A piece ends where a label begins or ends, so that label positions are known and nothing is searched for.
    It is encoded as the tokenizer encodes it *inside* a text: behind an anchor whose own tokens are then
    taken off, which is exact if they are a prefix of the whole, and is refused otherwise. So tokenizers that
    put a space in front of every text (SentencePiece, Metaspace) need no case of their own, and a separator
    that a tokenizer drops (a newline, in WordPiece) takes no token here either.

    Args:
        tokenizer: any tokenizer of transformers.
        task: label words and template.
        max_length: refuse prompts of more tokens than this. Default: no limit.

    Attributes:
        label_token_ids: for each class, the first token of its label, which is what a model is scored on.

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
        self._labels = [
            self._encode_after(template.label_prefix_segment, template.label_segment(label)) for label in task.labels
        ]
        self.label_token_ids = self._first_label_tokens()

    def build(self, demonstrations: Sequence[Example], query: Example) -> Prompt:
        """Builds one prompt; no demonstrations make it zero-shot.

        Raises:
            ValueError: a label that is no class of the task, or a prompt longer than ``max_length``.
        """
        for example in (*demonstrations, query):
            if not 0 <= example.label < len(self._labels):
                raise ValueError(
                    f"{example} is in none of the {len(self._labels)} classes of task {self.task.name!r}, "
                    f"{self.task.labels}; load the examples with labels=task.labels"
                )
        ids = list(self._leading)
        positions: list[int] = []
        for demonstration in demonstrations:
            ids += self._encode_question(demonstration.text, first=not positions)
            positions.append(len(ids))
            ids += self._labels[demonstration.label]
        ids += self._encode_question(query.text, first=not positions)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens exceeds max_length={self.max_length}; "
                f"use fewer demonstrations than {len(positions)}, drop long texts, or raise max_length"
            )
        return Prompt(tuple(ids), tuple(positions), tuple(d.label for d in demonstrations), query.label)

    def text(self, demonstrations: Sequence[Example], query: Example) -> str:
        """The prompt as text, which :meth:`build` tokenizes piece by piece."""
        template, labels = self.task.template, self.task.labels
        pieces = [template.instruction]
        for example in demonstrations:
            pieces += [template.text_segment(example.text), template.label_prefix_segment,
                       template.label_segment(labels[example.label]), template.separator]  # fmt: skip
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
            f"{type(self.tokenizer).__name__} merges the start of {piece!r} with whatever precedes it, "
            "so that no token begins there; change the template's prefixes or separator"
        )

    def _first_label_tokens(self) -> list[int]:
        owner: dict[int, str] = {}
        for label, ids in zip(self.task.labels, self._labels, strict=True):
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
) -> list[Prompt]:
    """Builds one prompt for every query, with demonstrations drawn from the pool without replacement.

    An example with the query's text is never its demonstration. By default the draw ignores labels: a prompt
    in which no demonstration carries the gold label is legal in ABFT, where its loss has the wrong-label term
    alone.

    Args:
        builder: of the prompts.
        queries: one prompt each, in this order.
        pool: examples to draw from; queries may be among them.
        k: demonstrations per prompt, 0 or more.
        seed: of the one ``random.Random`` that serves all queries in turn.
        unseen_label: draw only demonstrations of classes other than the query's (StaICC's unseen-label
            prompts).

    Raises:
        ValueError: ``k`` is negative, or exceeds what the pool holds for some query.
    """
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}")
    rng = random.Random(seed)
    candidates = {
        label: [e for e in pool if e.label != label] if unseen_label else pool for label in {q.label for q in queries}
    }
    copies = Counter(example.text for example in pool)
    prompts = []
    for query in queries:
        source = candidates[query.label]
        # Drawing as many more as the pool has copies of the query leaves k after they are struck out, still
        # uniformly.
        drawn = rng.sample(source, min(k + copies[query.text], len(source)))
        demonstrations = [example for example in drawn if example.text != query.text][:k]
        if len(demonstrations) < k:
            raise ValueError(
                f"k={k}, but the pool of {len(pool)} offers {len(demonstrations)} demonstrations for {query} "
                f"(unseen_label={unseen_label}); lower k or supply a larger pool"
            )
        prompts.append(builder.build(demonstrations, query))
    return prompts


class PromptCollator(Collator[Prompt]):
    """Makes a padded batch out of prompts; fit to be the ``collate_fn`` of a ``DataLoader``.

    Padding takes the tokenizer's padding token, or its EOS, or id 0 where it has neither: no token attends to
    it.

    Args:
        builder: the one that built the prompts; its tokenizer and label tokens are used.
        padding_side: where the padding goes.
        packing: prompts one behind the other in a batch of one, without padding.
        tokens_per_batch: with packing, most tokens of a packed batch; more become several ``parts``.

    Raises:
        ValueError: ``padding_side`` is neither "right" nor "left".
    """

    noun = "prompt"

    def __init__(
        self,
        builder: PromptBuilder,
        *,
        padding_side: Literal["right", "left"] = "right",
        packing: bool = False,
        tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__(padding_id(builder.tokenizer), padding_side, packing, tokens_per_batch)
        self._label_token_ids = torch.tensor(builder.label_token_ids)

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Collates B prompts; N is the length of the longest, or with packing the sum of the lengths.

        Returns:
            A dictionary of tensors on the CPU, int64 where no other dtype is named:

            - ``input_ids`` (B, N): padded token ids.
            - ``position_ids`` (B, N): 0, 1, … over a prompt's own tokens; 0 at padding.
            - ``key_groups`` (B, N) int8: ``CORRECT_LABELS`` (0) and ``WRONG_LABELS`` (1) at the first tokens
              of the demonstrations' labels, ``NO_GROUP`` (-1) elsewhere.
            - ``query_positions`` (B, 1): column of the last token.
            - ``seq_lens`` (B,) int32: tokens of each prompt; with padding on the left also ``seq_starts`` (B,) int32,
              the column of its first token.
            - ``prompt_lengths`` (B,): number of tokens, padding excluded.
            - ``demonstrations`` (B,): number of demonstrations, k.
            - ``correct_demonstrations`` (B,): number of those with the gold label, the size of I⁺.
            - ``labels`` (B,): class index of the gold label.
            - ``label_ids`` (B,): first token of the gold label.

            With packing the first three are (1, N), ``query_positions`` counts over all of them, and ``cu_seqlens``
            (B + 1,) int32 holds the bounds, in place of ``seq_lens``. If the prompts exceed ``tokens_per_batch``, the
            only entry is ``parts``: a list of such dictionaries, each within the budget.

        Raises:
            ValueError: there are no prompts, or one is longer than ``tokens_per_batch``.
        """
        return super().__call__(prompts)

    def _key_groups(self, sample: Prompt) -> Tensor:
        groups = torch.full((sample.length,), NO_GROUP, dtype=torch.int8)
        correct = torch.tensor(sample.demonstration_labels, dtype=torch.long) == sample.query_label
        labels = torch.where(correct, CORRECT_LABELS, WRONG_LABELS).to(torch.int8)
        groups[torch.tensor(sample.label_positions, dtype=torch.long)] = labels
        return groups

    def _rows(self, samples: Sequence[Prompt]) -> Tensor:
        return torch.tensor([[prompt.length - 1] for prompt in samples])

    def _counts(self, samples: Sequence[Prompt]) -> dict[str, Tensor]:
        labels = torch.tensor([prompt.query_label for prompt in samples])
        correct = [sum(label == prompt.query_label for label in prompt.demonstration_labels) for prompt in samples]
        return {
            "prompt_lengths": torch.tensor([prompt.length for prompt in samples]),
            "demonstrations": torch.tensor([len(prompt.label_positions) for prompt in samples]),
            "correct_demonstrations": torch.tensor(correct),
            "labels": labels,
            "label_ids": self._label_token_ids[labels],
        }
