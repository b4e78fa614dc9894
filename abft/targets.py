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
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft.attention import transformer_of
from abft.batching import evaluation_mode, length_sorted_chunks
from abft.collation import CORRECT_LABELS, NO_GROUP, WRONG_LABELS, Collator, padding_id
from abft.masses import forward_with_mass

__all__ = ["AttentionTarget", "TargetCollator", "TargetEvaluation", "evaluate_targets"]

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


@dataclass(frozen=True, eq=False)
class TargetEvaluation:
    """What a model attends to and predicts on n targets; tensors are on the CPU.

    Args:
        n: number of targets.
        labelled: how many of them have a ``label_id``.
        accuracy: share of the labelled ones whose ``label_id`` is the most probable of all tokens behind the last query
            position; None if there is none.
        accuracy_stderr: standard error of the accuracy, √(a(1−a)/labelled); None likewise.
        positive_mass: (L, H) float32, mass on positive keys, mean over a target's rows and then over targets.
        negative_mass: (L, H) float32, likewise on negative keys.
        predictions: (n,) int64, the most probable token, in the order of the targets.
    """

    n: int
    labelled: int
    accuracy: float | None
    accuracy_stderr: float | None
    positive_mass: Tensor
    negative_mass: Tensor
    predictions: Tensor

    @property
    def best_head(self) -> tuple[int, int]:
        """Layer and head with the largest mass on positive keys."""
        layer, head = divmod(int(self.positive_mass.argmax()), self.positive_mass.shape[1])
        return layer, head

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers, ready for JSON: masses as means over all heads, and of the best head."""
        numbers = {name: getattr(self, name) for name in ("n", "labelled", "accuracy", "accuracy_stderr")}
        return {
            **{name: number for name, number in numbers.items() if number is not None},
            "positive_mass": self.positive_mass.mean().item(),
            "negative_mass": self.negative_mass.mean().item(),
            "best_layer": self.best_head[0],
            "best_head": self.best_head[1],
            "best_head_positive_mass": self.positive_mass.max().item(),
        }


@torch.inference_mode()
def evaluate_targets(
    model: PreTrainedModel | PeftModel,
    targets: Sequence[AttentionTarget],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> TargetEvaluation:
    """Reads where every head looks, and what the model says next, in one pass over ``targets``, batched by length.

    Of the LM head only the row of each last query position is computed. Under tensor parallelism the masses are those
    of the process's own heads. The model runs in evaluation mode, and every
    module is put back into the mode it was in.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`); on any device.
        targets: at least one.
        batch_size: targets per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no targets, ``batch_size`` is not positive, a model on another attention, or one that returned a
            logit that is not finite.
    """
    device = next(model.parameters()).device
    # On the left, so that the rows of which logits are wanted are one column.
    collate = TargetCollator(padding_id(transformer_of(model).config.get_text_config()), padding_side="left")
    predictions = torch.empty(len(targets), dtype=torch.long)
    sums: list[Tensor] = []
    with evaluation_mode(model):
        for chunk in length_sorted_chunks(targets, batch_size, "Reading targets", progress):
            batch = {name: tensor.to(device) for name, tensor in collate([targets[i] for i in chunk]).items()}
            outputs = forward_with_mass(model, **{name: batch[name] for name in _PASSED})
            logits = outputs.logits[:, -1]
            finite = logits.isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"logits of target {chunk[int(finite.int().argmin())]} are not finite; load the model in bfloat16 "
                    "or float32, or train at a lower rate"
                )
            predictions[chunk] = logits.argmax(dim=-1).cpu()
            masses = torch.stack([mass.to(device) for mass in outputs.attentions])  # [L, B, H, R, 2]
            sums.append((masses * batch["row_weights"][:, None, :, None]).sum(dim=(1, 3)).cpu())
    positive, negative = (torch.stack(sums).sum(0) / len(targets)).float().unbind(-1)
    hits = [int(p) == t.label_id for p, t in zip(predictions, targets, strict=True) if t.label_id is not None]
    accuracy = sum(hits) / len(hits) if hits else None
    stderr = None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / len(hits))
    return TargetEvaluation(len(targets), len(hits), accuracy, stderr, positive, negative, predictions)


_PASSED = ("input_ids", "attention_mask", "position_ids", "key_groups", "query_positions")
