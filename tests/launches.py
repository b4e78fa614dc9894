"""Counts what a GPU would be given to run: Triton kernels, and PyTorch operators that are neither views nor memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from abft_kernels import functional, masking, ops, validation

# Operators that give memory or another view of it.
_FREE = re.compile(r"aten\.(_?empty|new_empty|_unsafe_view|_reshape_alias|detach|alias|lift_fresh|sym_|is_|record_)")


class Launches(TorchDispatchMode):
    """A mode that counts by name, inside the operators of `abft_kernels` too.

    Args:
        monkeypatch: pytest's; the kernels run in Triton's interpreter, and `"auto"` chooses as on a GPU.
    """

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        run_operator, run_kernel = ops._run, interpreter.GridExecutor.__call__

        def operator(*arguments: Any) -> Any:
            with self:
                return run_operator(*arguments)

        def kernel(executor: Any, *arguments: Any, **options: Any) -> None:
            self.names[executor.fn.__name__] += 1
            with _disable_current_modes():  # the interpreter's own copies
                run_kernel(executor, *arguments, **options)

        monkeypatch.setattr(ops, "_run", operator)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", kernel)
        monkeypatch.setattr(functional, "_on_gpu", lambda device: True)
        for module in (masking, validation):
            monkeypatch.setattr(module, "values_readable", lambda tensor: False)
        torch.use_deterministic_algorithms(False)  # fills of poisoned memory are no launches of ours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        works = any(isinstance(x, Tensor) and x.numel() for x in tree_leaves((result, args)))
        if works and func.namespace != "abft" and not func.is_view and not _FREE.match(str(func)):
            self.names[str(func)] += 1
        return result


def counted(launches: Launches, run: Callable[[], Any]) -> Counter[str]:
    """Return the launches of `run` by name."""
    launches.names.clear()
    with launches:
        run()
    return launches.names.copy()
