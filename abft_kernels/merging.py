"""Merging shards of the keys, and the gradient of sinks: every backend shares them, given masses and LSEs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_masses", "sink_gradient"]


def merge_masses(
    masses: Sequence[Tensor], lses: Sequence[Tensor], outs: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    r"""Puts shards of the keys together, exactly: context parallelism, split-K, a cache in parts.

    .. math:: \mathrm{lse} = \log \sum_s e^{\mathrm{lse}_s}, \qquad
              \mathrm{mass} = \sum_s \mathrm{mass}_s \, e^{\mathrm{lse}_s - \mathrm{lse}}, \qquad \text{out likewise}

    Differentiable in every argument, so that dmass and dlse of each shard follow. A sink is a shard of its own, of
    mass 0 and with its score for LSE.

    Args:
        masses: mass `(…, G)` of each shard, from the same rows and groups.
        lses: natural-log LSE `(…)` of each shard; −inf where its row sees none of its keys.
        outs: output `(…, D)` of each shard; None to leave it out.

    Returns:
        mass `(…, G)` and lse `(…)`, and out `(…, D)` if `outs` is given, in the first shard's dtypes.

    Raises:
        ValueError: no shard, or shards that differ in number or shape.
    """
    if not masses or len(masses) != len(lses) or (outs is not None and len(outs) != len(masses)):
        raise ValueError(
            f"merge_masses needs a mass and an lse of every shard, got {len(masses)} and {len(lses)}"
            + ("" if outs is None else f" and {len(outs)} outputs")
        )
    for mass, lse in zip(masses, lses, strict=True):
        if mass.shape != masses[0].shape or mass.shape[:-1] != lse.shape:
            raise ValueError(
                f"shards must have one shape, mass (…, G) and lse (…): got {tuple(mass.shape)} and "
                f"{tuple(lse.shape)} beside {tuple(masses[0].shape)}"
            )
    stacked = torch.stack(list(lses))
    present = stacked.amax(0) > float("-inf")
    # Rows without a key anywhere are computed at 0 and put back: the gradient of −inf − (−inf) is NaN.
    lse = torch.logsumexp(stacked.masked_fill(~present, 0.0), dim=0)
    shares = torch.exp(stacked - lse) * present

    def merged(parts: Sequence[Tensor]) -> Tensor:
        total = sum(part.to(shares.dtype) * share[..., None] for part, share in zip(parts, shares, strict=True))
        return torch.as_tensor(total).to(parts[0].dtype)

    lse = lse.masked_fill(~present, float("-inf"))
    return (merged(masses), lse) if outs is None else (merged(masses), lse, merged(outs))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ exp(sink − lse)·δ over samples and rows, `(H,)`, from lse and δ `(B, H, R)`.

    A sink holds the probability exp(sink − lse) and nothing else. δ_i = Σ dO·O + Σ_g dmass·mass − dlse.
    """
    present = lse != float("-inf")
    probability = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(~present, 0.0))
    return -(probability * delta).masked_fill(~present, 0.0).sum(dim=(0, 2))
