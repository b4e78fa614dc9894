"""The shards of the kernel tests: they hold every test once, and a shard's status is right whatever ends it."""

import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import correctness
from bench.gpu.budget import SUITES, Budget
from bench.gpu.correctness import run_shard, run_shards
from bench.gpu.nth_test import chosen
from bench.gpu.setting import ROOT, Setting
from bench.gpu.shards import KERNEL_TESTS, SHARDS, Shard

TESTS = """
import time
def test_passes(): pass
def test_{name}():
    {body}
"""


def test_shards_cover_every_file_and_every_suite():
    files = {path.name for path in (ROOT / KERNEL_TESTS).glob("test_*.py")} - {"test_aot.py"}
    assert {shard.file for shard in SHARDS} == files
    covered = {suite for shard in SHARDS for suite in shard.covers}
    assert covered == set(SUITES) - {"correctness"}
    assert len({shard.name for shard in SHARDS}) == len(SHARDS)
    for file in files:
        keywords = {(shard.keyword, shard.parts) for shard in SHARDS if shard.file == file}
        for keyword, parts in keywords:
            mine = [shard.part for shard in SHARDS if (shard.file, shard.keyword) == (file, keyword)]
            assert mine == list(range(1, parts + 1))
        names = {keyword for keyword, _ in keywords}
        assert names == {""} or names == {"packed:", "not packed:"}


def test_parts_hold_every_test_once():
    names = [f"test_fused[{case}-{backend}]" for case in range(40) for backend in ("triton", "torch")]
    parts = [chosen(names, part, 6) for part in range(1, 7)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert {len(part) for part in parts} == {13, 14}
    assert all(any("triton" in name for name in part) and any("torch" in name for name in part) for part in parts)


@pytest.fixture
def shard_of(tmp_path, monkeypatch):
    """Return a function that runs a file of two tests, the second of this body, as a shard."""

    def run(body, seconds=120.0, name="second", parts=1):
        folder = tmp_path / "tests"
        folder.mkdir(exist_ok=True)
        (folder / "test_made_up.py").write_text(TESTS.format(name=name, body=body))
        monkeypatch.setattr(correctness, "KERNEL_TESTS", str(folder))
        monkeypatch.setattr(correctness, "_SHORTEST_SHARD", 1.0)
        command = correctness._command

        def without_profile(shard, outcomes):
            whole = command(shard, outcomes)
            at = whole.index("--hypothesis-profile")
            return [*whole[:at], *whole[at + 2 :]]

        monkeypatch.setattr(correctness, "_command", without_profile)
        return run_shard(Shard("test_made_up.py", 1, parts, ("rows",), seconds=seconds), 120.0)

    return run


def test_a_shard_passes(shard_of):
    row = shard_of("pass")
    assert (row["status"], row["passed"], row["covers"]) == ("passed", 2, ["rows"])
    assert "reason" not in row


def test_a_shard_fails(shard_of):
    row = shard_of("assert False")
    assert row["status"] == "failed"
    assert [name.split("::")[1] for name in row["failed"]] == ["test_second"]


def test_a_crash_is_a_failure(shard_of):
    row = shard_of("import os; os._exit(11)")
    assert (row["status"], row["passed"]) == ("failed", 1)


def test_a_shard_times_out(shard_of):
    row = shard_of("time.sleep(600)", seconds=15.0)
    assert row["status"] == "timeout"
    assert row["reason"] == "not done after 15 s"


def test_a_failure_before_the_time_is_out_is_a_failure(shard_of):
    row = shard_of("assert False\ndef test_third(): time.sleep(600)", seconds=15.0)
    assert row["status"] == "failed"


def test_a_shard_without_time_is_not_run():
    setting = Setting(torch.device("cpu"), Budget(0), tiny=True)
    rows = list(run_shards(setting, SHARDS[:3], workers=2))
    assert [row["status"] for row in rows] == ["not run"] * 3
    assert {row["shard"] for row in rows} == {shard.name for shard in SHARDS[:3]}


def test_the_command_of_a_shard():
    command = correctness._command(SHARDS[0], Path("out"))
    assert command[0] == sys.executable
    assert {"tests/abft_kernels/test_mass_attention.py", "few", "1/8", "bench.gpu.nth_test"} <= set(command)
    packed = next(shard for shard in SHARDS if shard.keyword == "packed:")
    assert correctness._command(packed, Path("out"))[-2:] == ["-k", "packed:"]
