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

from abft_kernels.triton.launch import GPU, TABLE, Launch, gpu_of, launch_config

ROOT = Path(__file__).parents[3]
SERIAL = SimpleNamespace(map=map)


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


def _derive(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compile.derive", "--jobs", "1", *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_table_is_what_the_command_chooses(tmp_path):
    """The launch of an entry, its shared memory on every GPU of the family, and a table that differs nowhere."""
    done = _derive("--families", "sm_90", "--only", "rows-4", "--widths", "64", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    entries = json.loads((tmp_path / "derived.json").read_text())["entries"]
    assert [entry["key"] for entry in entries] == [["rows", 4, "sm_90", 64, 16], ["rows", 4, "sm_90", 64, 2]]
    first = TABLE["rows", 4, "sm_90"][0]
    assert (Launch(*entries[0]["launch"]), entries[0]["shared_memory"]) == (first.launch, first.shared_memory)
    written: dict = {}
    exec((tmp_path / "launch_table.py").read_text(), written)
    assert written["TABLE"] == TABLE


def test_the_table_file_holds_what_it_is_given(derive):
    """Fields of a launch that have a default are written where they differ; the classes stay as they are."""
    entries = derive.present()
    module = ROOT / "abft_kernels" / "triton" / "launch_table.py"
    text = derive.table_source(module, entries, derive.FAMILIES, derive.TABLES, "Chosen by hand.")
    assert text.startswith('"""The launch table. Written by `python -m bench.compile.derive`')
    assert "Chosen by hand." in text
    written: dict = {}
    exec(text, written)
    assert written["TABLE"] == TABLE
    assert text.splitlines()[4:] == module.read_text().splitlines()[4:]


def test_a_launch_for_many_groups_serves_few(derive):
    key, other = (derive.Key("forward", 2, "sm_90", 64, groups) for groups in (2, 16))
    launch, narrow = Launch(32, 32, 4, 1), Launch(16, 16, 4, 1)
    entries = {key: [derive.Entry(64, 2, launch, 5)], other: [derive.Entry(64, 16, launch, 7)]}
    module = ROOT / "abft_kernels" / "triton" / "launch_table.py"

    def table():
        written: dict = {}
        exec(derive.table_source(module, entries, ["sm_90"], ["forward"], ""), written)
        return [tuple(entry) for entry in written["TABLE"]["forward", 2, "sm_90"]]

    assert table() == [(64, 16, launch, 7)]
    entries[key] = [derive.Entry(64, 2, narrow, 5)]
    assert table() == [(64, 2, narrow, 5), (64, 16, launch, 7)]


def test_put_keeps_what_every_gpu_has_the_memory_for(derive):
    """A measured entry over the least memory of its family comes first; the one before it stays."""
    key = derive.Key("forward", 2, "sm_80", 64, 2)
    small, large = derive.Entry(64, 2, Launch(64, 32, 4, 2), 90_000), derive.Entry(64, 2, Launch(64, 64, 4, 2), 150_000)
    entries = {key: [small]}
    derive.put(entries, derive.Choice(key, large, [], []), timed=True)
    assert entries[key] == [large, small]
    # Compiled for some GPUs alone: what the others took counts.
    less = small._replace(shared_memory=50_000)
    derive.put(entries, derive.Choice(key, less, [], []), timed=False, everywhere=False)
    assert entries[key] == [small]
    derive.put(entries, derive.Choice(key, None, [], []), timed=True)
    assert entries[key] == [small]
    derive.put(entries, derive.Choice(key, None, [], []), timed=False)
    assert key not in entries


def test_nothing_to_choose(derive, capsys):
    with pytest.raises(SystemExit):
        derive.main(["--only", "sideways"])
    assert "no kernel's name holds --only 'sideways'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        derive.main(["--measure"]) if not torch.cuda.is_available() else derive.main(["--widths", "3"])


def _row(case, spills, loop_spills):
    found = {"spills": spills, "stack": 4 * spills, "loop_spills": loop_spills, "shared": 1024, "limit": 1 << 16}
    return {**case._asdict(), "launch": list(case.launch), "reserved": None, **found}


def test_passing_compiles_each_form_once_and_refuses_early(derive, monkeypatch):
    seen = []

    def compiled(case):
        seen.append(case)
        wide = case.launch.block_n >= 128
        return _row(case, 40, 30 if wide else 2 * (case.form in derive.FEATURES[2]))

    monkeypatch.setattr(derive, "compile_case", compiled)
    launches = [Launch(*one) for one in derive.candidates("sm_90", "forward", 2, 2)[64]]
    keys = derive._keys(["sm_90"], "forward-2", [64], [2, 16])
    pairs, refused = derive.passing(SERIAL, [(key, launch) for key in keys for launch in launches], ["sm_90"])
    wide = [launch for _, launch in refused]
    assert len(seen) == len(set(seen))
    assert {launch.block_n for launch in wide} == {128}
    assert {case.form for case in seen if case.launch in wide} == {"full"}
    assert len(pairs) + len(refused) == 2 * len(launches)
    assert all("full G" in why and "spills: 40" in why for why in refused.values())


@pytest.mark.parametrize(
    ("groups", "form", "spills", "loop_spills", "passes"),
    [
        (2, "full", 2, 0, False),
        (2, "lean", 2, 0, False),
        (2, "ones", 2, 0, False),
        (2, "gemma", 20, 0, True),
        (2, "oss", 20, 1, False),
        (0, "off", 2, 0, False),
        (0, "lean", 20, 0, True),
        (0, "lean", 20, 1, False),
    ],
)
def test_what_may_spill_without_a_clock(derive, monkeypatch, groups, form, spills, loop_spills, passes):
    """Outside of main loops the forms of FEATURES may, and are listed with their bytes."""

    def compiled(case):
        return _row(case, spills, loop_spills) if case.form == form else _row(case, 0, 0)

    monkeypatch.setattr(derive, "compile_case", compiled)
    choice = derive.choose(derive.Key("forward", 2, "sm_90", 64, groups), [Launch(64, 32, 4, 2)], derive.TARGETS)
    assert (choice.entry is not None) is passes
    assert bool(choice.refused) is not passes
    assert [spill["form"] for spill in choice.spills] == ([form] if passes else [])
    assert [spill["stack"] for spill in choice.spills] == ([80] if passes else [])


def test_shared_memory_is_the_most_of_all_forms_and_gpus(derive, monkeypatch):
    """And no more than the least that a GPU of the family has."""
    most = {("sm_86", "gemma"): 90_000, ("sm_121", "ones"): 95_000}
    key = derive.Key("forward", 2, "sm_80", 64, 2)

    def compiled(case):
        return {**_row(case, 0, 0), "shared": most.get((case.target, case.form), 1024), "limit": 163 << 10}

    monkeypatch.setattr(derive, "compile_case", compiled)
    choice = derive.choose(key, [Launch(64, 32, 4, 2)], derive.TARGETS)
    assert choice.entry == (64, 2, Launch(64, 32, 4, 2), 95_000)
    most["sm_80", "full"] = 120_000
    choice = derive.choose(key, [Launch(64, 32, 4, 2)], derive.TARGETS)
    assert choice.entry is None
    assert "shared memory 120000 over 101376" in choice.refused[0][1]


@pytest.mark.parametrize(
    ("table", "element_size", "groups", "tokens", "shapes"),
    [
        ("forward", 2, 3, 48, [(1, 32, 48, 64), (1, 32, 48, 3)]),
        ("forward", 2, 0, 48, [(1, 32, 48, 64)]),
        ("backward_kv", 2, 3, 48, [(1, 32, 48, 64), (1, 8, 48, 64), (1, 8, 48, 64)]),
        ("backward_q", 4, 3, 48, [(1, 32, 48, 64), (1, 8, 48, 64), (1, 8, 48, 64)]),
        ("rows", 2, 3, 48, [(1, 32, 1, 64), (1, 8, 48, 64)]),
        ("decode", 2, 3, 256, [(1, 32, 1, 64), (1, 32, 1, 3)]),
    ],
)
def test_what_is_timed_runs_with_the_candidate(
    derive, device, monkeypatch, table, element_size, groups, tokens, shapes
):
    used = {}

    def spy(kernel, *arguments):
        used[kernel] = launch_config(kernel, *arguments)
        return used[kernel]

    for name in ("backward", "forward", "rows"):
        monkeypatch.setattr(f"abft_kernels.triton.{name}.launch_config", spy)
    key, candidate = derive.Key(table, element_size, gpu_of(device).family, 64, groups), Launch(32, 32, 2, 1)
    entries = list(TABLE[key[:3]])
    run = derive.operator(key, candidate, tokens, device.type)
    used.clear()
    results = run()
    assert used.pop(table) == candidate
    assert candidate not in used.values()  # the other kernels as they are
    assert TABLE[key[:3]] == entries
    assert [tuple(x.shape) for x in results] == shapes
    assert all(x.isfinite().all() for x in results)


def test_the_fastest_is_chosen(derive, monkeypatch):
    key = derive.Key("forward", 2, "sm_90", 64, 2)
    launches = [Launch(*one) for one in derive.candidates("sm_90", "forward", 2, 2)[64]]
    monkeypatch.setattr(derive, "compile_case", lambda case: _row(case, 0, 0))
    monkeypatch.setattr(derive, "_warm", lambda key, launch, tokens: "does not run" if launch.num_warps == 4 else "")
    monkeypatch.setattr(derive, "operator", lambda key, launch, tokens: launch)
    monkeypatch.setattr(
        "bench.gpu.timing.measure", lambda launch, device: {"median": float(launch.block_n), "low": 0.0, "high": 0.0}
    )
    choice, times = derive.measured(SERIAL, key, launches, "sm_90", 64)
    assert {launch.num_warps for launch, _ in choice.refused} == {4}
    assert {launch.block_n for launch in times} == {64, 128}
    assert choice.entry == (64, 2, Launch(128, 64, 8, 3), 1024)


class _Serial:
    def __init__(self, *arguments, **keywords):
        pass

    def __enter__(self):
        return SERIAL

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("timed", [True, False])
def test_measured_entries_replace_others_and_nothing_is_lost(derive, monkeypatch, tmp_path, timed, capsys):
    """The whole command, with a clock that prefers few warps, or one that nothing comes before. The table is written
    after the first entry: an interrupted run keeps it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Card")
    monkeypatch.setattr("abft_kernels.triton.launch.gpu_of", lambda device: GPU("sm_90", "sm_90", 227 << 10))
    monkeypatch.setattr(derive, "ProcessPoolExecutor", _Serial)
    monkeypatch.setattr(derive, "compile_case", lambda case: _row(case, 0, 0))
    written_after: list[bool] = []
    descriptors: set[bool] = set()

    def measure(pool, pairs, tokens):
        descriptors.update(launch.descriptors for _, launch in pairs)
        written_after.append((tmp_path / "out" / "launch_table.py").exists())
        if not timed:
            return {}, {pair: "does not run: no card" for pair in pairs}
        return {pair: {"median": float(pair[1].num_warps), "low": 0.0, "high": 9.0} for pair in pairs}, {}

    monkeypatch.setattr(derive, "_measure", measure)
    package = tmp_path / "abft_kernels" / "triton"
    package.mkdir(parents=True)
    monkeypatch.setattr(derive.abft_kernels, "__file__", str(package.parent / "__init__.py"))
    options = ["--only", "forward-2", "--widths", "64", "--groups", "2,16", "--out", str(tmp_path / "out"), "--write"]
    done = derive.main(["--measure", "--jobs", "1", *options])
    if not timed:
        assert done == 1
        assert not list(package.iterdir())
        assert "does not run: no card" in capsys.readouterr().err
        return
    assert written_after == [False, True]
    assert descriptors == {False, True}  # a clock may choose the form, the compiler's report may not
    written: dict = {}
    exec((package / "launch_table.py").read_text(), written)
    assert "forward-2 head tiles 64): the fastest at 8192 tokens on\nNVIDIA Card" in written["__doc__"]
    fastest = next(Launch(*one) for one in derive.candidates("sm_90", "forward", 2, 2)[64] if one[2] == 4)
    old = [entry for entry in TABLE["forward", 2, "sm_90"] if entry.head_tile > 64]
    new = written["TABLE"]["forward", 2, "sm_90"]
    assert (64, 16, fastest, 1024) in new
    assert [entry for entry in new if entry.head_tile > 64] == old
    assert {key: entries for key, entries in written["TABLE"].items() if key != ("forward", 2, "sm_90")} == {
        key: entries for key, entries in TABLE.items() if key != ("forward", 2, "sm_90")
    }
