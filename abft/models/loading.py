"""Load a base model on the `"abft"` attention: its dtype or 4 bits, its device and its context length."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

import abft.models.attention as _adapter
from abft.models.gguf import is_gguf, model_folder, read_gguf_config

__all__ = [
    "computes_bfloat16",
    "context_of",
    "default_device",
    "load_base",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "loading_arguments",
]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_device() -> str:
    """Return the device of a model that is not split: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_bfloat16() -> bool:
    """Return True unless models run on a CPU whose instructions lack bfloat16, where it is several times slower."""
    return default_device() != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def loading_arguments(dtype: str = "auto", load_in_4bit: bool = False) -> dict[str, Any]:
    """Return arguments for `from_pretrained`: the dtype, or NF4 with double quantisation on this process's device.

    Args:
        dtype: "float32", "bfloat16" or "float16"; "auto" is the model's own, but float32 without
            :func:`computes_bfloat16`.
        load_in_4bit: quantize with bitsandbytes; matrices are multiplied in `dtype`, or in bfloat16 if that is "auto".

    Raises:
        ValueError: an unknown dtype, or bitsandbytes is missing.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not load_in_4bit:
        return {"dtype": "float32" if dtype == "auto" and not computes_bfloat16() else dtype}
    if find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    computing = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computing
    )
    # Under torchrun each process has a GPU of its own.
    device = int(os.environ.get("LOCAL_RANK", "0")) if default_device() == "cuda" else "cpu"
    return {"dtype": computing, "quantization_config": config, "device_map": {"": device}}


def load_causal_lm(model: str, **arguments: Any) -> Any:
    """Load the causal language model of a folder, a GGUF file or a name on the Hub.

    Args:
        model: where it is (see :func:`abft.models.gguf.model_folder`); trained weights name it as their base.
        arguments: handed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError, OSError: as :func:`abft.models.gguf.model_folder`; there is no such model.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model_folder(model), **arguments)
    if is_gguf(model):
        loaded.name_or_path = loaded.config.name_or_path = model
    return loaded


def load_base(model: str, *, dtype: str = "auto", load_in_4bit: bool = False, **more: Any) -> Any:
    """Load a base model on the `"abft"` attention; `more` goes to `from_pretrained`.

    Raises:
        ValueError, OSError: as :func:`loading_arguments` and :func:`load_causal_lm`.
    """
    return load_causal_lm(
        model, attn_implementation=_adapter.ATTENTION, **loading_arguments(dtype, load_in_4bit), **more
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer."""
    return AutoTokenizer.from_pretrained(model_folder(model))


def load_config(model: str) -> Any:
    """Load the model's configuration, without its weights."""
    return read_gguf_config(model) if is_gguf(model) else AutoConfig.from_pretrained(model)


def context_of(config: Any) -> int | None:
    """Return the context length in tokens of a model with this configuration; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
