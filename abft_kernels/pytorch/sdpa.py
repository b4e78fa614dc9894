"""Plain attention through PyTorch's own kernels, given masks that they can apply without an N × N tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abft_kernels.call import Call
from abft_kernels.pytorch.packing import padded

__all__ = ["attention_output", "is_plain"]

# Rows for which an explicit (rows × keys) mask is cheaper than squaring the problem: time for memory.
_MASKED_ROWS = 128


# Fields of a call that do not change the output or that PyTorch's attention can follow; all others must be at their
# defaults. `row_offset`, `reach` and `seed` have conditions of their own.
_FOLLOWED = {"groups", "weights", "num_groups", "row_mask", "starts", "ends", "packed", "causal", "scale", "dropout_p"}
_FOLLOWED |= {"key_offset", "row_offset", "reach", "seed", "whole"}
_PLAIN = {name: value for name, value in Call._field_defaults.items() if name not in _FOLLOWED}


def is_plain(n_q: int, n_k: int, call: Call, seeded: bool) -> bool:
    """Return True if PyTorch's attention computes this output: causal or full, padded or packed, and nothing else.

    `seeded`: dropout by a seed, which PyTorch's kernels do not take.
    """
    for name, plain in _PLAIN.items():
        value = getattr(call, name)
        if value is not plain and (isinstance(value, Tensor) or value != plain):
            return False
    limited = 0 < call.reach.window < n_k or any(call.reach._replace(window=0))
    return not limited and call.row_offset == n_k - n_q and not (call.dropout_p and seeded)


def _zero_outside(x: Tensor, valid: Tensor) -> Tensor:
    """Return `(B, H, N, D)` with 0 in the rows that are not `valid` `(B, N)`."""
    return x.masked_fill(~valid[:, None, :, None], 0.0)


def _roll(x: Tensor, shift: Tensor) -> Tensor:
    """Roll each sample of `(B, H, N, D)` left by its own shift `(B,)`."""
    length = x.shape[2]
    index = (torch.arange(length, device=x.device) + shift[:, None]) % length
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: Tensor | None, causal: bool) -> Tensor:
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
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=native_gqa,
    )


def attention_output(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Return the output `(B, H, N_q, D_v)` of PyTorch's attention; rows outside the sequences are 0."""
    if call.packed:
        return _packed(q, k, v, call)
    n_q, n_k = q.shape[2], k.shape[2]
    if call.ends is None and (n_q in (1, n_k) or not call.causal):
        return _sdpa(q, k, v, call, None, call.causal and n_q > 1)
    starts = None if call.starts is None else call.starts[:, None]
    ends = None if call.ends is None else call.ends[:, None]
    return _padded(q, k, v, starts, ends, call, torch.arange(n_q, device=q.device) + (n_k - n_q))


def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    assert call.starts is not None
    assert call.ends is not None
    batch = padded(call.starts, call.ends, q.shape[2]) if call.causal else None
    if batch is not None:  # padding stands after a sequence, where no row of it looks
        out = _sdpa(batch.spread(q), batch.spread(k), batch.spread(v), call, None, True)
        return batch.join(out, q.shape[2])
    pieces = []
    for start, end in zip(call.starts.tolist(), call.ends.tolist(), strict=True):
        one = slice(start, end)
        if end > start:
            pieces.append(_sdpa(q[:, :, one], k[:, :, one], v[:, :, one], call, None, call.causal))
    covered = sum(piece.shape[2] for piece in pieces)
    pieces.append(q.new_zeros((q.shape[0], q.shape[1], q.shape[2] - covered, v.shape[3])))
    return torch.cat(pieces, dim=2)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, call: Call, positions: Tensor
) -> Tensor:
    """Padding needs no N × N mask: after each sample is rolled to the left edge, plain causal attention is exact
    for its tokens. Queries shorter than the keys are masked explicitly while that costs O(N), and squared with
    absent rows otherwise. `starts` and `ends` `(B, 1)`, `positions` `(N_q,)`.
    """
    n_q, n_k, causal = q.shape[2], k.shape[2], call.causal
    if causal and n_q > n_k:  # the surplus leading rows see no key
        seen = _padded(q[:, :, n_q - n_k :], k, v, starts, ends, call, positions[n_q - n_k :])
        return torch.cat([seen.new_zeros((*q.shape[:2], n_q - n_k, v.shape[3])), seen], dim=2)
    valid = torch.ones((q.shape[0], n_q), dtype=torch.bool, device=q.device)
    if ends is not None:
        low = 0 if starts is None else starts
        keys = torch.arange(n_k, device=q.device)
        own = (keys >= low) & (keys < ends)
        valid = (positions >= low) & (positions < ends)
        q, k, v = _zero_outside(q, valid), _zero_outside(k, own), _zero_outside(v, own)
    if not causal or n_q == 1 or (n_q < n_k and n_q <= _MASKED_ROWS):
        mask = _explicit_mask(positions, starts, ends, valid, n_k, causal and n_q > 1)
        out = _sdpa(q, k, v, call, mask, False)
    elif n_q < n_k:
        square = F.pad(q, (0, 0, n_k - n_q, 0))
        out = _padded(square, k, v, starts, ends, call, torch.arange(n_k, device=q.device))
        return out[:, :, n_k - n_q :]
    elif starts is None:
        out = _sdpa(q, k, v, call, None, True)
    else:
        shift = starts[:, 0].long()
        q, k, v = (_roll(x, shift) for x in (q, k, v))
        out = _roll(_sdpa(q, k, v, call, None, True), -shift)
    return out if ends is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def _explicit_mask(
    positions: Tensor, starts: Tensor | None, ends: Tensor | None, valid: Tensor, n_k: int, causal: bool
) -> Tensor | None:
    """Return bool `(B or 1, 1, 1 or N_q, N_k)`; None where every key is seen. Absent rows see all keys, which keeps the
    softmax finite; their output is replaced afterwards."""
    if ends is None and not causal:
        return None
    keys = torch.arange(n_k, device=positions.device)
    mask = torch.ones((1, 1, n_k), dtype=torch.bool, device=positions.device)
    if causal:
        mask = (keys <= positions[:, None])[None]
    if starts is not None:
        mask = mask & (keys >= starts[:, :, None])
    if ends is not None:
        mask = mask & (keys < ends[:, :, None])
        empty = ~valid if causal else (~valid).all(dim=1, keepdim=True)
        mask = mask | empty[:, :, None]
    return mask[:, None]
