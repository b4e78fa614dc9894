"""Induction heads and retrieval heads of any model at any length, from masses and never N × N.

An induction head (Olsson et al., "In-context Learning and Induction Heads", arXiv 2209.11895) looks from a token at
the token that followed its earlier occurrence. Random tokens that repeat show it: they carry no other information. A
retrieval head (Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574) looks
from the end of a long context at the one passage, the needle, that holds the answer. Here a head is scored by its mass
on the needle, not by what it copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from abft.evaluation.batching import evaluation_mode
from abft.models.attention import transformer_of
from abft.models.loading import context_of
from abft.models.masses import layer_masses
from abft_kernels.validation import MAX_GROUPS

__all__ = ["HeadScores", "induction_scores", "retrieval_scores"]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score of every head.

    Args:
        scores: `(L, H)`, floating point; of retrieval scores, for instance, the mean over depths.

    Raises:
        ValueError: another number of dimensions.
    """

    scores: Tensor

    def __post_init__(self) -> None:
        if self.scores.dim() != 2:
            raise ValueError(
                f"scores must be (layers, heads), got shape {tuple(self.scores.shape)}; of retrieval scores pass one "
                "depth, or scores.mean(0)"
            )

    def top(self, n: int = 10) -> list[tuple[int, int, float]]:
        """Return the n heads of highest score, highest first, as (layer, head, score); all of them if there are fewer.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be 1 or more, got {n}")
        values, indices = self.scores.flatten().topk(min(n, self.scores.numel()))
        heads = self.scores.shape[1]
        return [(i // heads, i % heads, score) for i, score in zip(indices.tolist(), values.tolist(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as nested lists, and the ten best heads, for JSON."""
        top = [{"layer": layer, "head": head, "score": score} for layer, head, score in self.top()]
        return {"scores": self.scores.tolist(), "top": top}


@torch.inference_mode()
def induction_scores(
    model: PreTrainedModel | PeftModel,
    *,
    length: int,
    repeats: int = 2,
    rows: int = 16,
    samples: int = 4,
    seed: int = 0,
    vocabulary: Sequence[int] | None = None,
    progress: bool = True,
) -> Tensor:
    """Measure how much each head looks at the token that it would copy, on a random block of tokens that repeats.

    The block has `length // repeats` tokens. In the last copy, `rows` tokens, evenly spaced, are asked for their mass
    on the tokens that followed their earlier occurrences, one in each earlier copy. Memory is linear in the length;
    samples run one at a time.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        length: tokens of a sample; those beyond `repeats` whole blocks are left off.
        repeats: copies of the block, 2 or more.
        rows: tokens asked per sample, 1 to 16, fewer than the block has.
        samples: random blocks.
        seed: seed of their tokens.
        vocabulary: token ids to draw from, uniformly and with replacement. Default: all of the model's, special tokens
            included.
        progress: show a progress bar.

    Returns:
        Mean mass per layer and head, `(L, H)` float32 on the CPU, from 0 to 1.

    Raises:
        ValueError: a number out of its range, a block too short for the rows, a length beyond the model's context,
            token ids that the model lacks, or a model on another attention.
        NotImplementedError: a layer's attention does not come through transformers' attention interface.
    """
    if repeats < 2 or samples < 1:
        raise ValueError(f"repeats must be 2 or more and samples 1 or more, got {repeats} and {samples}")
    if not 1 <= rows <= MAX_GROUPS:
        raise ValueError(f"rows must be 1 to {MAX_GROUPS}, as many as there may be key groups, got {rows}")
    block = length // repeats
    if block <= rows:
        raise ValueError(
            f"length={length} in {repeats} copies leaves {block} tokens to a block, and {rows} rows need more than as "
            f"many; pass a length of {repeats * (rows + 1)} or more, or fewer rows"
        )
    _check_length(model, block * repeats)
    known = transformer_of(model).config.get_text_config().vocab_size
    drawn_from = torch.arange(known) if vocabulary is None else torch.tensor(list(vocabulary), dtype=torch.long)
    if not len(drawn_from) or drawn_from.min() < 0 or drawn_from.max() >= known:
        raise ValueError(f"vocabulary must hold token ids from 0 to {known - 1}, got {vocabulary!r:.80}")

    device = next(model.parameters()).device
    # Not the last token: what followed it in the copy before is this copy's own first token.
    asked = torch.linspace(block * (repeats - 1), block * repeats - 2, rows, dtype=torch.float64).round().long()
    key_groups = torch.full((1, block * repeats), -1, dtype=torch.int8)
    for copies_back in range(1, repeats):
        key_groups[0, asked - copies_back * block + 1] = torch.arange(rows, dtype=torch.int8)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    with evaluation_mode(model):
        for _ in track(range(samples), description="Looking for induction heads", disable=not progress):
            ids = drawn_from[torch.randint(len(drawn_from), (block,), generator=generator)].repeat(repeats)
            masses = layer_masses(
                model,
                input_ids=ids[None].to(device),
                key_groups=key_groups.to(device),
                query_positions=asked[None].to(device),
                num_groups=rows,
            )
            # [1, H, R, G]: of row r, the group r.
            own = [mass[0].diagonal(dim1=-2, dim2=-1).mean(-1).float().cpu() for mass in masses]
            total = total + torch.stack(own)
    return total / samples


@torch.inference_mode()
def retrieval_scores(
    model: PreTrainedModel | PeftModel,
    haystack_ids: Sequence[int],
    needle_ids: Sequence[int],
    question_ids: Sequence[int],
    *,
    depths: Sequence[float],
    prefix_ids: Sequence[int] = (),
    progress: bool = True,
) -> Tensor:
    """Measure how much each head looks from the last token of a question at a needle in a long context.

    The context is prefix, haystack with the needle inserted, question. Compare the scores with the share of the
    context that the needle is, which is what a head that looks everywhere alike would give.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        haystack_ids: token ids, as a sequence or a tensor of one dimension.
        needle_ids: token ids of the passage whose mass is measured.
        question_ids: token ids after the haystack; the last one is the query.
        depths: where the needle is inserted, each from 0 (before the haystack) to 1 (after it).
        prefix_ids: token ids before all of it at every depth, such as BOS.
        progress: show a progress bar.

    Returns:
        Mass on the needle per depth, layer and head, `(D, L, H)` float32 on the CPU.

    Raises:
        ValueError: no needle, question or depths, a depth out of range, a context longer than the model's, token ids
            that the model lacks, or a model on another attention.
        NotImplementedError: a layer's attention does not come through transformers' attention interface.
    """
    parts = {
        "haystack_ids": haystack_ids,
        "needle_ids": needle_ids,
        "question_ids": question_ids,
        "prefix_ids": prefix_ids,
    }
    ids = {name: torch.as_tensor(part, dtype=torch.long).cpu() for name, part in parts.items()}
    known = transformer_of(model).config.get_text_config().vocab_size
    for name, part in ids.items():
        if part.dim() != 1 or (name in ("needle_ids", "question_ids") and not len(part)):
            raise ValueError(f"{name} must be one or more token ids in one dimension, got shape {tuple(part.shape)}")
        if len(part) and (part.min() < 0 or part.max() >= known):
            raise ValueError(f"{name} must lie from 0 to {known - 1}, got {int(part.min())} to {int(part.max())}")
    if not len(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be one or more numbers from 0 to 1, got {list(depths)}")
    haystack, needle, question, prefix = ids.values()
    length = sum(map(len, ids.values()))
    _check_length(model, length)

    device = next(model.parameters()).device
    last = torch.tensor([[length - 1]], device=device)
    scores = []
    with evaluation_mode(model):
        for depth in track(depths, description="Looking for retrieval heads", disable=not progress):
            cut = round(depth * len(haystack))
            context = torch.cat([prefix, haystack[:cut], needle, haystack[cut:], question])
            key_groups = torch.full((1, length), -1, dtype=torch.int8)
            key_groups[0, len(prefix) + cut : len(prefix) + cut + len(needle)] = 0
            masses = layer_masses(
                model,
                input_ids=context[None].to(device),
                key_groups=key_groups.to(device),
                query_positions=last,
                num_groups=1,
            )
            scores.append(torch.stack([mass[0, :, 0, 0].float().cpu() for mass in masses]))
    return torch.stack(scores)


def _check_length(model: PreTrainedModel | PeftModel, length: int) -> None:
    limit = context_of(transformer_of(model).config)
    if limit is not None and length > limit:
        raise ValueError(f"{length} tokens are beyond the model's context of {limit}; pass fewer")
