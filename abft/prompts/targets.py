"""Attention targets: which keys some rows of a token sequence should attend to, and which not.

ABFT's loss (arXiv 2505.14233, Eq. 1) asks this of one row, the last, and of one kind of key, demonstration labels. A
target asks it of any rows and any keys before them, such as the span of a document that holds the evidence. For a row
that sees n tokens, and a head whose row puts mass m⁺ on the positive and m⁻ on the negative ones of its k target keys:

    S = m⁺ + m⁻ > T = k / (k + ln n)  ⇒  L = A·m⁻ + B·(|positive| − m⁺),  else 0

summed over heads and layers, mean over the target's rows. A prompt (:class:`abft.Prompt`) is the target whose row is
the last token and whose keys are the demonstrations' labels.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["AttentionTarget"]


@dataclass(frozen=True)
class AttentionTarget:
    """The rows `query_positions` of a token sequence should attend to the keys `positive`, not to `negative`.

    Args:
        input_ids: token ids, as the model gets them (with BOS if it expects one). Batches leave out the tokens after
            the last query position, which no row sees.
        query_positions: the rows, in rising order; one or more.
        positive: positions to attend to, one or more; none after the first query position, which could not see it.
        negative: positions not to attend to, likewise; None for every other token that a row sees. Then nearly all of
            a head's attention is on target keys, so that every head passes the induction-head filter.
        label_id: the token that should follow the last query position, which E2E trains and accuracy counts. None if
            there is none.

    Raises:
        TypeError: something other than integers.
        ValueError: a position outside of the tokens, out of order, given twice, both positive and negative, or after
            the first query position.
    """

    input_ids: Sequence[int]
    query_positions: Sequence[int]
    positive: Sequence[int]
    negative: Sequence[int] | None = None
    label_id: int | None = None

    _REQUIRED: ClassVar[tuple[str, ...]] = ("input_ids", "query_positions", "positive")

    def __post_init__(self) -> None:
        for name in ("input_ids", "query_positions", "positive", "negative"):
            if name != "negative" or self.negative is not None:
                object.__setattr__(self, name, _integers(name, getattr(self, name)))
        if self.label_id is not None:
            object.__setattr__(self, "label_id", _integers("label_id", [self.label_id])[0])
        for name in self._REQUIRED:
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
                    f"{name} position {outside[0]} is not in 0 … {rows[0]}, which the first query position sees; "
                    "make another target for the rows that see more"
                )
            if len(set(keys)) < len(keys):
                raise ValueError(f"{name} positions must differ from each other, got {keys}")
        if both := set(self.positive) & set(self.negative or ()):
            raise ValueError(f"position {min(both)} is both positive and negative; choose one")

    @property
    def length(self) -> int:
        """Number of tokens up to the last query position: those that the model is given."""
        return self.query_positions[-1] + 1

    @property
    def label(self) -> int | None:
        """The label that a prediction is compared with: the token ``label_id``."""
        return self.label_id


def _integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise TypeError(f"{name} must be integers, got {values!r}") from error
