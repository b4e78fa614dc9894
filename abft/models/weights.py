"""Save and load what was trained, and nothing else: W_Q, W_K and more as safetensors, or a PEFT adapter.

save_trained(model, trained, folder)          # qk_weights.safetensors + abft_config.json
model = from_pretrained(folder)               # the base it names, with the weights on it
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

import abft.models.attention as _adapter
from abft.files import whole, write_json
from abft.models.loading import load_causal_lm, load_tokenizer
from abft.models.projections import (
    Scope,
    TrainedParameter,
    find_head,
    find_qk,
    find_trained,
    head_in_float32,
    untie_head,
)

__all__ = ["from_pretrained", "is_trained_folder", "load_trained", "merge", "save_trained"]

WEIGHTS = "qk_weights.safetensors"
CONFIG = "abft_config.json"
ADAPTER_CONFIG = "adapter_config.json"
FORMAT_VERSION = 1


def is_trained_folder(folder: str | os.PathLike[str]) -> bool:
    """Return True if `folder` holds trained W_Q / W_K or a PEFT adapter."""
    return any((Path(folder) / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def whole_state_dict(
    model: PreTrainedModel, trained: list[TrainedParameter], state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor] | None:
    """Return the trained parameters gathered from all processes, if these hold parts of them; all must call this.

    A `state_dict` that is given counts as whole.
    """
    parameters = dict(model.named_parameters())
    if state_dict is not None or not any(isinstance(parameters[item.name], DTensor) for item in trained):
        return state_dict
    return {item.name: _gathered(parameters[item.name].detach()) for item in trained}


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_trained(
    model: PreTrainedModel,
    trained: list[TrainedParameter],
    folder: str | os.PathLike[str],
    state_dict: dict[str, Tensor] | None = None,
    **extra: Any,
) -> None:
    """Save the trained parts alone (in fused projections q and k only).

    The values come from `state_dict` if the model's own parameters are split over processes; `extra` goes into the
    config.

    The config is written last, so a folder that has one is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters()) if state_dict is None else state_dict
    tensors = {item.name: item.view(parameters[item.name].detach()).contiguous().cpu() for item in trained}
    with whole(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": model.config.name_or_path,
            "model_type": model.config.model_type,
            **extra,
        },
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the `abft_config.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was written by another version.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} holds no trained W_Q / W_K")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {config.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}; load it with the release that wrote it"
        )
    return config


def load_trained(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel | PeftModel:
    """Put what `folder` holds on top of the base `model`: W_Q, W_K and more in place, or a PEFT adapter around it.

    A head that was trained replaces the model's, untied from the input embeddings.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: it was trained on another kind of model, or its shapes do not fit; nothing is changed then.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        saved = PeftConfig.from_pretrained(str(folder)).modules_to_save or ()
        if saved and any(item.name.rpartition(".")[0] in saved for item in find_head(model)):
            head_in_float32(model)
        try:
            return PeftModel.from_pretrained(model, str(folder))
        except (RuntimeError, ValueError) as error:
            trained_on = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
            raise ValueError(
                f"the adapter in {folder} does not fit this {model.config.model_type} model; it was trained on "
                f"{trained_on} ({str(error).strip().splitlines()[-1].strip()})"
            ) from error
    config = read_config(folder)
    if config["model_type"] != model.config.model_type:
        raise ValueError(
            f"{folder} was trained on a {config['model_type']} model "
            f"({config['base_model_name_or_path']}), but this model is {model.config.model_type}"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    scope, targets = _scope_of(model, set(tensors))
    if set(tensors) != set(targets):
        unknown = sorted(set(tensors) ^ set(targets))
        raise ValueError(
            f"{folder} and the model differ in {len(unknown)} projections, such as {unknown[0]}; was it trained on "
            f"{config['base_model_name_or_path']}?"
        )
    for name, tensor in tensors.items():
        target = targets[name].view(model.get_parameter(name))
        if isinstance(target, DTensor):
            tensors[name] = tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
        if target.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in {folder} but {tuple(target.shape)} in the model; it was "
                f"trained on {config['base_model_name_or_path']}"
            )
    if scope == "qk_head":
        untie_head(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].view(model.get_parameter(name)).copy_(tensor)
    return model


def _scope_of(model: PreTrainedModel, names: set[str]) -> tuple[Scope, dict[str, TrainedParameter]]:
    """Return the scope whose parameters have these names, and its parameters; that of W_Q and W_K if none has."""
    qk = {item.name: item for item in find_qk(model)}
    if len(names) > len(qk):
        scopes: tuple[Scope, ...] = ("qk_head", "model")
        for scope in scopes:
            found = {item.name: item for item in find_trained(model, scope)}
            if names == set(found):
                return scope, found
    return "qk", qk


def from_pretrained(
    folder: str | os.PathLike[str], base_model: str | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a trained folder on top of its base (or `base_model`), on the `"abft"` attention.

    `kwargs` go to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_trained`, or the base is unknown.
    """
    if not is_trained_folder(folder):
        raise FileNotFoundError(f"{folder} holds neither {CONFIG} nor {ADAPTER_CONFIG}: nothing was trained into it")
    if base_model is None:
        if (Path(folder) / ADAPTER_CONFIG).is_file():
            base_model = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        else:
            base_model = read_config(folder)["base_model_name_or_path"]
        if not base_model:
            raise ValueError(f"{folder} does not name its base model; pass base_model=")
    kwargs.setdefault("attn_implementation", _adapter.ATTENTION)
    model = load_causal_lm(str(base_model), **kwargs)
    return load_trained(model, folder)


def merge(
    base_model: str, trained: str | os.PathLike[str], output_dir: str | os.PathLike[str], dtype: str = "auto"
) -> None:
    """Write the base with what `trained` holds merged into it: a model folder that works without this package.

    Adapters of a 4-bit base are merged into the base at `dtype`. The folder appears whole or not at all.

    Raises:
        FileExistsError: `output_dir` exists.
        FileNotFoundError, ValueError: as :func:`from_pretrained`.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists; choose another folder, or delete it")
    model = from_pretrained(trained, base_model, dtype=dtype, attn_implementation=None)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
        model.get_output_embeddings().to(model.dtype)  # a trained head is in float32
    with whole(output_dir) as temporary:
        model.save_pretrained(temporary)
        with suppress(OSError, ValueError):  # a base without a tokenizer is merged all the same
            load_tokenizer(base_model).save_pretrained(temporary)
