"""The whole attention row of a prompt's last token, head by head, without an N × N tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft.analysis.observing import check_all_seen
from abft.evaluation.batching import evaluation_mode
from abft.models.attention import is_enabled, transformer_of
from abft.models.collector import Layer, MassCollector, MassRequest
from abft.prompts.targets import AttentionTarget
from abft_kernels.validation import MAX_GROUPS

__all__ = ["last_rows"]


class _RowCollector(MassCollector):
    """Takes a whole row in place of masses: every key is a group of its own, `MAX_GROUPS` of them at a time.

    So a row is what the mass of a key is, whatever masks, soft caps or sinks the layer has.
    """

    def collect(self, module: nn.Module, layer: Layer, request: MassRequest) -> Tensor:
        keys = torch.arange(layer.key.shape[2], device=layer.key.device)
        chunks = []
        for start in range(0, len(keys), MAX_GROUPS):
            groups = torch.where((keys >= start) & (keys < start + MAX_GROUPS), keys - start, -1)[None]
            chunks.append(layer.mass(request._replace(key_groups=groups, num_key_groups=MAX_GROUPS)))
        self.masses.append(torch.cat(chunks, dim=-1)[..., : len(keys)])
        return layer.output()


def last_rows(
    model: PreTrainedModel | PeftModel, samples: Sequence[AttentionTarget], *, progress: bool = True
) -> list[Tensor]:
    """Return the attention of each sample's last token to all of its n tokens, `(L, H, n)` float32 on the CPU.

    A row adds up to 1, less what attention sinks take. The cost of a row is that of n / 16 masses.

    Args:
        model: on the `"abft"` attention (see :func:`abft.enable`).
        samples: prompts or attention targets; one forward pass each.
        progress: show a progress bar.

    Raises:
        ValueError: a model on another attention.
        NotImplementedError: a layer's attention does not come through transformers' attention interface.
    """
    if not is_enabled(model):
        raise ValueError("the model runs on another attention than 'abft'; call abft.enable(model) first")
    inner, device = transformer_of(model), next(model.parameters()).device
    rows = []
    with evaluation_mode(model):
        for sample in track(samples, description="Reading rows", disable=not progress):
            ids = torch.tensor([list(sample.input_ids)], device=device)
            collector = _RowCollector(inner.config.get_text_config().num_hidden_layers)
            request = MassRequest(torch.full_like(ids, -1), 1, torch.tensor([[ids.shape[1] - 1]], device=device))
            inner.base_model(input_ids=ids, use_cache=False, mass_collector=collector, **request._asdict())
            check_all_seen(inner, len(collector.masses))
            rows.append(torch.stack([mass[0, :, 0].float().cpu() for mass in collector.masses]))
    return rows
