"""Batches of token sequences with key groups and the rows whose masses are wanted, padded or packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["CORRECT_LABELS", "MASS_INPUTS", "MODEL_INPUTS", "NO_GROUP", "WRONG_LABELS", "Collator", "padding_id"]

CORRECT_LABELS = 0
"""Key group of I⁺: demonstration labels equal to the query's gold label, or keys that a target wants looked at."""
WRONG_LABELS = 1
"""Key group of I⁻: the other demonstration labels, or keys that a target wants not looked at."""
NO_GROUP = -1
"""Key group of every other token."""


MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "seq_lens", "seq_starts", "cu_seqlens")
"""Entries of a batch that a pass through the model takes, those that the batch has."""
MASS_INPUTS = (*MODEL_INPUTS, "key_groups", "query_positions")
"""Entries of a batch that a pass for masses takes."""


class Sample(Protocol):
    """A token sequence."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def length(self) -> int:
        """How many of the tokens, from the first, go into a batch."""


_Sample = TypeVar("_Sample", bound=Sample)


def padding_id(source: Any) -> int:
    """The padding token of a tokenizer or a model's config, or its EOS, or 0 where it has neither.

    No token attends to padding, so which one it is does not matter.
    """
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(source, name, None)
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return 0


class Collator(ABC, Generic[_Sample]):
    """Makes a batch out of samples; what a sample's key groups, rows and counts are is for its heirs to say.

    Args:
        pad_token_id: what padding is filled with.
        padding_side: where the padding goes.
        packing: samples one behind the other in a batch of one, without padding.
        tokens_per_batch: with packing, most tokens of a packed batch; more become several ``parts``.

    Raises:
        ValueError: ``padding_side`` is neither "right" nor "left".
    """

    noun = "sample"

    def __init__(
        self, pad_token_id: int, padding_side: Literal["right", "left"], packing: bool, tokens_per_batch: int | None
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.packing, self.tokens_per_batch = packing, tokens_per_batch

    @abstractmethod
    def _key_groups(self, sample: _Sample) -> Tensor:
        """Group of each of a sample's tokens, int8 (length,)."""

    @abstractmethod
    def _rows(self, samples: Sequence[_Sample]) -> Tensor:
        """The rows whose masses are wanted, as positions in their own samples, int64 (B, R)."""

    @abstractmethod
    def _counts(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        """The other entries of a batch, which its layout does not bear on."""

    def __call__(self, samples: Sequence[_Sample]) -> dict[str, Any]:
        if not samples:
            raise ValueError(f"cannot collate an empty list of {self.noun}s")
        if not self.packing:
            return {**self._padded(samples), **self._counts(samples)}
        parts = [{**self._packed(part), **self._counts(part)} for part in self._within_budget(samples)]
        return parts[0] if len(parts) == 1 else {"parts": parts}

    def _padded(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        lengths = torch.tensor([sample.length for sample in samples])
        shape = (len(samples), int(lengths.max()))
        starts = shape[1] - lengths if self.padding_side == "left" else torch.zeros_like(lengths)
        # Each token's index in its own sample; negative or past the end at padding.
        offsets = torch.arange(shape[1]) - starts[:, None]
        mask = (offsets >= 0) & (offsets < lengths[:, None])
        input_ids = torch.full(shape, self.pad_token_id)
        input_ids[mask] = torch.tensor(_tokens(samples))
        key_groups = torch.full(shape, NO_GROUP, dtype=torch.int8)
        key_groups[mask] = torch.cat([self._key_groups(sample) for sample in samples])
        return {
            "input_ids": input_ids,
            "position_ids": offsets.where(mask, 0),
            "seq_lens": lengths.to(torch.int32),
            **({"seq_starts": starts.to(torch.int32)} if self.padding_side == "left" else {}),
            "key_groups": key_groups,
            "query_positions": starts[:, None] + self._rows(samples),
        }

    def _packed(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        lengths = torch.tensor([sample.length for sample in samples])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return {
            "input_ids": torch.tensor([_tokens(samples)]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            "key_groups": torch.cat([self._key_groups(sample) for sample in samples])[None],
            "query_positions": bounds[:-1, None] + self._rows(samples),
            "cu_seqlens": bounds.to(torch.int32),
        }

    def _within_budget(self, samples: Sequence[_Sample]) -> list[list[_Sample]]:
        """The samples in as few parts within the budget as first-fit-decreasing finds."""
        tokens = self.tokens_per_batch
        if tokens is None:
            return [list(samples)]
        parts: list[list[_Sample]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda sample: sample.length, reverse=True):
            if sample.length > tokens:
                raise ValueError(f"a {self.noun} of {sample.length} tokens is over tokens_per_batch={tokens}; raise it")
            place = next((i for i, left in enumerate(room) if left >= sample.length), None)
            if place is None:
                parts.append([])
                room.append(tokens)
                place = len(parts) - 1
            parts[place].append(sample)
            room[place] -= sample.length
        return parts


def _tokens(samples: Sequence[Sample]) -> list[int]:
    return [token for sample in samples for token in sample.input_ids[: sample.length]]
