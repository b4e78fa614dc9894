"""Batches of samples: token ids, key groups, the rows whose masses are wanted and their counts, padded or packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from abft.prompts.targets import AttentionTarget

__all__ = [
    "CORRECT_LABELS",
    "MASS_INPUTS",
    "MODEL_INPUTS",
    "NO_GROUP",
    "NO_LABEL",
    "WRONG_LABELS",
    "Collator",
    "padding_id",
]

CORRECT_LABELS = 0
"""Key group of I⁺, the positive keys: of a prompt, the demonstration labels equal to the query's gold label."""
WRONG_LABELS = 1
"""Key group of I⁻, the negative keys: of a prompt, the other demonstration labels."""
NO_GROUP = -1
"""Key group of every other token."""
NO_LABEL = -100
"""Label of a sample without one, which cross-entropy ignores."""

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "seq_lens", "seq_starts", "cu_seqlens")
"""Entries of a batch that a pass through the model takes, those that the batch has."""
MASS_INPUTS = (*MODEL_INPUTS, "key_groups", "query_positions")
"""Entries of a batch that a pass for masses takes."""


def padding_id(*sources: Any) -> int:
    """Return the padding token of the first source that has one, or its EOS; 0 if no source has either.

    No token attends to padding, so its value does not matter.

    Args:
        sources: sets of prompts, tokenizers, or configurations of models.
    """
    for source in sources:
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(source, name, None)
            if token is not None:
                return token[0] if isinstance(token, list) else token
    return 0


class Collator:
    """Makes a batch out of prompts or other attention targets; fit to be the ``collate_fn`` of a ``DataLoader``.

    Args:
        pad_token_id: token that fills padding; no token attends to it.
        padding_side: side of the padding; with "left" all last query positions are in the last column.
        packing: concatenate the samples along the sequence dimension (batch size 1), without padding.
        tokens_per_batch: most tokens of a batch, padding included; more become several ``parts``.

    Raises:
        ValueError: ``padding_side`` is neither "right" nor "left".
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        padding_side: Literal["right", "left"] = "right",
        packing: bool = False,
        tokens_per_batch: int | None = None,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.packing, self.tokens_per_batch = packing, tokens_per_batch

    def __call__(self, samples: Sequence[AttentionTarget]) -> dict[str, Any]:
        """Collate B samples of up to R rows each.

        N is the length of the longest sample, or with packing the sum of the lengths. A prompt has one row, its last
        token; its positive and negative keys are the first tokens of its demonstrations' labels, correct and wrong.

        Returns:
            A dictionary of tensors on the CPU, int64 unless another dtype is named:

            - ``input_ids`` (B, N): padded token ids.
            - ``seq_lens`` (B,) int32: tokens of each sample; with padding on the left also ``seq_starts`` (B,) int32.
            - ``position_ids`` (B, N): 0, 1, … over a sample's own tokens; 0 at padding.
            - ``key_groups`` (B, N) int8: ``CORRECT_LABELS`` (0) at positive keys, ``WRONG_LABELS`` (1) at negative
              ones, ``NO_GROUP`` (-1) elsewhere.
            - ``query_positions`` (B, R): columns of the rows; a sample with fewer rows repeats its last one.
            - ``row_weights`` (B, R) float32: weight of a row in its sample's loss, 1 / rows; 0 for a repeated row.
            - ``prompt_lengths`` (B, R): number of tokens that the row sees; for a prompt, its length.
            - ``demonstrations`` (B, R): number of target keys that the row sees; for a prompt, k.
            - ``correct_demonstrations`` (B, R): number of positive keys, the size of I⁺.
            - ``labels`` (B,): for a prompt, the class index of the gold label; for other targets, ``label_ids``.
            - ``label_ids`` (B,): the token that should follow; for a prompt, the first token of the gold label.
              ``NO_LABEL`` (-100) if the sample has none.

            Samples of one length have no padding, and no ``seq_lens``, ``seq_starts`` and ``position_ids``: a pass
            without them spares its layers the work for padding. With packing the entries (B, N) are (1, N),
            ``query_positions`` counts over all of them, and in place of ``seq_lens`` ``cu_seqlens`` (B + 1,) int32
            holds the bounds; one sample alone has neither. If the samples exceed ``tokens_per_batch``, the
            only entry is ``parts``: a list of such dictionaries, each within the budget.

        Raises:
            ValueError: there are no samples, or one is longer than ``tokens_per_batch``.
        """
        if not samples:
            raise ValueError("cannot collate an empty list of samples; pass one or more")
        parts = [{**self._layout(part), **_counts(part)} for part in self._within_budget(samples)]
        return parts[0] if len(parts) == 1 else {"parts": parts}

    def _layout(self, samples: Sequence[AttentionTarget]) -> dict[str, Tensor]:
        """Return the entries of the tokens; one sample alone needs neither padding nor bounds."""
        return self._packed(samples) if self.packing and len(samples) > 1 else self._padded(samples)

    def _padded(self, samples: Sequence[AttentionTarget]) -> dict[str, Tensor]:
        lengths = torch.tensor([sample.length for sample in samples])
        shape = (len(samples), int(lengths.max()))
        starts = shape[1] - lengths if self.padding_side == "left" else torch.zeros_like(lengths)
        # Each token's index in its own sample; negative or past the end at padding.
        offsets = torch.arange(shape[1]) - starts[:, None]
        mask = (offsets >= 0) & (offsets < lengths[:, None])
        input_ids = torch.full(shape, self.pad_token_id)
        input_ids[mask] = torch.tensor(_tokens(samples))
        key_groups = torch.full(shape, NO_GROUP, dtype=torch.int8)
        key_groups[mask] = torch.cat([_key_groups(sample) for sample in samples])
        padding = {}
        if int(lengths.min()) < shape[1]:
            padding = {"position_ids": offsets.where(mask, 0), "seq_lens": lengths.to(torch.int32)}
            if self.padding_side == "left":
                padding["seq_starts"] = starts.to(torch.int32)
        return {
            "input_ids": input_ids,
            **padding,
            "key_groups": key_groups,
            "query_positions": starts[:, None] + _rows(samples),
        }

    def _packed(self, samples: Sequence[AttentionTarget]) -> dict[str, Tensor]:
        lengths = torch.tensor([sample.length for sample in samples])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return {
            "input_ids": torch.tensor([_tokens(samples)]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            "key_groups": torch.cat([_key_groups(sample) for sample in samples])[None],
            "query_positions": bounds[:-1, None] + _rows(samples),
            "cu_seqlens": bounds.to(torch.int32),
        }

    def _within_budget(self, samples: Sequence[AttentionTarget]) -> list[list[AttentionTarget]]:
        """Divide the samples into few parts within the budget: packed by first-fit decreasing, padded by length.

        Samples that fit in one part keep their order.
        """
        tokens = self.tokens_per_batch
        longest = max(sample.length for sample in samples)
        together = sum(sample.length for sample in samples) if self.packing else longest * len(samples)
        if tokens is None or together <= tokens:
            return [list(samples)]
        parts: list[list[AttentionTarget]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda sample: sample.length, reverse=True):
            if sample.length > tokens:
                raise ValueError(f"a sample of {sample.length} tokens is over tokens_per_batch={tokens}; raise it")
            place = next((i for i, left in enumerate(room) if left >= sample.length), None)
            if place is None:
                parts.append([])
                # A padded part is as wide as its first sample, its longest: it holds a number of samples.
                room.append(tokens if self.packing else tokens // sample.length * sample.length)
                place = len(parts) - 1
            parts[place].append(sample)
            room[place] -= sample.length if self.packing else parts[place][0].length
        return parts


def _tokens(samples: Sequence[AttentionTarget]) -> list[int]:
    return [token for sample in samples for token in sample.input_ids[: sample.length]]


def _key_groups(sample: AttentionTarget) -> Tensor:
    """Return the group of each of a sample's tokens, int8 (length,)."""
    groups = torch.full((sample.length,), WRONG_LABELS if sample.negative is None else NO_GROUP, dtype=torch.int8)
    groups[list(sample.negative or ())] = WRONG_LABELS
    groups[list(sample.positive)] = CORRECT_LABELS
    return groups


def _rows(samples: Sequence[AttentionTarget]) -> Tensor:
    """Return the rows as positions in their own samples, (B, R)."""
    most = max(len(sample.query_positions) for sample in samples)
    own = [list(sample.query_positions) for sample in samples]
    return torch.tensor([rows + rows[-1:] * (most - len(rows)) for rows in own])


def _counts(samples: Sequence[AttentionTarget]) -> dict[str, Tensor]:
    """Return the entries of a batch that padding and packing do not change."""
    rows = _rows(samples)
    own = torch.tensor([[len(sample.query_positions)] for sample in samples])
    positive = torch.tensor([[len(sample.positive)] for sample in samples]).expand_as(rows)
    given = torch.tensor([[-1 if s.negative is None else len(s.positive) + len(s.negative)] for s in samples])
    return {
        "prompt_lengths": rows + 1,
        "demonstrations": torch.where(given < 0, rows + 1, given),
        "correct_demonstrations": positive,
        "row_weights": (torch.arange(rows.shape[1]) < own) / own,
        "labels": _labels(sample.label for sample in samples),
        "label_ids": _labels(sample.label_id for sample in samples),
    }


def _labels(labels: Iterable[int | None]) -> Tensor:
    return torch.tensor([NO_LABEL if label is None else label for label in labels])
