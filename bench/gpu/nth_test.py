"""A pytest plugin: run the n-th of N parts of the tests, and write each outcome to a file as soon as it is known.

    python -m pytest -p bench.gpu.nth_test --nth 2/6 --outcomes FILE tests/…

The parts are equal in size within one test and hold every test once. The file survives a process that is killed.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("shards")
    group.addoption("--nth", default="1/1", help="part of the tests to run, as 2/6")
    group.addoption("--outcomes", type=Path, help="file to which each outcome is appended")


def chosen(names: list[str], part: int, parts: int) -> set[str]:
    """Return the names of one part: every `parts`-th in the order of a hash, which mixes cheap and dear tests."""
    return set(sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))[part - 1 :: parts])


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    part, parts = map(int, config.getoption("--nth").split("/"))
    mine = chosen([item.nodeid for item in items], part, parts)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
    items[:] = [item for item in items if item.nodeid in mine]


class _Outcomes:
    """Writes a line for each test: its name, and "passed", "failed" or "skipped"."""

    def __init__(self, path: Path):
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down count if they fail
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


def pytest_configure(config: Any) -> None:
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(_Outcomes(path), "outcomes")
