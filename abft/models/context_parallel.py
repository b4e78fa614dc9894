"""One long context over several processes: each holds a stretch of the tokens, and masses are merged by their LSEs.

    masses = layer_masses(model, input_ids=ids, key_groups=groups, query_positions=last, context_group=group)

Process r of W takes tokens r·N/W … (r + 1)·N/W − 1 through the network. The chosen rows' queries go to every process,
each takes their mass on its own keys, and `merge_masses` puts the shards together exactly; the attention output of a
process's rows needs the keys and values of all processes, which are gathered layer by layer.

Every process ends with the same masses. A loss of them is the same everywhere too, and what each process finds for a
parameter is W times its own tokens' part of the gradient: the *mean* over the processes is the gradient (what data-
parallel engines form).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce

from abft_kernels import attention, gather_rows, merge_masses, row_mass

__all__ = ["ContextParallel"]


class ContextParallel:
    """The place of this process in `group`, for a context of `length` tokens.

    Args:
        group: processes that share the context; None for all.
        length: tokens N, padding excluded.
    """

    def __init__(self, group: dist.ProcessGroup | None, length: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.tokens = -(-length // self.size)  # the last process pads on the right, which no row of others sees
        self.offset = self.rank * self.tokens

    def part(self, x: Tensor, fill: int) -> Tensor:
        """Return this process's stretch of `(B, N)` tokens."""
        padded = torch.nn.functional.pad(x, (0, self.size * self.tokens - x.shape[1]), value=fill)
        return padded[:, self.offset : self.offset + self.tokens].contiguous()

    def positions(self, batch: int, device: torch.device) -> Tensor:
        """Return the positions of its tokens in the whole context, `(B, N / W)`."""
        return torch.arange(self.offset, self.offset + self.tokens, device=device).expand(batch, -1)

    def mass(
        self,
        query: Tensor,
        key: Tensor,
        key_groups: Tensor,
        num_groups: int,
        row_positions: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the mass `(B, H, R, G)` of the rows at positions `(B, R)` of the whole context, on all processes."""
        assert row_positions is not None
        mine = (row_positions >= self.offset) & (row_positions < self.offset + self.tokens)
        queries = gather_rows(query, row_positions, self.offset) * mine[:, None, :, None]
        queries = all_reduce(queries, group=self.group or dist.group.WORLD)
        sinks = options["sinks"]
        mass, lse = row_mass(
            queries,
            key,
            key_groups,
            num_groups,
            row_positions=row_positions,
            key_offset=self.offset,
            return_lse=True,
            **{**options, "sinks": None},
        )
        masses, lses = self._gather(mass), self._gather(lse)
        if sinks is not None:  # a shard of its own, whichever keys the row sees
            masses.append(torch.zeros_like(mass))
            lses.append(sinks.to(lse.dtype)[:, None].expand_as(lse))
        return merge_masses(masses, lses)[0]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Return the output `(B, H, N / W, D)` of this process's rows over the keys of all."""
        keys, values = (torch.cat(self._gather(x), dim=2) for x in (key, value))
        return attention(query, keys, values, query_offset=self.offset, **options)

    def _gather(self, x: Tensor) -> list[Tensor]:
        # Flat, so that the gradients are: gloo's backward mixes up those of another memory layout.
        flat = all_gather(x.reshape(-1), group=self.group or dist.group.WORLD)
        return [part.view(x.shape) for part in flat]
