"""compute-sanitizer over a few kernel tests, in a time of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.gpu.setting import ROOT, Row
from bench.gpu.shards import KERNEL_TESTS

__all__ = ["SANITIZED", "TOOLS", "sanitize"]

# A case of each kernel, and of the features with the most address arithmetic.
SANITIZED = "packed or decoding or (window and left) or (all and fused)"
TOOLS = ("memcheck", "racecheck", "initcheck")


def sanitize(seconds: float) -> Iterator[Row]:
    """Yield a row for each tool: its verdict and last lines. A tool that ends early leaves its time to the next."""
    tool = shutil.which("compute-sanitizer")
    end = time.monotonic() + seconds
    # PyTorch's caching allocator would hide reads past a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist"]
    tests += [f"{KERNEL_TESTS}/test_features.py", "-k", SANITIZED]
    for index, name in enumerate(TOOLS):
        if tool is None:
            yield {"check": name, "reason": "no compute-sanitizer on this machine"}
            continue
        limit = max(0.0, end - time.monotonic()) / (len(TOOLS) - index)
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
            yield {"check": name, "ok": done.returncode == 0, "tail": done.stdout[-1500:] + done.stderr[-500:]}
        except subprocess.TimeoutExpired:
            yield {"check": name, "reason": f"not done after {limit:.0f} s"}
