"""Adapters of several trainings on one base, each scaled: θ₀ + Σ factor·Δ without a change of the base.

A quantized base cannot be moved: its weights would be rounded again at every point. Its adapters can, exactly, because
a layer adds up the outputs of all its adapters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer

__all__ = ["ScaledAdapters"]


class ScaledAdapters:
    """A base with the LoRA adapters of several trainings, which are switched off outside of :meth:`at`.

    Args:
        base: the model that was trained, on the `"abft"` attention; quantized or not.
        folders: method → folder of its adapter; at least one.

    Attributes:
        model: the base with all adapters.

    Raises:
        ValueError: a folder without a LoRA adapter, or an adapter with whole modules beside it, which have no scale.
    """

    def __init__(self, base: Any, folders: Mapping[str, str | os.PathLike[str]]) -> None:
        configs = {name: self._config(folder) for name, folder in folders.items()}
        for name, config in configs.items():
            if modules := getattr(config, "modules_to_save", None):
                raise ValueError(
                    f"the adapter of {name} trained {', '.join(modules)} in full, which has no scale on a 4-bit base; "
                    "train that method on W_Q and W_K alone"
                )
        (first, folder), *rest = folders.items()
        self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
        for name, folder in rest:
            self.model.load_adapter(str(folder), adapter_name=name)
        self._adapters = cast(Any, self.model.base_model)
        self._layers: list[Any] = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self._adapters.set_adapter(list(folders), inference_mode=True)
        self._adapters.disable_adapter_layers()

    @classmethod
    def scalable(cls, folder: str | os.PathLike[str]) -> bool:
        """Return True for an adapter without whole modules beside it; errors as of the class."""
        return not getattr(cls._config(folder), "modules_to_save", None)

    @staticmethod
    def _config(folder: str | os.PathLike[str]) -> PeftConfig:
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no adapter; a 4-bit base is analysed with LoRA adapters") from error
        if config.peft_type != "LORA":
            raise ValueError(f"{folder} holds an adapter of type {config.peft_type}, which cannot be scaled; use LoRA")
        return config

    @contextmanager
    def at(self, factors: Mapping[str, float]) -> Iterator[None]:
        """Let the model be θ₀ + Σ factor·Δ inside the block; methods that are not named add nothing."""
        names = list(self.model.peft_config)
        if unknown := [name for name in factors if name not in names]:
            raise ValueError(f"no adapter of {unknown[0]!r}; there are {', '.join(names)}")
        for layer in self._layers:
            for name in names:
                layer.set_scale(name, factors.get(name, 0.0))
        self._adapters.enable_adapter_layers()
        try:
            yield
        finally:
            self._adapters.disable_adapter_layers()
