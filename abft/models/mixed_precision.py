"""Mixed precision: a base in 16 bits, W_Q and W_K as float32 masters, and passes that compute under autocast.

The dtypes of the parameters are the only record of it: a model whose W_Q or W_K is in float32 on a 16-bit base computes
under autocast in every pass of `abft.models.masses`, in training and in evaluation alike. Autocast rounds a master to
16 bits before each product, as loading the saved weights onto the same base does once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from abft.models.attention import transformer_of
from abft.models.projections import TrainedParameter, first_projections

__all__ = ["computing", "exactly", "float32_masters"]


def float32_masters(model: nn.Module, trained: Sequence[TrainedParameter], device: torch.device | str) -> None:
    """Cast the trained parameters of a 16-bit model to float32, in place; nothing changes in a float32 model.

    The updates of training are smaller than the steps of 16-bit numbers. Of a fused projection the whole parameter is
    cast, v included. A float16 base becomes a bfloat16 one, with a warning: gradients underflow in float16.

    Args:
        model: a transformers model.
        trained: W_Q and W_K, as :func:`abft.models.projections.train_parameters` returns them.
        device: device that the training runs on.

    Raises:
        ValueError: the device does not compute in bfloat16; nothing is changed then.
    """
    masters = [model.get_parameter(item.name) for item in trained]
    half = {parameter.dtype for parameter in masters if parameter.dtype.itemsize < 4}
    if not half:
        return
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, in which a {half.pop()} model trains; load it "
            "with dtype=float32"
        )
    for parameter in masters:
        _cast(parameter, torch.float32)
    if torch.float16 in half:
        warnings.warn(
            "the float16 base was converted to bfloat16, because gradients underflow in float16; evaluate what is "
            "trained with dtype=bfloat16 too",
            stacklevel=3,
        )
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float16:
                _cast(tensor, torch.bfloat16)


def _cast(tensor: Tensor, dtype: torch.dtype) -> None:
    """Change the dtype in place; a tensor that is split over processes takes no other data."""
    if not isinstance(tensor, DTensor):
        tensor.data = tensor.data.to(dtype)
        return
    cast: Tensor = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        cast = nn.Parameter(cast, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, cast)


def computing(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the autocast that a pass of `model` needs: that of a 16-bit base with float32 W_Q or W_K.

    For any other model, and under an autocast that is on already, nothing changes.
    """
    inner = transformer_of(model)
    base, device = inner.dtype, inner.device.type
    if base.itemsize >= 4 or torch.is_autocast_enabled(device):
        return nullcontext()
    if not any(weight.dtype == torch.float32 for weight in first_projections(inner)):
        return nullcontext()
    return torch.autocast(device, base)


def exactly(device: torch.device | str) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device, for products that must not be rounded."""
    kind = torch.device(device).type
    # The meta device has no autocast to switch off.
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
