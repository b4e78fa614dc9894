"""Compilation in other processes: what fails there, or dies there, costs its own task alone."""

import os
import signal
import time

import pytest

from bench.gpu.budget import Budget
from bench.gpu.calls import Warm
from bench.gpu.prewarm import ordered, prewarm


def succeed(setting):
    assert setting.tiny


def fail(setting):
    raise ValueError("this kernel does not compile\nat all")


def die(setting):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(setting):
    time.sleep(600)


def _names(tasks):
    return [(task.family[0], task.variant) for task in tasks]


def test_every_configuration_is_compiled_once_and_new_families_first():
    tasks = [
        Warm(("a",), 512, succeed, 10),
        Warm(("a",), 1024, succeed, 10),
        Warm(("a",), 512, fail, 10),
        Warm(("b",), 0, succeed, 40),
    ]
    assert _names(ordered(tasks)) == [("b", 0), ("a", 512), ("a", 1024)]


def test_a_failing_and_a_dying_worker_end_nothing():
    tasks = [
        Warm((name,), 0, run) for name, run in (("fails", fail), ("dies", die), ("works", succeed), ("too", succeed))
    ]
    rows = {row["name"]: row for row in prewarm(tasks, "cpu", True, Budget(300), workers=2)}
    assert rows["fails 0"]["reason"] == "ValueError: this kernel does not compile"
    assert rows["dies 0"]["reason"] == f"its process ended with exit code {-signal.SIGKILL}"
    assert "reason" not in rows["works 0"]
    assert "reason" not in rows["too 0"]


def test_time_that_is_out_ends_the_workers():
    start = time.monotonic()
    rows = list(prewarm([Warm((name,), 0, hang) for name in "abc"], "cpu", True, Budget(1), workers=2))
    assert time.monotonic() - start < 60
    assert [row["reason"] for row in rows] == ["not done in time", "not done in time", "out of time"]


@pytest.mark.parametrize("name", ["kernels", "rows", "memory", "flex", "training", "correctness", "precision"])
def test_every_suite_lists_what_it_compiles(name):
    """On a card: within a second, without a tensor made, and in a form that a process can be sent."""
    import pickle

    import torch

    from bench.gpu.collect import _suites
    from bench.gpu.setting import Setting

    tasks = ordered(_suites()[name].warm(Setting(torch.device("cuda"), Budget(1), tiny=False)))
    assert 0 < len(tasks) <= 30
    assert pickle.loads(pickle.dumps(tasks))[0].family == tasks[0].family
