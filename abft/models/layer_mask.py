"""From transformers' masks to `Bounds`: what is registered with `AttentionMaskInterface`.

transformers describes a mask by a function of (sample, head, row, key) and a 2-D padding mask. `layer_mask` keeps both
unread in a `LayerMask`, which each attention layer asks for its `Bounds`:

- A pass that knows its layout (`seq_lens` or `cu_seqlens`) hands it over: then the padding mask is never read.
- A mask function that closes over numbers alone is recognised on the CPU, so that no GPU stream is stalled. So are
  transformers' chunks: the tensor of left padding in them says what the layout says.
- Only a padding mask without a layout, or a function that closes over tensors, is read from the device, once a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers.masking_utils import causal_mask_function, chunked_overlay

from abft.models.bounds import Bounds, token_mask

__all__ = ["LayerMask", "layer_mask"]

MaskFunction = Callable[..., Any]

_CHUNKS = chunked_overlay(1, torch.zeros(1)).__code__

_NOT_SERVED = (
    "the 'abft' attention serves causal masks with padding, a sliding window, chunks or packed sequences; this model "
    "or batch asks for another one (bidirectional blocks, several samples packed by position_ids). Pass an "
    "attention_mask to have position_ids taken as padding, or use attn_implementation='sdpa'"
)


class _Pattern(NamedTuple):
    """A kind of causal mask that the kernels compute: a row sees a run of keys that ends at its own position."""

    window: int | None = None
    chunk: int | None = None

    def first_key(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Return the first key that each row sees of a sequence that begins at `starts`."""
        if self.chunk is not None:
            return torch.maximum(starts, rows - (rows - starts) % self.chunk)
        return starts if self.window is None else torch.maximum(starts, rows - (self.window - 1))


class _Span(NamedTuple):
    """Rows and keys by their positions, and the samples that they belong to."""

    rows: Tensor  # (1, R)
    keys: Tensor  # (1, N)
    low: Tensor  # (B, 1) first token of each sample
    high: Tensor  # (B, 1) one past its last token
    firsts: Tensor | None = None  # (S,) first tokens of several sequences in one sample

    def start_of(self, rows: Tensor) -> Tensor:
        """Return the first token of the sequence that each row belongs to."""
        if self.firsts is None:
            return self.low
        return self.firsts[torch.searchsorted(self.firsts, rows, right=True) - 1]


class LayerMask:
    """The mask that transformers makes for one kind of layer, not read before a layer needs it.

    Args:
        function: True where row `q` of a sample sees key `k`, by positions; padding apart.
        padding: bool `(B, keys or more)`, True at tokens; None without padding.
        batch_size: B.
        rows: positions of the queries.
        keys: positions of the keys; those before them a cache has dropped.
        local_size: what transformers names for this kind of layer: the size of its windows or chunks.
        device: of the model's tensors.
    """

    def __init__(
        self,
        function: MaskFunction,
        padding: Tensor | None,
        batch_size: int,
        rows: range,
        keys: range,
        local_size: int | None,
        device: torch.device | None,
    ) -> None:
        # Where a cache has dropped keys, a layout tells no longer where the chunks of a sample begin.
        self._function = function if keys.start else _without_left_padding(function)
        self._padding, self._batch_size = padding, batch_size
        self._rows, self._keys, self._device = rows, keys, device
        bites = local_size is not None and local_size < keys.stop
        of_size = (_Pattern(window=local_size), _Pattern(chunk=local_size)) if bites else ()
        self._candidates = (_Pattern(), *of_size)
        self.local_size = local_size
        self._everywhere: Bounds | None = None  # by a function of numbers alone
        self._read: Bounds | None = None  # without a layout
        self._told: tuple[Bounds, Bounds] | None = None  # the last layout, and the bounds within it

    @property
    def dropped(self) -> int:
        """Number of keys that a cache of a sliding-window layer has dropped."""
        return self._keys.start

    def bounds(self, layout: Bounds | None = None) -> Bounds:
        """Return the bounds of a layer's rows.

        Args:
            layout: `seq_lens` and `seq_starts`, or `cu_seqlens`, or neither, if the batch is known to have no padding.
                None: they are read from the padding mask.

        Raises:
            ValueError: the padding mask has a hole or does not cover the keys.
            NotImplementedError: the kernels do not compute this mask.
        """
        if layout is not None:
            if self.dropped and layout.seq_lens is not None:
                raise NotImplementedError("seq_lens over a cache that has dropped keys; pass an attention_mask instead")
            if self._told is None or self._told[0] is not layout:
                self._told = layout, self._within(layout)
            return self._told[1]
        if self._read is None:
            self._read = self._within(_read_padding(self._padding, len(self._keys)))
        return self._read

    def _within(self, layout: Bounds) -> Bounds:
        """Return the layout with what the mask function adds to it."""
        if self._function is causal_mask_function:
            return layout
        try:
            if not _closes_over_numbers(self._function):
                return self._recognised(layout, self._device)
            if self._everywhere is None:
                with _disable_current_modes():  # real tensors, under a fake mode too
                    self._everywhere = self._recognised(Bounds(), torch.device("cpu"))
        except (IndexError, RuntimeError) as error:
            raise NotImplementedError(f"the 'abft' attention cannot read this model's mask: {error}") from error
        if self._everywhere.cu_seqlens is not None:  # blocks, which the rows of padded samples are not told apart by
            if layout.seq_lens is not None or layout.cu_seqlens is not None:
                raise NotImplementedError(_NOT_SERVED)
            return self._everywhere.to(self._device or torch.device("cpu"))
        return layout._replace(window=self._everywhere.window, chunk=self._everywhere.chunk)

    def _recognised(self, layout: Bounds, device: torch.device | None) -> Bounds:
        """Return the layout with the window or the packed sequences of the mask function, evaluated on `device`."""
        span = self._span(layout, device)
        for pattern in self._candidates:
            if _agrees(self._function, pattern, span):
                return layout._replace(**pattern._asdict())
        alone = layout.seq_lens is None and layout.cu_seqlens is None and self._batch_size == 1
        if alone and self._rows == self._keys and len(self._rows) > 1:
            firsts = _first_tokens(self._function, span)
            span = span._replace(firsts=firsts)
            for pattern in self._candidates:
                if _agrees(self._function, pattern, span):
                    cu_seqlens = torch.cat([firsts, span.high[0]]).to(torch.int32)
                    return layout._replace(cu_seqlens=cu_seqlens, **pattern._asdict())
        raise NotImplementedError(_NOT_SERVED)

    def _span(self, layout: Bounds, device: torch.device | None) -> _Span:
        rows = torch.arange(self._rows.start, self._rows.stop, device=device)[None]
        keys = torch.arange(self._keys.start, self._keys.stop, device=device)[None]
        if layout.seq_lens is None:
            low = rows.new_full((self._batch_size, 1), self._keys.start)
            return _Span(rows, keys, low, torch.full_like(low, self._keys.stop))
        starts = torch.zeros_like(layout.seq_lens) if layout.seq_starts is None else layout.seq_starts
        low = starts.to(rows)[:, None] + self._keys.start
        return _Span(rows, keys, low, low + layout.seq_lens.to(rows)[:, None])


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> LayerMask | None:
    """Return the mask, unread; None if it is plainly causal. The signature is that of `AttentionMaskInterface`.

    A mask that the kernels do not compute raises only when an attention layer asks for it: models make masks for kinds
    of layers that they may not have.
    """
    if q_offset + q_length != kv_length + kv_offset:
        raise NotImplementedError(
            f"the cache holds {kv_length} keys for queries that end at {q_offset + q_length}: the 'abft' attention "
            "aligns the last query with the last key; use the default DynamicCache"
        )
    plain = mask_function is causal_mask_function and attention_mask is None and not kv_offset
    if plain and allow_is_causal_skip:
        return None
    first = int(q_offset)
    rows, keys = range(first, first + q_length), range(int(kv_offset), int(kv_offset) + kv_length)
    return LayerMask(mask_function, attention_mask, batch_size, rows, keys, local_size, device)


def _read_padding(padding: Tensor | None, length: int) -> Bounds:
    """Return `seq_lens` and `seq_starts` of a padding mask, by one look at the device."""
    if padding is None:
        return Bounds()
    if padding.dim() != 2 or padding.shape[1] < length:
        raise ValueError(
            f"attention_mask of shape {tuple(padding.shape)} does not cover the {length} keys; "
            "with a cache it must cover the cached tokens too"
        )
    tokens = padding[:, -length:].to(torch.bool)
    lengths, starts = tokens.sum(dim=1).to(torch.int32), tokens.to(torch.int8).argmax(dim=1).to(torch.int32)
    runs = torch.eq(token_mask(lengths, starts, length), tokens).all(dim=1)
    on_host = torch.stack([lengths, starts, runs.to(torch.int32)]).tolist()
    if 0 in on_host[2]:
        raise ValueError(
            f"attention_mask of sample {on_host[2].index(0)} has a hole: its ones must be consecutive, with padding on "
            "the left or the right only"
        )
    if all(n == length for n in on_host[0]):
        return Bounds()
    return Bounds.of_samples(lengths, starts if any(on_host[1]) else None)


class _NoPadding:
    """The left padding of every sample where positions are counted from its first token: 0."""

    def __getitem__(self, samples: Any) -> int:
        return 0


def _without_left_padding(value: Any) -> Any:
    """Return a mask function whose chunks, also of functions that it calls by its closure, begin at position 0.

    `chunked_overlay` holds a tensor of left padding, which reading on the host would stall a GPU's stream.
    """
    if isinstance(value, tuple):
        return tuple(map(_without_left_padding, value))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    held = [cell.cell_contents for cell in value.__closure__]
    if value.__code__ is _CHUNKS:
        return chunked_overlay(
            dict(zip(_CHUNKS.co_freevars, held, strict=True))["chunk_size"], cast(Tensor, _NoPadding())
        )
    kept = [_without_left_padding(each) for each in held]
    if all(new is old for new, old in zip(kept, held, strict=True)):
        return value
    closure = tuple(map(CellType, kept))
    return FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)


def _closes_over_numbers(value: Any) -> bool:
    """Return True if a mask function, and each function that it calls by its closure, holds numbers and no tensors."""
    if isinstance(value, FunctionType):
        held = [*(cell.cell_contents for cell in value.__closure__ or ()), *(value.__defaults__ or ())]
        return all(map(_closes_over_numbers, held))
    if isinstance(value, tuple):
        return all(map(_closes_over_numbers, value))
    return value is None or isinstance(value, (bool, int, float, _NoPadding))


def _agrees(function: MaskFunction, pattern: _Pattern, span: _Span) -> bool:
    """Return True if each row sees the keys of `pattern` and no others of its sample.

    Looks at O(N) of the N² entries, enough for every mask that is made of windows, chunks, blocks, prefixes and packed
    sequences: all keys of the first and the last row of a sample, and of each row the ends of what it sees and their
    neighbours, the middle, and the first and the last key.
    """
    rows, all_keys, low, high, _ = span
    if not rows.numel() or not low.numel():
        return True
    samples, head = torch.arange(len(low), device=rows.device)[:, None], rows.new_zeros(())

    def agree(rows: Tensor, keys: Tensor) -> bool:
        rows, keys = rows.clamp(span.rows[:, :1], span.rows[:, -1:]), keys.clamp(all_keys[:, :1], all_keys[:, -1:])
        seen = torch.as_tensor(function(samples, head, rows, keys), device=rows.device)
        expected = (keys >= pattern.first_key(rows, span.start_of(rows))) & (keys <= rows)
        outside = (rows < low) | (rows >= high) | (keys < low) | (keys >= high)
        return bool(((seen == expected) | outside).all())

    # The first and the last row are those of the sample that are queries; rows of a cache come before them.
    if not agree(torch.maximum(low, rows[:, :1]), all_keys) or not agree(high - 1, all_keys):
        return False
    starts = span.start_of(rows)
    first_keys = pattern.first_key(rows, starts)
    wanted = [first_keys, first_keys - 1, (rows + first_keys) // 2, rows, rows + 1, low, high - 1]
    if pattern != _Pattern():
        wanted += [starts, starts - 1, (rows + starts) // 2]
    return all(agree(rows, keys.clamp(low, high - 1)) for keys in wanted)


def _first_tokens(function: MaskFunction, span: _Span) -> Tensor:
    """Return the tokens `(S,)` of one sample that do not see the token before them."""
    rows, zero = span.rows[0], span.rows.new_zeros(())
    sees_previous = torch.as_tensor(function(zero, zero, rows[1:], rows[:-1]), device=rows.device)
    return torch.cat([rows[:1], rows[1:][~sees_previous.expand(len(rows) - 1)]])
