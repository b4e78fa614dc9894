"""The memory that `abft plan` counts for the training suite's steps, in processes of their own while the card works.

A plan takes some 20 seconds of one core and no GPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

__all__ = ["Plans", "planned_bytes"]

Key = tuple[str, str, int, bool]  # model, method, tokens, gradient checkpointing


def _start() -> None:
    """Prepare a process: no CUDA context, one thread, and the card's own process first."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(10)
    import torch

    torch.set_num_threads(1)


def planned_bytes(model: str, method: str, tokens: int, checkpointed: bool) -> float:
    """Return the bytes of `abft plan`, without the CUDA context that PyTorch's counter does not see."""
    from abft.training.plan import RESERVED, plan
    from bench.gpu.model_steps import model_config

    with tempfile.TemporaryDirectory() as folder:
        model_config(model).save_pretrained(folder)
        result = plan(
            folder,
            context=tokens,
            mode=method,
            precision="nf4" if model.endswith("NF4") else "bfloat16",
            lora=True,
            gradient_checkpointing=checkpointed,
        )
    adam = result.parts["gradients and Adam"] * 2 / 3  # no optimizer runs here
    return result.total - RESERVED - adam


class Plans:
    """Plans that are made in the background; calling it returns the bytes of one, or None if it is not done."""

    def __init__(self, keys: Iterable[Key], workers: int = 2, count: Any = planned_bytes):
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start)
        self._plans: dict[Key, Future[float]] = {key: self._pool.submit(count, *key) for key in keys}

    def __call__(self, model: str, method: str, tokens: int, checkpointed: bool) -> float | None:
        plan = self._plans.get((model, method, tokens, checkpointed))
        if plan is None or not plan.done() or plan.cancelled() or plan.exception() is not None:
            return None
        return plan.result()

    def stop(self) -> None:
        """End the processes; plans that are not done stay so."""
        processes = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
