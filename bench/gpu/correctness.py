"""The correctness suite: the kernel tests on the card, and results at timed shapes against float64."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import abft_kernels
from bench.gpu.setting import ROOT, Row, Setting, groups_of, inputs, tried
from bench.gpu.timing import relative_error

__all__ = ["KERNEL_TESTS", "correctness"]

KERNEL_TESTS = "tests/abft_kernels"


def run_kernel_tests(setting: Setting, workers: int) -> Row:
    """Run the kernel tests, compiled on the card (interpreted in a dry run, and few of them).

    The compiler takes most of the time, and each drawn case calls it several times: few cases are drawn.
    """
    which = f"{KERNEL_TESTS}/test_validation.py" if setting.tiny else KERNEL_TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-x" if setting.tiny else "--maxfail=50", which]
    command += ["--deselect", f"{KERNEL_TESTS}/test_aot.py", "--hypothesis-profile", "few"]
    if workers > 1:
        command += ["-n", str(workers), "--dist", "worksteal"]
    limit = max(30.0, setting.budget.left() - 20 if setting.alone else min(300.0, setting.budget.left() - 60))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command.append(f"--junitxml={report}")
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"check": "pytest", "ok": False, "reason": f"not done after {limit:.0f} s"}
        if not report.exists():
            return {"check": "pytest", "ok": False, "reason": done.stdout[-500:] + done.stderr[-500:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return {"check": "pytest", "ok": False, "reason": "pytest's report holds no test suite"}
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ok = counts["tests"] > 0 and not counts["failures"] and not counts["errors"]
    return {"check": "pytest", "ok": ok, **counts, "failed": failed[:50]}


def _exactness(setting: Setting, n: int, head_dim: int, dense: bool) -> Row:
    """Compare every result and gradient at a timed shape with float64, and with a second run bit by bit.

    Bound: twice the error of PyTorch's own attention in the same precision, and at least one rounding of the inputs.
    """
    q, k, v = (x[:1, : 5 if i == 0 else 1] for i, x in enumerate(inputs(setting, n, head_dim, True)))
    if setting.tiny:
        q = q[:, :2]
    groups = groups_of(q, dense)
    generator = torch.Generator(device=setting.device).manual_seed(1)
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


def correctness(setting: Setting) -> Iterator[Row]:
    """Yield a row for each comparison with float64, and one for the kernel tests."""
    n = 48 if setting.tiny else 4096
    for head_dim in (64, 128):
        for dense in (False, True):
            row = tried(lambda d=head_dim, dense=dense: _exactness(setting, n, d, dense))
            yield {"check": "float64", "n": n, "head_dim": head_dim, "ok": False, **row}
    yield run_kernel_tests(setting, 1 if setting.tiny else os.cpu_count() or 1)
