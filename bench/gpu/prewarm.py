"""Compile everything that will be timed, on all cores, before anything is timed.

Worker processes run each kernel and shape once on the same card. What they compile lands in the caches on disk of
Triton and of PyTorch's compiler, where the timed process finds it. A worker that fails, dies or hangs costs its own
task alone: the reason is recorded, and the timed process compiles what is missing before its first timed call.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from typing import TYPE_CHECKING, Any

from bench.gpu.budget import Budget

if TYPE_CHECKING:
    from bench.gpu.calls import Warm

__all__ = ["ordered", "prewarm"]

_CONTEXT = get_context("spawn")  # a forked process cannot use CUDA


def ordered(tasks: Sequence[Warm]) -> list[Warm]:
    """Return each distinct task once: the first of every family before the others, longer ones first."""
    distinct: dict[Any, Warm] = {}
    for task in tasks:
        distinct.setdefault((task.family, task.variant), task)
    ranks: Counter[Any] = Counter()
    keyed = []
    for task in distinct.values():
        keyed.append((ranks[task.family], -task.seconds, task))
        ranks[task.family] += 1
    return [task for *_, task in sorted(keyed, key=lambda entry: entry[:2])]


def _work(pipe: Any, device: str, tiny: bool) -> None:
    """Run tasks from the pipe until None comes; answer each with the reason of its failure, or an empty string."""
    import torch
    import torch._inductor.config

    from bench.gpu.setting import Setting

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # this process is one of as many as there are cores
    while (task := pipe.recv()) is not None:
        try:
            task.run(Setting(torch.device(device), Budget(3600), tiny))
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            pipe.send("")
        except Exception as error:  # of a compiler, of memory, of a missing package
            pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


class _Worker:
    """A process that compiles, and the task that it has."""

    def __init__(self, device: str, tiny: bool):
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(theirs, device, tiny), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the process ends the pipe
        self.task: Warm | None = None
        self.start = 0.0

    def give(self, task: Warm) -> None:
        """Send a task; a process that has died is found when its answer is read."""
        self.task, self.start = task, time.monotonic()
        with suppress(OSError):
            self.pipe.send(task)

    def answer(self) -> str | None:
        """Return the reason of a failure, or None where the process has died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return None

    def stop(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _row(task: Warm, reason: str, seconds: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": " ".join(map(str, (*task.family, task.variant)))}
    if seconds is not None:
        row["seconds"] = seconds
    return {**row, "reason": reason} if reason else row


def _finished(worker: _Worker) -> tuple[dict[str, Any], bool]:
    """Return the row of the worker's task, and True if the worker can take another one."""
    task, seconds = worker.task, time.monotonic() - worker.start
    assert task is not None
    worker.task = None
    reason = worker.answer()
    if reason is None:
        return _row(task, f"its process ended with exit code {worker.process.exitcode}", seconds), False
    return _row(task, reason, seconds), True


def prewarm(tasks: Sequence[Warm], device: str, tiny: bool, budget: Budget, workers: int) -> Iterator[dict[str, Any]]:
    """Run the tasks in worker processes and yield a row for each, in the order in which they end.

    Args:
        tasks: what to run, in this order.
        device: type of the device, "cuda" or "cpu".
        tiny: run in the shapes of a dry run.
        budget: a task that is not done by then is given up.
        workers: number of processes.
    """
    from rich.progress import Progress

    waiting = deque(tasks)
    crew: list[_Worker] = []
    try:
        with Progress() as bars:
            bar = bars.add_task("Compiling", total=len(waiting))
            while (waiting or any(worker.task for worker in crew)) and budget.left() > 0:
                while waiting and len(crew) < workers and all(worker.task for worker in crew):
                    crew.append(_Worker(device, tiny))
                    crew[-1].give(waiting.popleft())
                for worker in crew:
                    if waiting and worker.task is None:
                        worker.give(waiting.popleft())
                busy = {worker.pipe: worker for worker in crew if worker.task}
                for pipe in connection.wait(list(busy), timeout=max(0.0, budget.left())):
                    row, alive = _finished(busy[pipe])
                    if not alive:
                        busy[pipe].stop()
                        crew.remove(busy[pipe])
                    bars.advance(bar)
                    yield row
        for worker in crew:
            if worker.task:
                yield _row(worker.task, "not done in time", time.monotonic() - worker.start)
        for task in waiting:
            yield _row(task, "out of time")
    finally:
        for worker in crew:
            worker.stop()
