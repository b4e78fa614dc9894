"""Record the launches of the kernels, and what Triton would compile for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from abft_kernels.triton import backward, combine, forward, rows

_RESERVED = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")


@dataclass
class Launch:
    """One launch: `arguments` and `options` as the kernel was given them."""

    kernel: str
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def specialization(self) -> str:
        """What the compiled code depends on beside the options: types, alignment and values that are constants."""
        function = self.function
        if not isinstance(function, JITFunction):
            function = JITFunction(function.fn, **function.kwargs)
        bind = create_function_from_signature(function.signature, function.params, CUDABackend(_TARGET))
        found = bind(*self.arguments, debug=False)
        return repr((found[1], self.options))


_TARGET = GPUTarget("cuda", 90, 32)


def kernels() -> dict[str, Any]:
    """All kernels that are launched, by name."""
    found = {}
    for module in (forward, backward, rows, combine):
        for name, function in vars(module).items():
            if name.endswith("_kernel") and hasattr(function, "fn"):
                found[name] = function
    return found


def record_launches(monkeypatch: Any) -> list[Launch]:
    """Return a list that grows by every launch until the test ends."""
    launches: list[Launch] = []
    for name, function in kernels().items():

        def run(
            *arguments: Any, _name=name, _function=function, _run=function.run, grid: Any, warmup: bool, **options: Any
        ):
            launches.append(Launch(_name, _function, arguments, options))
            return _run(*arguments, grid=grid, warmup=warmup, **options)

        monkeypatch.setattr(function, "run", run)
    return launches
