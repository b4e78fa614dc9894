"""`python -m bench --gpu`: every suite on one GPU, in under nine minutes, into one JSON.

The file is written anew after each suite, so that a run cut off keeps what it has. A row that the time did not allow
says "out of time". `--dry-run` runs everything on a CPU in tiny shapes, kernels interpreted, to see that it runs; its
file says so and is no result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from abft.files import write_json
from bench.record import provenance

__all__ = ["SANITIZED", "collect"]

# compute-sanitizer runs a case of each kernel, and of the features with the most address arithmetic.
SANITIZED = "packed or decoding or (window and left) or (all and fused)"
TOOLS = ("memcheck", "racecheck", "initcheck")


def _sanitize(limit: float) -> dict[str, Any]:
    """Run compute-sanitizer over a few kernel tests; return each tool's exit code and last lines."""
    from bench.gpu.correctness import KERNEL_TESTS
    from bench.gpu.setting import ROOT

    tool = shutil.which("compute-sanitizer")
    if tool is None:
        missing = "no compute-sanitizer on this machine"
        return {"seconds": 0.0, "rows": [{"check": name, "reason": missing} for name in TOOLS]}
    start, rows = time.monotonic(), []
    # PyTorch's caching allocator would hide reads past a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist"]
    tests += [f"{KERNEL_TESTS}/test_features.py", "-k", SANITIZED]
    each = limit / len(TOOLS)
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=each, check=False
            )
            rows.append({"check": name, "ok": done.returncode == 0, "tail": done.stdout[-1500:] + done.stderr[-500:]})
        except subprocess.TimeoutExpired:
            rows.append({"check": name, "reason": f"not done after {each:.0f} s"})
    return {"seconds": time.monotonic() - start, "rows": rows}


def collect(
    out_dir: Path, *, budget: float, only: list[str] | None = None, dry_run: bool = False, sanitize: bool = False
) -> Path:
    """Run the suites, write `gpu.json` (`gpu_dry_run.json`), and return its path.

    Raises:
        RuntimeError: no CUDA GPU, and no dry run asked for.
    """
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, below
    import torch

    from bench.cases.precision import collect as precision
    from bench.gpu import correctness, kernels, model_steps, one_row, timing
    from bench.gpu.setting import Setting

    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError("no CUDA GPU here; --dry-run runs the suites on the CPU to see that they run")
    suites = {
        "correctness": correctness.correctness,
        "kernels": kernels.kernels,
        "rows": one_row.rows,
        "memory": kernels.memory,
        "training": model_steps.training,
        "flex": kernels.flex,
    }
    device = torch.device("cpu" if dry_run else "cuda")
    setting = Setting(device, timing.Budget(budget), dry_run, alone=bool(only) and len(only) == 1)
    result: dict[str, Any] = {
        "kind": "gpu",
        "dry_run": dry_run,
        "provenance": provenance() | {"gpu": timing.gpu_state(device)},
        "ceilings": timing.ceilings(device),
        "suites": {},
        "complete": False,
    }
    path = out_dir / ("gpu_dry_run.json" if dry_run else "gpu.json")
    write_json(path, result)
    for name, suite in suites.items():
        if only and name not in only:
            continue
        start = time.monotonic()
        print(f"{name} … ({setting.budget.left():.0f} s left)", flush=True)
        rows = []
        for row in suite(setting):
            rows.append(row)
            print("  " + _brief(row), flush=True)
        result["suites"][name] = {"seconds": time.monotonic() - start, "rows": rows}
        write_json(path, result)
    if not only or "precision" in only:
        result["suites"]["precision"] = {"rows": precision(device, seeds=1 if dry_run else 5)}
    if sanitize:
        result["suites"]["sanitizer"] = _sanitize(max(60.0, setting.budget.left()))
    result["provenance"]["gpu_after"] = timing.gpu_state(device)
    result["complete"] = not only
    write_json(path, result)
    return path


def _brief(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    keys = ("check", "model", "name", "prompts", "n", "head_dim", "heads", "labels")
    title = " ".join(str(row[key]) for key in keys if key in row)
    if "reason" in row:
        return f"{title}: {row['reason']}"
    shown = []
    for key, value in row.items():
        if isinstance(value, dict) and "median" in value:
            shown.append(f"{key} {value['median']:.3f}")
        elif isinstance(value, float) or key in ("ok", "launches", "tests", "failures", "both_bytes", "peak_bytes"):
            shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return f"{title}: {', '.join(shown)}"
