"""The `torch` backend: PyTorch's own attention beside a recomputation of the wanted rows.

Works on every device and dtype, and holds no N × N tensor: the output comes from
`scaled_dot_product_attention`, which is given masks that it can apply without one, and rows of scores are
recomputed a few at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores held at once by the row recomputation, and rows for which an explicit (rows × keys) mask is cheaper
# than squaring the problem. Both only trade time for memory.
_SCORE_ELEMENTS = 1 << 24
_MASKED_ROWS = 128


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_valid(positions: Tensor, starts: Tensor | None, ends: Tensor | None, n_k: int) -> Tensor:
    """`(B, R)` bool: rows that stand on one of their sample's own tokens."""
    low = 0 if starts is None else starts[:, None]
    high = n_k if ends is None else ends[:, None]
    return (positions >= low) & (positions < high)


def _key_valid(starts: Tensor | None, ends: Tensor, n_k: int) -> Tensor:
    """`(B, N)` bool: keys that are one of their sample's own tokens."""
    keys = torch.arange(n_k, device=ends.device)
    valid = keys < ends[:, None]
    return valid if starts is None else valid & (keys >= starts[:, None])


def _zero_outside(x: Tensor, valid: Tensor) -> Tensor:
    """`(B, H, N, D)` with 0 in the rows that are not `valid` `(B, N)`."""
    return x.masked_fill(~valid[:, None, :, None], 0.0)


class _RowChunks:
    """Scores of a few rows at a time, all query heads of a KV head together.

    Absent rows and padded keys are read as 0, so that what stands there, NaN too, has no effect.
    """

    def __init__(self, q, k, positions, starts, ends, causal, scale):
        self.dtype = _accumulation_dtype(q.dtype)
        self.batch, self.heads, self.num_rows, self.head_dim = q.shape
        self.kv_heads, self.num_keys = k.shape[1], k.shape[2]
        self.valid = _row_valid(positions, starts, ends, k.shape[2])
        self.q = _zero_outside(q, self.valid)
        self.k = k.to(self.dtype)
        if ends is not None:
            self.k = _zero_outside(self.k, _key_valid(starts, ends, k.shape[2]))
        self.positions, self.starts, self.ends = positions, starts, ends
        self.causal, self.scale = causal, scale

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Slices of R, each with the slice of N that its rows can see."""
        per_row = max(1, self.batch * self.heads * self.num_keys)
        step = max(1, _SCORE_ELEMENTS // per_row)
        for first in range(0, self.num_rows, step):
            rows = slice(first, min(first + step, self.num_rows))
            yield rows, slice(0, self._last_key(rows))

    def _last_key(self, rows: slice) -> int:
        # Only where reading the positions does not stall a GPU stream.
        if not self.causal or self.positions.device.type != "cpu" or self.batch == 0:
            return self.num_keys
        return min(self.num_keys, max(1, int(self.positions[:, rows].amax()) + 1))

    def pack(self, x: Tensor, rows: slice) -> Tensor:
        """`(B, H, R, …)` → `(B, Hkv, group·r, …)` for the rows of one chunk, in the accumulation dtype."""
        x = x[:, :, rows].to(self.dtype)
        return x.reshape(self.batch, self.kv_heads, self.heads // self.kv_heads * x.shape[2], *x.shape[3:])

    def unpack(self, x: Tensor) -> Tensor:
        group = self.heads // self.kv_heads
        return x.reshape(self.batch, self.heads, x.shape[2] // group, *x.shape[3:])

    def scores(self, rows: slice, keys: slice) -> Tensor:
        scores = (self.pack(self.q, rows) @ self.k[:, :, keys].transpose(-1, -2)) * self.scale
        index = torch.arange(keys.stop, device=scores.device)
        visible = self.valid[:, rows, None].expand(-1, -1, keys.stop)
        if self.causal:
            visible = visible & (index <= self.positions[:, rows, None])
        if self.starts is not None:
            visible = visible & (index >= self.starts[:, None, None])
        if self.ends is not None:
            visible = visible & (index < self.ends[:, None, None])
        group = self.heads // self.kv_heads
        hidden = ~visible[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
        return scores.masked_fill_(hidden, float("-inf"))


def _indicator(groups: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    index = torch.arange(num_groups, device=groups.device, dtype=groups.dtype)
    return (groups[:, :, None] == index).to(dtype)[:, None]  # [B, 1, N, G]


def row_mass_forward(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    num_groups: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Mass `(B, H, R, G)` and natural-log LSE `(B, H, R)` of the rows, float32 (float64 for float64)."""
    chunks = _RowChunks(q, k, positions, starts, ends, causal, scale)
    indicator = _indicator(groups, num_groups, chunks.dtype)
    mass = q.new_empty((*q.shape[:3], num_groups), dtype=chunks.dtype)
    lse = q.new_empty(q.shape[:3], dtype=chunks.dtype)
    for rows, keys in chunks.slices():
        scores = chunks.scores(rows, keys)
        chunk_lse = torch.logsumexp(scores, dim=-1)
        finite = chunk_lse.masked_fill(chunk_lse == float("-inf"), 0.0)
        probabilities = scores.sub_(finite[..., None]).exp_()
        mass[:, :, rows] = chunks.unpack(probabilities @ indicator[:, :, keys])
        lse[:, :, rows] = chunks.unpack(chunk_lse)
    return mass, lse


def row_mass_backward(
    dmass: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    mass: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dq `(B, H, R, D)` and dk `(B, Hkv, N, D)`: dS = P·(Σ_g dmass_g (w_g − mass_g) + dlse)."""
    chunks = _RowChunks(q, k, positions, starts, ends, causal, scale)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(chunks.k, memory_format=torch.contiguous_format)
    indicator = _indicator(groups, mass.shape[-1], chunks.dtype).transpose(-1, -2)
    for rows, keys in chunks.slices():
        chunk_lse = chunks.pack(lse, rows)
        no_key = chunk_lse == float("-inf")
        scores = chunks.scores(rows, keys)
        ds = scores.sub_(chunk_lse.masked_fill(no_key, 0.0)[..., None]).exp_()
        slope = torch.zeros_like(chunk_lse) if dlse is None else chunks.pack(dlse, rows).masked_fill(no_key, 0)
        if dmass is None:
            ds = ds.mul_(slope[..., None])
        else:
            packed = chunks.pack(dmass, rows).masked_fill(no_key[..., None], 0)
            slope = slope - (packed * chunks.pack(mass, rows)).sum(-1)
            ds = ds.mul_((packed @ indicator[..., keys]).add_(slope[..., None]))
        dq[:, :, rows] = chunks.unpack((ds @ chunks.k[:, :, keys]) * scale).to(dq.dtype)
        dk[:, :, keys] += (ds.transpose(-1, -2) @ chunks.pack(chunks.q, rows)) * scale
    return dq, dk.to(k.dtype)


def _roll(x: Tensor, shift: Tensor) -> Tensor:
    """Rolls each sample of `(B, H, N, D)` left by its own shift `(B,)`."""
    length = x.shape[2]
    index = (torch.arange(length, device=x.device) + shift[:, None]) % length
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    # PyTorch falls back to an N × N form where its kernels cannot run: for them the last dimension must be
    # contiguous, and heads equal in number if there is a mask or, on a GPU, in float32. On a CPU its grouped
    # gradients of k and v are summed over the heads in 16 bits, with twice the error.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    native_gqa = group > 1 and mask is None and half == (q.device.type != "cpu")
    if group > 1 and not native_gqa:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=native_gqa
    )


def attention_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Output `(B, H, N_q, D)` of PyTorch's attention under the same mask; padded rows are 0.

    Padding needs no N × N mask: after each sample is rolled to the left edge, plain causal attention is exact
    for its tokens. Queries shorter than the keys are masked explicitly while that costs O(N), and squared with
    absent rows otherwise.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    if causal and n_q > n_k:  # the surplus leading rows see no key
        seen = attention_output(
            q[:, :, n_q - n_k :], k, v, positions[:, n_q - n_k :], starts, ends, True, scale, dropout_p
        )
        return torch.cat([seen.new_zeros((*q.shape[:2], n_q - n_k, v.shape[3])), seen], dim=2)
    valid = _row_valid(positions, starts, ends, n_k)
    if ends is not None:
        keys = _key_valid(starts, ends, n_k)
        q, k, v = _zero_outside(q, valid), _zero_outside(k, keys), _zero_outside(v, keys)
    if not causal or n_q == 1 or (n_q < n_k and n_q <= _MASKED_ROWS):
        mask = _explicit_mask(positions, starts, ends, valid, n_k, causal and n_q > 1)
        out = _sdpa(q, k, v, scale, mask, False, dropout_p)
    elif n_q < n_k:
        square = F.pad(q, (0, 0, n_k - n_q, 0))
        rows = torch.arange(n_k, device=q.device).expand(q.shape[0], -1)
        out = attention_output(square, k, v, rows, starts, ends, True, scale, dropout_p)
        return out[:, :, n_k - n_q :]
    elif starts is None:
        out = _sdpa(q, k, v, scale, None, True, dropout_p)
    else:
        q, k, v = (_roll(x, starts) for x in (q, k, v))
        out = _roll(_sdpa(q, k, v, scale, None, True, dropout_p), -starts)
    return out if ends is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def _explicit_mask(
    positions: Tensor, starts: Tensor | None, ends: Tensor | None, valid: Tensor, n_k: int, causal: bool
) -> Tensor | None:
    """Bool `(B, 1, 1 or N_q, N_k)`; None where every key is seen. Absent rows see all keys, which keeps the
    softmax finite; their output is replaced afterwards."""
    if ends is None and not causal:
        return None
    keys = torch.arange(n_k, device=positions.device)
    mask = torch.ones((positions.shape[0], 1, n_k), dtype=torch.bool, device=positions.device)
    if causal:
        mask = keys <= positions[:, :, None]
    if starts is not None:
        mask = mask & (keys >= starts[:, None, None])
    if ends is not None:
        mask = mask & (keys < ends[:, None, None])
        empty = ~valid if causal else (~valid).all(dim=1, keepdim=True)
        mask = mask | empty[:, :, None]
    return mask[:, None]
