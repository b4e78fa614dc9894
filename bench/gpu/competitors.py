"""The competitors of the kernels: every other way to get an attention output, a mass, or both.

Each takes q `(B, H, N, D)`, k and v `(B, H_kv, N, D)` and key groups `(B, N)`, causal, and returns its results; it
raises where it cannot run. A training step would use `out`, and `mass` where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import abft_kernels

__all__ = ["COMPILED_ROW", "EAGER", "FLEX", "FUSED", "OURS", "ROWS", "Attention", "Flex", "eager_bytes"]

EAGER = "eager"
COMPILED_ROW = "PyTorch, compiled"
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, ...]]


def _ours(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    return abft_kernels.mass_attention(q, k, v, groups, num_groups, backend="triton")


def _ours_without_mass(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    return (abft_kernels.attention(q, k, v, backend="triton"),)


def _expanded(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _eager(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    """Compute as transformers' eager attention: N × N scores in the input dtype, softmax in float32."""
    scores = q @ _expanded(k, q.shape[1]).transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1, dtype=torch.float32).to(q.dtype)
    return weights @ _expanded(v, q.shape[1]), weights @ _indicator(groups, num_groups, q.dtype)[:, None]


def eager_bytes(batch: int, heads: int, n: int, element_size: int) -> int:
    """Return the bytes of the N × N tensors that `_eager` holds at once, forward and backward.

    Kept for backward: the probabilities in float32 and rounded. On top of them comes their gradient in both types.
    The causal mask has a byte for each pair, once.
    """
    return batch * heads * n * n * 2 * (4 + element_size) + n * n


def _indicator(groups: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    return (groups[..., None] == torch.arange(num_groups, device=groups.device)).to(dtype)


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
        grouped = q.shape[1] != k.shape[1]
        if grouped and backend is SDPBackend.EFFICIENT_ATTENTION:  # it has no grouped queries
            k, v, grouped = _expanded(k, q.shape[1]), _expanded(v, q.shape[1]), False
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped),)

    return attention


def recomputed_row(q_row: Tensor, k: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the mass `(B, H, 1, G)` of the last row in plain PyTorch: q Kᵀ, softmax, a product with the indicator."""
    batch, heads, rows, head_dim = q_row.shape
    packed = q_row.reshape(batch, k.shape[1], heads // k.shape[1] * rows, head_dim)
    scores = (packed @ k.transpose(-1, -2)).float() / math.sqrt(head_dim)
    mass = torch.softmax(scores, -1) @ _indicator(groups, num_groups, torch.float32)[:, None]
    return mass.reshape(batch, heads, rows, num_groups)


def _flash_and_row(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    out = _sdpa(SDPBackend.FLASH_ATTENTION)(q, k, v, groups, num_groups)[0]
    return out, recomputed_row(q[:, :, -1:], k, groups, num_groups)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    from flash_attn import flash_attn_func

    return (flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2),)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return ((out[0] if isinstance(out, tuple) else out).transpose(1, 2),)


def _causal(b: Any, h: Any, row: Any, key: Any) -> Any:
    return row >= key


class Flex:
    """FlexAttention, compiled for the shapes of one call; not compiled on a CPU, where it has no backward pass."""

    def __init__(self, compiled: bool = True) -> None:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        self.create = create_block_mask
        self._lse = AuxRequest(lse=True)
        self._attention = compiled_alone(flex_attention) if compiled else flex_attention

    def out(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Return the output."""
        return self._attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def out_and_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """Return the output and the LSE."""
        grouped = q.shape[1] != k.shape[1]
        out, more = self._attention(q, k, v, block_mask=mask, enable_gqa=grouped, return_aux=self._lse)
        return out, more.lse


def compiled_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled for exact shapes, without those compiled before.

    PyTorch runs a function uncompiled from its ninth shape on.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def flex_columns(flex: Flex, q: Tensor, groups: Tensor, num_groups: int) -> Attention:
    """Return attention with an indicator column of V for each group, padded to a width that the kernel takes.

    The block mask is made here, once.
    """
    mask = flex.create(_causal, None, None, q.shape[2], q.shape[2], device=q.device)

    def attention(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
        columns = _indicator(groups, num_groups, v.dtype)[:, None].expand(-1, v.shape[1], -1, -1)
        width = 1 << (v.shape[-1] + num_groups - 1).bit_length()
        wide = F.pad(torch.cat([v, columns], -1), (0, width - v.shape[-1] - num_groups))
        out = flex.out(q, k, wide, mask)
        return out[..., : v.shape[-1]], out[..., v.shape[-1] : v.shape[-1] + num_groups]

    return attention


def flex_second_lse(flex: Flex, q: Tensor, groups: Tensor, num_groups: int) -> Attention:
    """Return attention with masses exp(LSE_g − LSE), from a second attention over the keys of each group.

    The keys of each group are found here, once, as their number has to be read back; so are the block masks made.
    """
    batch, n = groups.shape
    causal = flex.create(_causal, None, None, n, n, device=q.device)
    chosen = []
    for g in range(num_groups):
        kept = (groups == g).nonzero()[:, 1].view(batch, -1)  # as many in every sample

        def visible(b: Any, h: Any, row: Any, key: Any, kept: Tensor = kept) -> Any:
            return row >= kept[b, key]

        mask = flex.create(visible, batch, None, n, kept.shape[1], device=q.device)
        chosen.append((kept[:, None, :, None], mask))

    def attention(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, ...]:
        out, lse = flex.out_and_lse(q, k, v, causal)
        masses = []
        for kept, mask in chosen:
            keys, values = (x.gather(2, kept.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
            masses.append(torch.exp(flex.out_and_lse(q, keys, values, mask)[1] - lse))
        return out, torch.stack(masses, -1)

    return attention


OURS: dict[str, Attention] = {"abft, sparse": _ours, "abft, dense": _ours, "abft, no mass": _ours_without_mass}

# name -> function, and the longest sequence that it is tried at.
FUSED: dict[str, tuple[Attention, int]] = {
    "SDPA flash": (_sdpa(SDPBackend.FLASH_ATTENTION), 1 << 20),
    "SDPA cuDNN": (_sdpa(SDPBackend.CUDNN_ATTENTION), 1 << 20),
    "SDPA efficient": (_sdpa(SDPBackend.EFFICIENT_ATTENTION), 1 << 15),
    "SDPA flash + PyTorch row": (_flash_and_row, 1 << 20),
    EAGER: (_eager, 1 << 20),
    "flash-attn 2": (_flash_attn, 1 << 20),
    "flash-attn 3": (_flash_attn_3, 1 << 20),
}
# Each is built for the shape of q and the groups, before anything is timed.
FLEX: dict[str, Callable[[Flex, Tensor, Tensor, int], Attention]] = {
    "FlexAttention, V columns": flex_columns,
    "FlexAttention, second LSE": flex_second_lse,
}


ROWS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "PyTorch": lambda: recomputed_row,
    COMPILED_ROW: lambda: compiled_alone(recomputed_row),
}
