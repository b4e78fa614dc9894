"""Attention targets: which keys some rows of a token sequence should attend to, and which not.

ABFT's loss (arXiv 2505.14233, Eq. 1) asks this of one row, the last, and of one kind of key, demonstration labels. A
target asks it of any rows and any keys before them, such as the span of a document that holds the evidence. For a row
that sees n tokens, and a head whose row puts mass m⁺ on the positive and m⁻ on the negative ones of its k target keys:

    S = m⁺ + m⁻ > T = k / (k + ln n)  ⇒  L = A·m⁻ + B·(|positive| − m⁺),  else 0

summed over heads and layers, mean over the target's rows. An ABFT prompt is the target whose row is the last token and
whose keys are the demonstrations' labels.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from abft.prompts.collation import CORRECT_LABELS, NO_GROUP, WRONG_LABELS, Collator

__all__ = ["AttentionTarget", "TargetCollator"]

_NO_LABEL = -100


@dataclass(frozen=True)
class AttentionTarget:
    """The rows `query_positions` of a token sequence should attend to the keys `positive`, not to `negative`.

    Args:
        input_ids: token ids, as the model gets them (with BOS if it expects one). Tokens behind the last query position
            bear on nothing that is asked and are left out of batches.
        query_positions: the rows, in rising order; one or more.
        positive: positions to attend to, one or more; none behind the first query position, which could not see it.
        negative: positions not to attend to, likewise; None for every other token that a row sees. Then nearly all of
            a head's attention is on target keys, so that every head passes the induction-head filter.
        label_id: the token that should follow the last query position: what E2E trains and accuracy counts. None if
            there is none.

    Raises:
        TypeError: something other than integers.
        ValueError: a position outside of the tokens, out of order, given twice, both positive and negative, or behind
            the first query position.
    """

    input_ids: Sequence[int]
    query_positions: Sequence[int]
    positive: Sequence[int]
    negative: Sequence[int] | None = None
    label_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_ids", "query_positions", "positive", "negative"):
            if name != "negative" or self.negative is not None:
                object.__setattr__(self, name, _integers(name, getattr(self, name)))
        if self.label_id is not None:
            object.__setattr__(self, "label_id", _integers("label_id", [self.label_id])[0])
        for name in ("input_ids", "query_positions", "positive"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give one or more")
        if (lowest := min(self.input_ids)) < 0 or (self.label_id is not None and self.label_id < 0):
            raise ValueError(f"token ids are 0 or more, got {min(lowest, self.label_id or 0)}")
        rows = self.query_positions
        if any(later <= earlier for earlier, later in itertools.pairwise(rows)):
            raise ValueError(f"query_positions must rise, got {rows}; sort them, each once")
        if rows[0] < 0 or rows[-1] >= len(self.input_ids):
            raise ValueError(f"query_positions must be in 0 … {len(self.input_ids) - 1}, the tokens given, got {rows}")
        for name in ("positive", "negative"):
            keys = getattr(self, name) or ()
            if outside := [key for key in keys if not 0 <= key <= rows[0]]:
                raise ValueError(
                    f"{name} position {outside[0]} is not in 0 … {rows[0]}, what the first query position sees; make "
                    "a target of its own for rows that see more"
                )
            if len(set(keys)) < len(keys):
                raise ValueError(f"{name} positions must differ from each other, got {keys}")
        if both := set(self.positive) & set(self.negative or ()):
            raise ValueError(f"position {min(both)} is both positive and negative; choose one")

    @property
    def length(self) -> int:
        """Number of tokens up to the last query position: those that the model is given."""
        return self.query_positions[-1] + 1


def _integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise TypeError(f"{name} must be integers, got {values!r}") from error


class TargetCollator(Collator[AttentionTarget]):
    """Makes a padded or packed batch out of targets; fit to be the ``collate_fn`` of a ``DataLoader``.

    Args:
        pad_token_id: what padding is filled with; no token attends to it.
        packing: targets one behind the other in a batch of one, without padding.
        tokens_per_batch: with packing, most tokens of a packed batch; more become several ``parts``.
        padding_side: where the padding goes; on the left all last query positions are in the last column.

    Raises:
        ValueError: ``padding_side`` is neither "right" nor "left".
    """

    noun = "target"

    def __init__(
        self,
        pad_token_id: int,
        packing: bool = False,
        tokens_per_batch: int | None = None,
        *,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        super().__init__(pad_token_id, padding_side, packing, tokens_per_batch)

    def __call__(self, targets: Sequence[AttentionTarget]) -> dict[str, Any]:
        """Collates B targets of up to R rows each; N is the length of the longest, or with packing their sum.

        Returns:
            The entries of a batch of prompts (see :class:`abft.PromptCollator`), with these differences:

            - ``key_groups``: ``CORRECT_LABELS`` (0) at positive keys, ``WRONG_LABELS`` (1) at negative ones.
            - ``query_positions`` (B, R): of a target with fewer rows, its last row again.
            - ``row_weights`` (B, R) float32: of a row in its target's loss, 1 / rows, and 0 for a repeated one.
            - ``prompt_lengths`` (B, R): number of tokens that the row sees.
            - ``demonstrations`` (B, R): number of target keys that the row sees, k.
            - ``correct_demonstrations`` (B, R): number of positive keys.
            - ``labels``, ``label_ids`` (B,): the token to follow, −100 where none is given.

        Raises:
            ValueError: there are no targets, or one is longer than ``tokens_per_batch``.
        """
        return super().__call__(targets)

    def _key_groups(self, sample: AttentionTarget) -> Tensor:
        groups = torch.full((sample.length,), WRONG_LABELS if sample.negative is None else NO_GROUP, dtype=torch.int8)
        groups[list(sample.negative or ())] = WRONG_LABELS
        groups[list(sample.positive)] = CORRECT_LABELS
        return groups

    def _rows(self, samples: Sequence[AttentionTarget]) -> Tensor:
        rows = [torch.tensor(target.query_positions) for target in samples]
        most = max(map(len, rows))
        return torch.stack([torch.cat([own, own[-1:].expand(most - len(own))]) for own in rows])

    def _counts(self, samples: Sequence[AttentionTarget]) -> dict[str, Tensor]:
        rows = self._rows(samples)
        own = torch.tensor([[len(target.query_positions)] for target in samples])
        positive = torch.tensor([[len(target.positive)] for target in samples]).expand_as(rows)
        given = torch.tensor([[-1 if t.negative is None else len(t.positive) + len(t.negative)] for t in samples])
        label_ids = torch.tensor([_NO_LABEL if target.label_id is None else target.label_id for target in samples])
        return {
            "prompt_lengths": rows + 1,
            "demonstrations": torch.where(given < 0, rows + 1, given),
            "correct_demonstrations": positive,
            "row_weights": (torch.arange(rows.shape[1]) < own) / own,
            "labels": label_ids,
            "label_ids": label_ids,
        }
