"""The suites of `python -m bench --gpu`: correctness on the card, fused kernels, rows, memory.

Each yields rows (dicts); a row that could not be measured has a `reason` in place of figures.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import abft_kernels
from bench.gpu import competitors
from bench.gpu.timing import Budget, measure, peak_bytes, relative_error

__all__ = ["SUITES", "Setting", "attention_flops"]

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


class Setting(NamedTuple):
    device: torch.device
    budget: Budget
    tiny: bool  # shapes for the interpreter: the code runs, nothing is measured
    alone: bool = False  # one suite, which may have all the time

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16


def attention_flops(batch: int, heads: int, n: int, head_dim: int) -> float:
    """Useful operations of a causal forward pass: 4·B·H·N²·D / 2; backward takes 2.5 times as many."""
    return 4.0 * batch * heads * n * n * head_dim / 2


def _shape(setting: Setting, n: int, head_dim: int, grouped: bool) -> tuple[int, int, int]:
    """Batch, heads and KV heads: about 16k tokens, and fewer heads where one pass would take long."""
    if setting.tiny:
        return 1, 2, 1 if grouped else 2
    batch = max(1, 16384 // n)
    heads = 40 if n <= 16384 else 10
    return batch, heads, heads // 5 if grouped else heads


def _inputs(setting: Setting, n: int, head_dim: int, grouped: bool, seed: int = 0) -> list[Tensor]:
    batch, heads, kv_heads = _shape(setting, n, head_dim, grouped)
    generator = torch.Generator(device=setting.device).manual_seed(seed)
    return [
        torch.randn(batch, h, n, head_dim, device=setting.device, dtype=setting.dtype, generator=generator)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]  # fmt: skip


def _groups(q: Tensor, dense: bool) -> Tensor:
    """Two groups: every key in one of them, or 8 labelled keys as a prompt of 8 demonstrations has."""
    n = q.shape[2]
    groups = torch.full((q.shape[0], n), -1, dtype=torch.int8, device=q.device)
    if dense:
        return (torch.arange(n, device=q.device) % 2).to(torch.int8).expand(q.shape[0], n).contiguous()
    places = (torch.arange(1, 9, device=q.device) * n) // 10
    groups[:, places] = (torch.arange(8, device=q.device) % 2).to(torch.int8)
    return groups


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__


def _tried(work: Callable[[], Row]) -> Row:
    """The row, or why there is none: a competitor that cannot run is part of the comparison."""
    try:
        return work()
    except (torch.OutOfMemoryError, RuntimeError, ImportError, NotImplementedError, ValueError, TypeError) as error:
        return {"reason": _reason(error)}
    except Exception as error:  # compilers raise their own
        return {"reason": _reason(error)}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- correctness ------------------------------------------------------------------------------------------


def _pytest(setting: Setting, workers: int) -> Row:
    """The kernel tests, compiled on the card (interpreted in a dry run, and few of them).

    What takes the time is the compiler, which each drawn case calls several times: few of those.
    """
    which = ["tests/abft_kernels/test_validation.py"] if setting.tiny else ["tests/abft_kernels"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-x" if setting.tiny else "--maxfail=50", *which,
                   "--deselect", "tests/abft_kernels/test_aot.py", "--hypothesis-profile", "few",
                   f"--junitxml={report}"]  # fmt: skip
        if workers > 1:
            command += ["-n", str(workers), "--dist", "worksteal"]
        limit = max(30.0, setting.budget.left() - 20 if setting.alone else min(300.0, setting.budget.left() - 60))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"check": "pytest", "ok": False, "reason": f"not done after {limit:.0f} s"}
        if not report.exists():
            return {"check": "pytest", "ok": False, "reason": done.stdout[-500:] + done.stderr[-500:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = [f"{c.get('classname')}::{c.get('name')}" for c in suite.iter("testcase")
                  if c.find("failure") is not None or c.find("error") is not None]  # fmt: skip
    ok = counts["tests"] > 0 and not counts["failures"] and not counts["errors"]
    return {"check": "pytest", "ok": ok, **counts, "failed": failed[:50]}


def _exactness(setting: Setting, n: int, head_dim: int, dense: bool) -> Row:
    """Every result and gradient at a timed shape against float64, and twice the same bits.

    Bound: twice the error of PyTorch's own attention in the same precision, and at least one rounding of the inputs.
    """
    q, k, v = (x[:1, : 5 if i == 0 else 1] for i, x in enumerate(_inputs(setting, n, head_dim, True)))
    if setting.tiny:
        q = q[:, :2]
    groups = _groups(q, dense)
    generator = torch.Generator(device=setting.device).manual_seed(1)
    incoming = [
        torch.randn(q.shape, device=q.device, dtype=setting.dtype, generator=generator),
        torch.randn((*q.shape[:3], 2), device=q.device, generator=generator),
    ]

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        outputs = abft_kernels.mass_attention(*leaves, groups, 2, backend=backend)
        gradients = torch.autograd.grad(
            outputs, leaves, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
        )
        return [*(o.detach() for o in outputs), *gradients]

    ours, again = results(setting.dtype, "triton"), results(setting.dtype, "triton")
    oracle, base = results(torch.float64, "torch"), results(setting.dtype, "torch")
    names = ("out", "mass", "dq", "dk", "dv")
    errors = {name: relative_error(x, y) for name, x, y in zip(names, ours, oracle, strict=True)}
    allowed = {name: relative_error(x, y) for name, x, y in zip(names, base, oracle, strict=True)}
    floor = torch.finfo(setting.dtype).eps
    bitwise = all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    ok = bitwise and all(errors[name] <= 2 * allowed[name] + floor for name in names)
    return {"check": "float64", "n": n, "head_dim": head_dim, "labels": "dense" if dense else "sparse", "ok": ok,
            "bitwise": bitwise, "error": errors, "pytorch_error": allowed}  # fmt: skip


def correctness(setting: Setting) -> Iterator[Row]:
    for head_dim in (64, 128):
        for dense in (False, True):
            n = 48 if setting.tiny else 4096
            row = _tried(lambda n=n, d=head_dim, dense=dense: _exactness(setting, n, d, dense))
            yield {"check": "float64", "n": n, "head_dim": head_dim, "ok": False, **row}
    yield _pytest(setting, 1 if setting.tiny else os.cpu_count() or 1)


# --- fused kernels ----------------------------------------------------------------------------------------


def _timed(setting: Setting, attention: competitors.Attention, inputs: list[Tensor], groups: Tensor) -> Row:
    """Milliseconds and TFLOP/s of useful operations, forward and backward."""
    q, k, v = inputs
    batch, heads, n, head_dim = q.shape
    flops = attention_flops(batch, heads, n, head_dim)
    with torch.no_grad():
        forward = measure(lambda: attention(q, k, v, groups, 2), setting.device)
    outputs = attention(q, k, v, groups, 2)
    incoming = [torch.randn_like(x) for x in outputs]
    backward = measure(lambda: torch.autograd.grad(outputs, inputs, incoming, retain_graph=True), setting.device)
    return {
        "forward_ms": forward, "backward_ms": backward, "forward_tflops": flops / forward["median"] / 1e9,
        "backward_tflops": 2.5 * flops / backward["median"] / 1e9,
    }  # fmt: skip


def _lengths(setting: Setting, thin: bool = False) -> list[int]:
    if setting.tiny:
        return [32]
    return [1 << e for e in (range(10, 17, 2) if thin else range(9, 18))]


def _kernel_rows(setting: Setting, n: int, head_dim: int, grouped: bool, named: dict[str, Any]) -> Iterator[Row]:
    inputs = _inputs(setting, n, head_dim, grouped)
    batch, heads, kv_heads = _shape(setting, n, head_dim, grouped)
    about = {"n": n, "head_dim": head_dim, "batch": batch, "heads": heads, "kv_heads": kv_heads}
    for name, attention in named.items():
        groups = _groups(inputs[0], dense=name.endswith("dense"))
        if setting.budget.left() < 20:
            yield {**about, "name": name, "reason": "out of time"}
            continue
        row = _tried(lambda attention=attention, groups=groups: _timed(setting, attention, inputs, groups))
        yield {**about, "name": name, **row}


def kernels(setting: Setting) -> Iterator[Row]:
    """The fused operator, with the mass on few keys, on all, and off; beside every other attention."""
    plans = [(128, True, False), (64, True, True), (128, False, True), (64, False, True)]
    for head_dim, grouped, thin in plans:
        for n in _lengths(setting, thin):
            ours = {
                "abft, sparse": competitors.OURS["abft"], "abft, dense": competitors.OURS["abft"],
                "abft, no mass": competitors.OURS["abft, no mass"],
            }  # fmt: skip
            others = {name: f for name, (f, longest) in competitors.FUSED.items() if n <= longest}
            yield from _kernel_rows(setting, n, head_dim, grouped, {**ours, **others})


def flex(setting: Setting) -> Iterator[Row]:
    """FlexAttention's two ways to a mass; last, because each shape is compiled anew."""
    if setting.tiny:
        yield {"name": "FlexAttention", "reason": "compiled on a GPU only"}
        return
    made = competitors.flex()
    for n in _lengths(setting, thin=True):
        named = {name: build(made) for name, build in competitors.FLEX.items()}
        yield from _kernel_rows(setting, n, 128, True, named)


# --- rows -------------------------------------------------------------------------------------------------


def _row_inputs(setting: Setting, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim = (4, 2, 16) if setting.tiny else (40, 8, 128)
    batch = 2 if setting.tiny else max(1, (1 << 17) // n)
    q = torch.randn(batch, heads, 1, head_dim, device=setting.device, dtype=setting.dtype, requires_grad=True)
    k = torch.randn(batch, kv_heads, n, head_dim, device=setting.device, dtype=setting.dtype, requires_grad=True)
    last = torch.full((batch, 1), n - 1, dtype=torch.int32, device=setting.device)
    return q, k, _groups(k, dense=False), last


def _both_ways(mass_of: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        mass = mass_of()
        return torch.autograd.grad(mass, leaves, torch.ones_like(mass))

    return run


def _launches(function: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU, besides those of the incoming gradient."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        function()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) - 1  # ones_like


def _graph_equals_eager(function: Callable[[], Any], device: torch.device) -> bool | None:
    """Whether the call can be captured in a CUDA graph, and its replay gives the same bits."""
    if device.type != "cuda":
        return None
    expected = function()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    graph.replay()
    torch.cuda.synchronize()
    return all(torch.equal(x, y) for x, y in zip(expected, captured, strict=True))


def _row_row(setting: Setting, mass_of: Callable[..., Tensor], inputs: tuple[Tensor, ...], ours: bool) -> Row:
    q, k, groups, last = inputs
    extra = {"row_positions": last, "backend": "triton"} if ours else {}

    def mass() -> Tensor:
        return mass_of(q, k, groups, 2, **extra)

    both = _both_ways(mass, [q, k])
    with torch.no_grad():
        forward = measure(mass, setting.device)
    key_bytes = k.numel() * k.element_size()
    row: Row = {"forward_ms": forward, "both_ms": measure(both, setting.device), "key_bytes": key_bytes,
                "forward_gb_per_s": key_bytes / forward["median"] / 1e6}  # fmt: skip
    if ours:
        row |= {
            "launches": _launches(both, setting.device),
            "graph_equals_eager": _graph_equals_eager(both, setting.device),
        }
    return row


def rows(setting: Setting) -> Iterator[Row]:
    """One row a sample, forward and backward, against the recomputation in plain PyTorch."""
    for n in [32] if setting.tiny else [1 << e for e in range(10, 18)]:
        inputs = _row_inputs(setting, n)
        about = {"n": n, "batch": inputs[0].shape[0], "heads": inputs[0].shape[1], "kv_heads": inputs[1].shape[1]}
        named = {"abft": lambda: abft_kernels.row_mass, **competitors.ROWS}
        for name, build in named.items():
            if setting.budget.left() < 20:
                yield {**about, "name": name, "reason": "out of time"}
                continue
            work = _tried(lambda b=build, name=name, x=inputs: _row_row(setting, b(), x, name == "abft"))
            yield {**about, "name": name, **work}


# --- memory -----------------------------------------------------------------------------------------------


def _memory_row(setting: Setting, attention: competitors.Attention, n: int) -> Row:
    """Bytes beyond inputs, outputs and gradients, at the peak of a forward and of a forward and backward pass."""
    head_dim = 16 if setting.tiny else 128
    inputs = [
        torch.randn(1, heads, n, head_dim, device=setting.device, dtype=setting.dtype, requires_grad=True)
        for heads in (10, 2, 2)
    ]
    groups = _groups(inputs[0], dense=False)

    def forward() -> tuple[Tensor, ...]:
        return attention(*inputs, groups, 2)

    def both() -> Any:
        outputs = forward()
        incoming = [torch.ones_like(x) for x in outputs]
        return outputs, incoming, torch.autograd.grad(outputs, inputs, incoming)

    forward(), both()  # compiles
    outputs = sum(x.numel() * x.element_size() for x in forward())
    gradients = sum(x.numel() * x.element_size() for x in inputs)
    alone, step = peak_bytes(forward, setting.device), peak_bytes(both, setting.device)
    return {
        "forward_bytes": None if alone is None else alone - outputs,
        "both_bytes": None if step is None else step - 2 * outputs - gradients,
    }


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory against the length, one sample of 10 heads of 128 over 2 KV heads."""
    named = {"abft": competitors.OURS["abft"], **{n: competitors.FUSED[n][0] for n in ("SDPA flash", "eager")}}
    for n in [32] if setting.tiny else [1 << e for e in range(11, 18)]:
        for name, attention in named.items():
            if setting.budget.left() < 15 or (name == "eager" and n > 16384):
                yield {"n": n, "name": name, "reason": "out of time" if name != "eager" else "not tried: N × N"}
                continue
            yield {"n": n, "name": name, **_tried(lambda attention=attention, n=n: _memory_row(setting, attention, n))}


def exponent(points: list[tuple[float, float]]) -> float:
    """x of the least-squares line log y = x·log n + c."""
    logs = [(math.log(n), math.log(max(y, 1.0))) for n, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def training(setting: Setting) -> Iterator[Row]:
    """The step in real shapes."""
    from bench.gpu.model_steps import training as steps

    yield from steps(setting.device, setting.budget, setting.tiny)


SUITES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "correctness": correctness, "kernels": kernels, "rows": rows, "memory": memory, "training": training,
    "flex": flex,
}  # fmt: skip
