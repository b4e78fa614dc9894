"""The seconds of the suites: their sum, how time is passed on, and rows that are not begun."""

import time

import pytest
import torch

from bench.__main__ import _options
from bench.gpu.budget import BUDGETS, LIMIT, SUITES, Budget, Forecast, Schedule
from bench.gpu.calls import Call, memory_reason, run_calls
from bench.gpu.collect import _suites
from bench.gpu.setting import Setting


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _setting(seconds=100.0):
    return Setting(torch.device("cpu"), Budget(seconds), tiny=True)


def test_budgets_are_of_nine_minutes():
    assert LIMIT == 540
    assert sum(BUDGETS.values()) <= LIMIT
    assert tuple(_suites()) == SUITES


def test_time_not_used_is_passed_on():
    clock = Clock()
    schedule = Schedule(SUITES, clock=clock)
    clock.now += 10  # of the prewarm's time
    saved = BUDGETS["prewarm"] - 10
    assert schedule.budget("correctness").left() == pytest.approx(BUDGETS["correctness"] + saved)
    clock.now += BUDGETS["correctness"] + saved
    assert schedule.budget("kernels").left() == pytest.approx(BUDGETS["kernels"])


def test_a_suite_that_runs_late_takes_no_time_from_the_suite_after_the_next():
    clock = Clock()
    schedule = Schedule(SUITES, clock=clock)
    clock.now += BUDGETS["prewarm"] + BUDGETS["correctness"] + 5
    assert schedule.budget("kernels").left() == pytest.approx(BUDGETS["kernels"] - 5)
    clock.now += BUDGETS["kernels"] - 5
    assert schedule.budget("rows").left() == pytest.approx(BUDGETS["rows"])


def test_chosen_suites_share_the_seconds():
    schedule = Schedule(["rows"], 95.0)
    assert list(schedule.shares) == ["prewarm", "rows"]
    assert sum(schedule.shares.values()) == pytest.approx(95)


def test_forecast_scales_the_last_row():
    forecast = Forecast()
    assert forecast.seconds("eager", 10.0, first=3.0) == 3.0
    forecast.add("eager", 10.0, 2.0)
    assert forecast.seconds("eager", 40.0) == 8.0
    assert forecast.seconds("eager", 5.0) == 2.0


def test_a_row_that_will_not_fit_is_not_begun():
    done = []

    def measured(setting, n):
        done.append(n)
        time.sleep(0.3)
        return {"value": n}

    calls = [Call({"n": n}, "kind", float(n), lambda setting, n=n: measured(setting, n)) for n in (1, 100)]
    short, long = run_calls(_setting(5.0), calls)
    assert short == {"n": 1, "value": 1}
    assert done == [1]
    assert long["reason"].startswith("out of time: 3")


def test_a_row_that_needs_more_than_the_free_memory_is_not_begun(monkeypatch):
    monkeypatch.setattr("bench.gpu.calls.free_bytes", lambda device: 2 << 30)
    call = Call({"name": "eager"}, "eager", 1.0, lambda setting: {"value": 1}, square_bytes=3 << 30)
    (row,) = run_calls(_setting(), [call])
    assert row["predicted_bytes"] == 3 << 30
    assert row["free_bytes"] == 2 << 30
    assert "3.0 GiB predicted" in row["reason"]
    assert "2.0 GiB free" in row["reason"]
    (row,) = run_calls(_setting(), [call._replace(square_bytes=1 << 30)])
    assert row["value"] == 1
    assert memory_reason(1e18, None) == {}


def test_the_sanitizer_has_seconds_of_its_own():
    assert _options(["--gpu", "--sanitize", "--sanitize-budget", "40"]).sanitize_budget == 40
    assert "sanitizer" not in BUDGETS
