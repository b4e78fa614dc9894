"""Token sequences of a forward pass, and the keywords of `model(...)` that say where they are.

The layout is known before the pass: the collator makes it, or there is no padding. It reaches the "abft" attention as
the keyword `layout`, and nothing on the way reads a tensor back from the device. transformers gets an attention mask
beside it, made on the device: without one it looks through `position_ids` for packed sequences, which stalls a GPU.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from abft.models.attention import is_enabled, transformer_of
from abft.models.bounds import Bounds, token_mask

__all__ = ["Inputs", "learns_prompts"]


class Inputs(NamedTuple):
    """Token sequences and where they are in a batch: padded, packed, or all of one length.

    Args:
        input_ids: `(B, N)`.
        attention_mask: `(B, N)`, 1 for tokens; padding on either side. It is read once a pass: with a known layout pass
            `seq_lens` instead.
        position_ids: `(B, N)`; None to count from each sequence's first token.
        seq_lens: `(B,)` tokens of each sample.
        seq_starts: `(B,)` first token of each sample, for padding on the left.
        cu_seqlens: bounds `(S + 1,)` of S packed sequences (concatenated along the sequence, batch size 1), from 0
            to N.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    seq_lens: Tensor | None = None
    seq_starts: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def split(cls, arguments: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
        """Return the inputs among keyword arguments, and the other arguments."""
        own = {name: value for name, value in arguments.items() if name in cls._fields}
        return cls(**own), {name: value for name, value in arguments.items() if name not in own}

    def layout(self) -> Bounds | None:
        """Return where the tokens are; None if only the attention mask or the positions tell.

        Raises:
            ValueError: arguments that exclude each other, or packed sequences that do not cover the tokens.
        """
        self._check()
        if self.cu_seqlens is not None:
            return Bounds(cu_seqlens=self.cu_seqlens.to(torch.int32))
        if self.seq_lens is not None:
            return Bounds.of_samples(self.seq_lens, self.seq_starts)
        told_elsewhere = self.attention_mask is not None or self.position_ids is not None
        return None if told_elsewhere else Bounds()

    def keywords(self, model: nn.Module, layout: Bounds | None = None) -> dict[str, Any]:
        """Return these inputs as keyword arguments of `model(...)`.

        Args:
            model: a transformers model, possibly wrapped.
            layout: in place of :meth:`layout`.

        Raises:
            ValueError: as :meth:`layout`.
        """
        inner = transformer_of(model)
        layout = self.layout() if layout is None else layout
        mask = self.attention_mask
        if layout is not None and layout.seq_lens is not None:
            mask = token_mask(layout.seq_lens, layout.seq_starts, self.input_ids.shape[1]).long()
        keywords: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": mask}
        if "position_ids" in inspect.signature(inner.forward).parameters:  # not for ALiBi and recurrent models
            keywords["position_ids"] = self._positions(mask)
        if layout is not None and is_enabled(inner) and not learns_prompts(model):
            keywords["layout"] = layout
            if mask is None:
                keywords["attention_mask"] = torch.ones_like(self.input_ids)
        return keywords

    def _positions(self, mask: Tensor | None) -> Tensor | None:
        """Return the positions of the tokens in their own sequences; None to let the model count."""
        if self.position_ids is not None:
            return self.position_ids
        if self.cu_seqlens is not None:
            tokens = torch.arange(self.input_ids.shape[1], device=self.cu_seqlens.device)
            bounds = self.cu_seqlens.long()
            return (tokens - bounds[torch.searchsorted(bounds, tokens, right=True) - 1])[None]
        return None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)

    def _check(self) -> None:
        for name in ("attention_mask", "seq_lens"):
            if self.cu_seqlens is not None and getattr(self, name) is not None:
                raise ValueError(f"cu_seqlens and {name} exclude each other: packed prompts have no padding")
        if self.attention_mask is not None and self.seq_lens is not None:
            raise ValueError("seq_lens and attention_mask both tell the padding; pass one of them")
        if self.seq_starts is not None and self.seq_lens is None:
            raise ValueError("seq_starts needs seq_lens: pass the number of tokens of each sample too")
        if self.cu_seqlens is None:
            return
        samples, length = self.input_ids.shape
        # Reading it would stall a GPU, and torch.compile cannot trace it.
        readable = self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
        if samples != 1 or (readable and int(self.cu_seqlens[-1]) != length):
            raise ValueError(
                f"cu_seqlens ends at {int(self.cu_seqlens[-1])}; input_ids must be one packed row of as many tokens, "
                f"got shape {tuple(self.input_ids.shape)}"
            )


def learns_prompts(model: nn.Module) -> bool:
    """Return True if PEFT adds prompt tokens of its own, which no layout of the batch covers."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
