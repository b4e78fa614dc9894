"""`python -m bench.compile.derive`: the choice without a GPU by its command, what a GPU would measure interpreted."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abft_kernels.triton.launch import TABLE, Launch, architecture, launch_config

ROOT = Path(__file__).parents[3]
SERIAL = SimpleNamespace(map=map)
_CLEAN = {"spills": 0, "loop_spills": 0}


@pytest.fixture(scope="module")
def derive():
    """The module, which turns the interpreter off for itself: kernels are made before, the variable is set again."""
    for name in ("backward", "combine", "forward", "rows"):
        importlib.import_module(f"abft_kernels.triton.{name}")
    interpreted = os.environ.get("TRITON_INTERPRET")
    module = importlib.import_module("bench.compile.derive")
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    return module


def test_the_table_is_what_the_command_chooses(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "derived.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.compile.derive",
            "--arch",
            "90",
            "--only",
            "rows-4",
            "--widths",
            "64",
            "--jobs",
            "1",
            "--json",
            str(path),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    entries = json.loads(path.read_text())["entries"]
    assert [entry["key"] for entry in entries] == [["rows", 4, 90, 64, 2], ["rows", 4, 90, 64, 16]]
    assert [16, Launch(*entries[1]["launch"])] == list(TABLE["rows", 4, 90][0][1:])


def test_nothing_to_choose(derive, capsys):
    with pytest.raises(SystemExit):
        derive.main(["--only", "sideways"])
    assert "no kernel's name holds --only 'sideways'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        derive.main(["--measure"]) if not torch.cuda.is_available() else derive.main(["--widths", "3"])


def test_passing_compiles_each_form_once_and_refuses_early(derive, monkeypatch):
    seen = []

    def compiled(case):
        seen.append(case)
        wide = case.launch.block_n >= 128
        in_loop = 30 if wide else 2 * (case.variant in derive.FEATURES)
        return {"spills": 40, "stack": 0, "shared": 0, "arch": case.arch, "loop_spills": in_loop}

    monkeypatch.setattr(derive, "compile_case", compiled)
    keys = derive._keys([90], "forward-2", [64])
    pairs, refused = derive.passing(SERIAL, keys)
    wide = [launch for _, launch in refused]
    assert len(seen) == len(set(seen))
    assert {launch.block_n for launch in wide} == {128}
    assert {case.variant for case in seen if case.launch in wide} == {"full"}
    assert len(pairs) + len(refused) == 2 * len(derive.CANDIDATES["forward", 2][64])
    assert all("full G2: spills: 40" in why for why in refused.values())


@pytest.mark.parametrize(
    ("form", "spills", "loop_spills", "passes"),
    [
        ("full", 2, 0, False),
        ("lean", 2, 0, False),
        ("ones", 2, 0, False),
        ("gemma", 20, 0, True),
        ("oss", 20, 1, False),
    ],
)
def test_what_may_spill_without_a_clock(derive, monkeypatch, form, spills, loop_spills, passes):
    def compiled(case):
        found = {"spills": spills, "loop_spills": loop_spills} if case.variant == form else _CLEAN
        return {"stack": 0, "shared": 0, "arch": case.arch, **found}

    monkeypatch.setattr(derive, "compile_case", compiled)
    _, launch, refused = derive.choose(derive.Key("forward", 2, 90, 64, 2))
    assert (launch is not None) is passes
    assert bool(refused) is not passes


@pytest.mark.parametrize(
    ("table", "element_size", "shapes"),
    [
        ("forward", 2, [(1, 32, 48, 64), (1, 32, 48, 3)]),
        ("backward_kv", 2, [(1, 32, 48, 64), (1, 8, 48, 64), (1, 8, 48, 64)]),
        ("backward_q", 4, [(1, 32, 48, 64), (1, 8, 48, 64), (1, 8, 48, 64)]),
        ("rows", 2, [(1, 32, 1, 64), (1, 8, 48, 64)]),
    ],
)
def test_what_is_timed_runs_with_the_candidate(derive, device, monkeypatch, table, element_size, shapes):
    used = {}

    def spy(kernel, *arguments):
        used[kernel] = launch_config(kernel, *arguments)
        return used[kernel]

    for name in ("backward", "forward", "rows"):
        monkeypatch.setattr(f"abft_kernels.triton.{name}.launch_config", spy)
    key, candidate = derive.Key(table, element_size, architecture(device), 64, 3), Launch(32, 32, 2, 1)
    entries = list(TABLE[key[:3]])
    run = derive.operator(key, candidate, 48, device.type)
    used.clear()
    results = run()
    assert used.pop(table) == candidate
    assert candidate not in used.values()  # the other kernels as they are
    assert TABLE[key[:3]] == entries
    assert [tuple(x.shape) for x in results] == shapes
    assert all(x.isfinite().all() for x in results)


def test_the_fastest_is_chosen(derive, monkeypatch):
    key = derive.Key("forward", 2, 90, 64, 2)
    candidates = [(key, Launch(*one)) for one in derive.CANDIDATES["forward", 2][64]]
    monkeypatch.setattr(derive, "_warm", lambda key, launch, tokens: "does not run" if launch.num_warps == 4 else "")
    monkeypatch.setattr(derive, "operator", lambda key, launch, tokens: launch)
    monkeypatch.setattr(
        "bench.gpu.timing.measure", lambda launch, device: {"median": float(launch.block_n), "low": 0.0, "high": 0.0}
    )
    times, refused = derive._measure(SERIAL, candidates, 64)
    assert {launch.num_warps for _, launch in refused} == {4}
    assert {launch.block_n for _, launch in times} == {64, 128}


@pytest.mark.parametrize("timed", [True, False])
def test_measured_entries_replace_others_and_nothing_is_lost(derive, monkeypatch, tmp_path, timed, capsys):
    """The whole command, with a clock that prefers few warps, or one that nothing comes before."""
    keys = [derive.Key("forward", 2, 90, 64, groups) for groups in (2, 16)]
    pairs = [(keys[0], Launch(*one)) for one in derive.CANDIDATES["forward", 2][64]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Card")
    monkeypatch.setattr("abft_kernels.triton.launch.architecture", lambda device: 90)
    monkeypatch.setattr(derive, "passing", lambda pool, keys: (pairs, {}))
    times = {pair: {"median": float(pair[1].num_warps), "low": 0.0, "high": 9.0} for pair in pairs} if timed else {}
    broken = {} if timed else {pair: "does not run: no card" for pair in pairs}
    monkeypatch.setattr(derive, "_measure", lambda pool, pairs, tokens: (times, broken))
    package = tmp_path / "abft_kernels" / "triton"
    package.mkdir(parents=True)
    monkeypatch.setattr(derive.abft_kernels, "__file__", str(package.parent / "__init__.py"))
    done = derive.main(["--measure", "--only", "forward-2", "--widths", "64", "--jobs", "1", "--write"])
    if not timed:
        assert done == 1
        assert not list(package.iterdir())
        assert "does not run: no card" in capsys.readouterr().err
        return
    written: dict = {}
    exec((package / "launch_table.py").read_text(), written)
    assert "forward-2 head tiles 64): the fastest at 8192 tokens on\nNVIDIA Card" in written["__doc__"]
    fastest = min(pairs, key=lambda pair: pair[1].num_warps)[1]
    old, new = TABLE["forward", 2, 90], written["TABLE"]["forward", 2, 90]
    assert new[0] == (64, 2, fastest)
    assert [entry[:2] for entry in new[1:]] == [entry[:2] for entry in old[1:]]
    assert {key: entries for key, entries in written["TABLE"].items() if key != ("forward", 2, 90)} == {
        key: entries for key, entries in TABLE.items() if key != ("forward", 2, 90)
    }
