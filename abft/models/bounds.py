"""`Bounds`: the masking facts of an attention layer, in place of an N × N mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abft_kernels.masking import SeenKeys

__all__ = ["Bounds", "token_mask"]


def token_mask(seq_lens: Tensor, seq_starts: Tensor | None, length: int) -> Tensor:
    """Return a padding mask `(B, length)`, bool, True at tokens."""
    positions = torch.arange(length, device=seq_lens.device)
    starts = torch.zeros_like(seq_lens) if seq_starts is None else seq_starts
    return (positions >= starts[:, None]) & (positions < (starts + seq_lens)[:, None])


class Bounds(SeenKeys):
    """The keys that each row sees, under the names of the kernels' keywords: `attention(q, k, v, **bounds.keywords())`.

    Args, where they differ from :func:`abft_kernels.mass_attention`:
        seq_lens: `(B,)` int32, tokens of each padded sample; None for all N.
        seq_starts: `(B,)` int32, first token of each sample, for left padding; None for 0.
        seq_ends: `(B,)` int32, the sum of the two where :meth:`of_samples` made it: once a batch, not in every layer.
        cu_seqlens: `(S + 1,)` int32, bounds of S packed sequences (batch size 1).
    """

    __slots__ = ()

    @classmethod
    def of_samples(cls, seq_lens: Tensor, seq_starts: Tensor | None) -> Bounds:
        """Return the bounds of padded samples, in the dtype that the kernels take."""
        lengths = seq_lens.to(torch.int32)
        if seq_starts is None:
            return cls(seq_lens=lengths)
        starts = seq_starts.to(torch.int32)
        return cls(seq_lens=lengths, seq_starts=starts, seq_ends=starts + lengths)

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of the kernels, which take either lengths or ends."""
        return {**self._asdict(), "seq_lens": self.seq_lens if self.seq_ends is None else None}

    def tokens(self, length: int) -> Tensor | None:
        """Return the padding mask `(B, length)`, bool, True at tokens; None without padding."""
        if self.seq_lens is None:
            return None
        return token_mask(self.seq_lens, self.seq_starts, length)

    def to(self, device: torch.device) -> Bounds:
        """Return the bounds with their tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**moved)
