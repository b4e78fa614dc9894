"""The order in which ICL and fine-tuning attend to the tokens of demonstrations (arXiv 2212.10559).

ICL's attention is the last token's scores before the softmax, added up over the heads. Fine-tuning's is the inner
product of the query vector of the query's last token, in the fine-tuned model, with the query vector that each token of
a demonstration had when its step was made. Both go through a softmax over all these tokens, as in the paper's published
code; an example's attention is the sum of its tokens'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

__all__ = ["TOP", "RankAgreement", "agreement", "top_count"]

TOP = {"token": 100, "example": 5}
"""Tokens and examples whose recall the published code counts."""


def top_count(level: str, count: int) -> int:
    """Return how many of `count` are looked for: the published number, at most half of them, at least one."""
    return max(1, min(TOP[level], count // 2))


@dataclass(frozen=True, eq=False)
class RankAgreement:
    """Agreement of ICL's and fine-tuning's attention to tokens or to examples, `(L, B)` each.

    Args:
        kendall: Kendall's τ of the two.
        kendall_random: of ICL's and uniform random numbers, mean over draws.
        recall: share of ICL's top ones that are among fine-tuning's.
    """

    kendall: Tensor
    kendall_random: Tensor
    recall: Tensor


def agreement(
    icl: Tensor, tuned: Tensor, sizes: Sequence[int], generator: np.random.Generator, draws: int
) -> dict[str, RankAgreement]:
    """Return the agreement by level, "token" and "example".

    Args:
        icl, tuned: `(L, B, T)` scores of both on the T tokens of the demonstrations, before the softmax.
        sizes: tokens of each demonstration; T together.
        generator: of the random numbers.
        draws: random draws.
    """
    first, second = (scores.double().softmax(-1) for scores in (icl, tuned))
    return {
        "token": _agreement("token", first, second, generator, draws),
        "example": _agreement("example", _by_example(first, sizes), _by_example(second, sizes), generator, draws),
    }


def _by_example(weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.stack([part.sum(-1) for part in weights.split(list(sizes), dim=-1)], dim=-1)


def _agreement(level: str, icl: Tensor, tuned: Tensor, generator: np.random.Generator, draws: int) -> RankAgreement:
    count = icl.shape[-1]
    top = top_count(level, count)
    best = [torch.zeros_like(x).scatter_(-1, x.topk(top).indices, 1.0) for x in (icl, tuned)]
    kendall, random = np.zeros(icl.shape[:2]), np.zeros(icl.shape[:2])
    for place in np.ndindex(*icl.shape[:2]):
        row = icl[place].numpy()
        kendall[place] = _tau(row, tuned[place].numpy())
        random[place] = np.mean([_tau(row, generator.random(count)) for _ in range(draws)])
    return RankAgreement(
        torch.from_numpy(kendall).float(),
        torch.from_numpy(random).float(),
        ((best[0] * best[1]).sum(-1) / top).float(),
    )


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's τ; 0 where an order does not exist, because all values of one are equal."""
    return float(np.nan_to_num(kendalltau(a, b).statistic))
