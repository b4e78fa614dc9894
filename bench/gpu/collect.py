"""`python -m bench --gpu`: every suite on one GPU, in under nine minutes, into one JSON.

What is timed is compiled first, in other processes. The file is written anew after each suite, so that a run cut off
keeps what it has. A row that time or memory do not allow says so. `--dry-run` runs everything on a CPU in tiny shapes,
kernels interpreted, to see that it runs; its file says so and is no result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abft.files import write_json
from bench.gpu.budget import FIRST_ROW, SUITES, Schedule
from bench.record import provenance

if TYPE_CHECKING:
    from bench.gpu.calls import Warm
    from bench.gpu.setting import Row, Setting

__all__ = ["collect"]

_DRY_WORKERS = 2


class Suite(NamedTuple):
    """A suite: its rows, and what they need compiled."""

    rows: Callable[[Setting], Iterator[Row]]
    warm: Callable[[Setting], list[Warm]]


def _precision(setting: Setting, seeds: int = 5) -> Iterator[Row]:
    """Yield the errors of a saturated head's gradient; they take seconds."""
    from bench.cases.precision import collect as precision

    if reason := setting.budget.reason(FIRST_ROW):
        yield {"name": "precision", "reason": reason}
        return
    yield from precision(setting.device, seeds=1 if setting.tiny else seeds)


def _compile_precision(setting: Setting) -> None:
    list(_precision(setting, seeds=1))


def _suites() -> dict[str, Suite]:
    """Return the suites in the order of `bench.gpu.budget.BUDGETS`."""
    from bench.gpu import correctness, kernels, model_steps, one_row
    from bench.gpu.calls import Warm, warm_calls

    def suite(rows: Any, calls: Any) -> Suite:
        return Suite(rows, lambda setting: warm_calls(calls(setting)))

    return {
        "correctness": suite(correctness.correctness, correctness.correctness_calls),
        "kernels": suite(kernels.kernels, kernels.kernel_calls),
        "rows": suite(one_row.rows, one_row.row_calls),
        "memory": suite(kernels.memory, kernels.memory_calls),
        "training": Suite(model_steps.training, model_steps.training_warm),
        "flex": suite(kernels.flex, kernels.flex_calls),
        "precision": Suite(_precision, lambda _: [Warm(("precision",), 0, _compile_precision)]),
    }


def _run(suite: Iterator[Row], title: str, budget: float, shown: Callable[[Row], bool]) -> dict[str, Any]:
    """Run a suite and print its rows; return seconds, budget and rows.

    A suite that raises keeps its rows and ends with one that says why; the next suites run.
    """
    start, rows = time.monotonic(), []
    print(f"{title} … ({budget:.0f} s)", flush=True)
    try:
        for row in suite:
            rows.append(row)
            if shown(row):
                print("  " + _brief(row), flush=True)
    except Exception as error:  # of a card in a bad state, too
        rows.append({"name": title, "reason": f"ended early: {type(error).__name__}: {str(error)[:200]}"})
        print("  " + _brief(rows[-1]), flush=True)
    return {"seconds": time.monotonic() - start, "budget": budget, "rows": rows}


def collect(
    out_dir: Path,
    *,
    budget: float | None = None,
    only: list[str] | None = None,
    dry_run: bool = False,
    sanitize: float | None = None,
) -> Path:
    """Run the suites, write `gpu.json` (`gpu_dry_run.json`), and return its path.

    Args:
        out_dir: folder of the file.
        budget: seconds of the chosen suites and of what they need compiled; None: the sum of their budgets.
        only: the chosen suites; None: all.
        dry_run: run on the CPU in tiny shapes.
        sanitize: seconds of compute-sanitizer, after all else; None: it does not run.

    Raises:
        RuntimeError: no CUDA GPU, and no dry run asked for.
    """
    chosen = [name for name in SUITES if not only or name in only]
    schedule = Schedule(chosen, budget)
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, below
    import torch

    from bench.gpu.gpu_card import ceilings, gpu_state
    from bench.gpu.model_steps import plan_keys
    from bench.gpu.plans import Plans
    from bench.gpu.prewarm import ordered, prewarm
    from bench.gpu.sanitizer import sanitize as sanitized
    from bench.gpu.setting import Setting
    from bench.gpu.timing import on_own_stream

    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError("no CUDA GPU here; --dry-run runs the suites on the CPU to see that they run")
    device = torch.device("cpu" if dry_run else "cuda")
    suites = {name: suite for name, suite in _suites().items() if name in chosen}
    setting = Setting(device, schedule.budget("prewarm"), dry_run)
    result: dict[str, Any] = {
        "kind": "gpu",
        "dry_run": dry_run,
        "provenance": provenance() | {"gpu": gpu_state(device)},
        "suites": {},
        "complete": False,
    }
    path = out_dir / ("gpu_dry_run.json" if dry_run else "gpu.json")
    write_json(path, result)
    workers = _DRY_WORKERS if dry_run else os.cpu_count() or 1
    tasks = ordered([task for suite in suites.values() for task in suite.warm(setting)])
    if dry_run:  # the interpreter compiles nothing: a task of each kind
        tasks = list({task.family[0]: task for task in reversed(tasks)}.values())
    work = prewarm(tasks, device.type, dry_run, setting.budget, workers)
    result["suites"]["prewarm"] = _run(work, "prewarm", setting.budget.left(), lambda row: "reason" in row)
    write_json(path, result)
    with ExitStack() as stack:
        stack.enter_context(on_own_stream(device))
        if "training" in suites and not dry_run:
            plans = Plans(plan_keys())
            stack.callback(plans.stop)
            setting = setting._replace(planned=plans)
        result["ceilings"] = ceilings(device)
        for name, suite in suites.items():
            setting = setting._replace(budget=schedule.budget(name))
            result["suites"][name] = _run(suite.rows(setting), name, setting.budget.left(), lambda _: True)
            write_json(path, result)
    result["provenance"]["gpu_after"] = gpu_state(device)
    result["complete"] = not only
    write_json(path, result)
    if sanitize is not None:
        result["suites"]["sanitizer"] = _run(sanitized(sanitize), "compute-sanitizer", sanitize, lambda _: True)
        write_json(path, result)
    return path


def _brief(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    keys = ("check", "shard", "status", "model", "name", "form", "prompts", "n", "head_dim", "heads", "labels")
    title = " ".join(str(row[key]) for key in keys if key in row)
    if "reason" in row:
        return f"{title}: {row['reason']}"
    shown = []
    for key, value in row.items():
        if isinstance(value, dict) and "median" in value:
            host = f" (host {value['host_ms']['median']:.3f}, {value['clock']})" if "host_ms" in value else ""
            shown.append(f"{key} {value['median']:.3f}{host}")
        elif isinstance(value, float) or key in ("ok", "launches", "passed", "failed", "both_bytes", "peak_bytes"):
            shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return f"{title}: {', '.join(shown)}"
