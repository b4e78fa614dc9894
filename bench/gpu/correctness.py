"""The correctness suite: results at timed shapes against float64, and the kernel tests on the card, in shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import abft_kernels
from bench.gpu.calls import Call, run_calls
from bench.gpu.kernels import fused_warm
from bench.gpu.setting import ROOT, Row, Setting, groups_of, inputs, shape
from bench.gpu.shards import KERNEL_TESTS, SHARDS, TINY_SHARDS, Shard
from bench.gpu.timing import relative_error

__all__ = ["correctness", "correctness_calls", "run_shard", "run_shards"]

# A process of tests needs some seconds to start.
_SHORTEST_SHARD = 15.0
_MOST_FAILURES = 3  # the shard has failed; more of them cost time


def _command(shard: Shard, outcomes: Path) -> list[str]:
    """Return the command of a shard, compiled on the card (interpreted in a dry run); few drawn cases.

    The compiler takes most of the time, and each drawn case calls it several times.
    """
    command = [sys.executable, "-m", "pytest", "-q", f"--maxfail={_MOST_FAILURES}", "--hypothesis-profile", "few"]
    command += ["-p", "no:cacheprovider", "-p", "bench.gpu.nth_test", "--nth", f"{shard.part}/{shard.parts}"]
    command += ["--outcomes", str(outcomes), f"{KERNEL_TESTS}/{shard.file}"]
    return [*command, "-k", shard.keyword] if shard.keyword else command


def _run_until(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Return exit code and output; after `limit` seconds kill the process and its children, and return None."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def run_shard(shard: Shard, left: float) -> Row:
    """Return the row of a shard: its status is passed, failed, timeout, or not run.

    A test that failed before the time was out, and a process that crashed, are failures. `left` is the time that the
    suite has; the shard's own limit holds too.
    """
    row: Row = {"check": "tests", "shard": shard.name, "covers": list(shard.covers)}
    limit = min(shard.seconds, left)
    if limit < _SHORTEST_SHARD:
        return {**row, "status": "not run", "reason": "out of time"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        code, output = _run_until(_command(shard, path), limit)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A killed process may leave half a line.
    outcomes = [json.loads(line) for line in lines if line.endswith('"]')]
    failed = [name for name, outcome in outcomes if outcome == "failed"]
    row["seconds"] = time.monotonic() - start
    row |= {key: sum(outcome == key for _, outcome in outcomes) for key in ("passed", "skipped")}
    if failed:
        return {**row, "status": "failed", "failed": failed}
    if code is None:
        return {**row, "status": "timeout", "reason": f"not done after {limit:.0f} s"}
    if code:
        return {**row, "status": "failed", "failed": [], "output": output[-500:]}
    if not row["passed"]:
        return {**row, "status": "not run", "reason": "every test was skipped"}
    return {**row, "status": "passed"}


def run_shards(setting: Setting, shards: Sequence[Shard], workers: int) -> Iterator[Row]:
    """Yield the row of each shard as it ends, so many at a time."""
    with ThreadPoolExecutor(workers) as pool:
        rows = [pool.submit(lambda s=shard: run_shard(s, setting.budget.left())) for shard in shards]
        for row in as_completed(rows):
            yield row.result()


def _exactness(setting: Setting, n: int, head_dim: int, dense: bool) -> Row:
    """Compare every result and gradient at a timed shape with float64, and with a second run bit by bit.

    Bound: twice the error of PyTorch's own attention in the same precision, and at least one rounding of the inputs.
    """
    sizes = shape(setting, n, True) if setting.tiny else (1, 5, 1)
    q, k, v = inputs(setting, sizes, n, head_dim)
    groups = groups_of(q, dense)
    generator = setting.generator(1)
    incoming = [
        torch.randn(q.shape, device=q.device, dtype=setting.dtype, generator=generator),
        torch.randn((*q.shape[:3], 2), device=q.device, generator=generator),
    ]

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        outputs = abft_kernels.mass_attention(*leaves, groups, 2, backend=backend)
        gradients = [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, gradients)]

    ours, again = results(setting.dtype, "triton"), results(setting.dtype, "triton")
    oracle, base = results(torch.float64, "torch"), results(setting.dtype, "torch")
    names = ("out", "mass", "dq", "dk", "dv")
    errors = {name: relative_error(x, y) for name, x, y in zip(names, ours, oracle, strict=True)}
    allowed = {name: relative_error(x, y) for name, x, y in zip(names, base, oracle, strict=True)}
    floor = torch.finfo(setting.dtype).eps
    bitwise = all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    return {
        "labels": "dense" if dense else "sparse",
        "ok": bitwise and all(errors[name] <= 2 * allowed[name] + floor for name in names),
        "bitwise": bitwise,
        "error": errors,
        "pytorch_error": allowed,
    }


def correctness_calls(setting: Setting) -> Iterator[Call]:
    """Yield the comparisons with float64."""
    n = 48 if setting.tiny else 4096
    for head_dim in (64, 128):
        for dense in (False, True):
            yield Call(
                {"check": "float64", "n": n, "head_dim": head_dim, "ok": False},
                kind="float64",
                work=head_dim,
                measured=partial(_exactness, n=n, head_dim=head_dim, dense=dense),
                warm=fused_warm("abft, sparse", n, head_dim, True),
            )


def correctness(setting: Setting) -> Iterator[Row]:
    """Yield a row for each comparison with float64, and one for each shard of the kernel tests."""
    yield from run_calls(setting, correctness_calls(setting))
    shards = TINY_SHARDS if setting.tiny else SHARDS
    yield from run_shards(setting, shards, 1 if setting.tiny else os.cpu_count() or 1)
