"""Derive the launch table: for each entry the first candidate, best guess first, that the compiler's report accepts.

    python -m bench.compile.derive --out DIR             without a GPU: no spills, within shared memory
    python -m bench.compile.derive --refresh --write     compile the present entries again: their shared memory
    python -m bench.compile.derive --measure --write     on a GPU: the fastest, for its family alone

A candidate must compile for every GPU of its family without register spills in the forms of `FORMS`, at 2 groups and,
for the entries that serve more, at 16; those of `FEATURES` may spill outside of their main loops, and are listed with
their bytes, and so is what `--allow-spills` lets pass. `--measure` leaves spills outside of main loops to the clock in
every form, and in `FEATURES` up to `LOOP_SPILLS` instructions inside; it times candidates through the public operators,
all other kernels of the table as they are.

What is done so far is written after each entry: `--out` takes the table and a JSON of what was chosen and refused,
`--write` the tree's table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from bench.compile.aot import compile_case, problems  # before triton: it turns the interpreter off
from bench.compile.candidates import FAMILIES, candidates, measured_candidates
from bench.compile.candidates import KERNELS as TABLES
from bench.compile.launches import KERNELS, TARGETS, Case, Entry, Launch
from bench.compile.table_file import Entries, Key, present, table_source
from bench.record import provenance

import abft_kernels  # isort: skip
import triton  # isort: skip
from abft.files import write_json, write_text  # isort: skip
from abft_kernels.triton.launch import TABLE, family_of  # isort: skip

name = "derive"
description = "chooses the launch table from its candidates: by the compiler, and with --measure by the clock"

__all__ = ["FORMS", "Choice", "Key", "choose", "main", "targets_of"]

# Of `bench.compile.launches.FORMS`, by groups. What the others spill is listed, and slower for it, not wrong.
FORMS: dict[str, dict[int, tuple[str, ...]]] = {
    "fused": {0: ("off",), 2: ("full", "off", "lean", "ones"), 16: ("full",)},
    "rows": {2: ("full", "one", "lean", "ones"), 16: ("full", "one")},
    "decode": {2: ("full", "one", "off", "lean"), 16: ("full", "one")},
    "atomic": {2: ("atomic",), 16: ("atomic",)},
}
# May spill outside of main loops. Decoding is never packed.
FEATURES: dict[int, tuple[str, ...]] = {0: ("packed", "gemma", "oss", "lean"), 2: ("packed", "gemma", "oss"), 16: ()}
LOOP_SPILLS = 4
_BY_COMPILER = "no register spills and within shared memory by the compiler's report"


def targets_of(family: str) -> list[str]:
    """Return the GPUs of a family; the first is compiled first."""
    return [target for target in TARGETS if family_of(target) == family]


def limit_of(family: str) -> int:
    """Return the bytes of shared memory that every GPU of the family has."""
    return min(TARGETS[target] for target in targets_of(family))


def cases(key: Key, launch: Launch, targets: Iterable[str]) -> Iterator[Case]:
    """Yield the compilations that a launch must pass, those that refuse most first."""
    operator, kernels = KERNELS[key.table]
    atomic = key.table == "backward_atomic"
    dtype = "bf16" if key.element_size == 2 else "fp32"
    for target in targets_of(key.family):
        if target not in targets:
            continue
        # A launch is compiled for the mass unless it serves calls without it alone.
        for groups in (0,) if key.groups == 0 else (16, 2):
            if groups > key.groups:
                continue
            features = () if atomic else FEATURES[groups][operator == "decode" :]
            for form in (*FORMS["atomic" if atomic else operator][groups], *features):
                for kernel in kernels:
                    yield Case(operator, kernel, target, dtype, key.head_tile, groups, form, key.table, launch)


def refusal(case: Case, row: dict[str, Any], clock: bool = False, allowed: int = 0) -> str:
    """Return the reason to reject what was compiled; empty if it is accepted, spilling so many bytes at most."""
    feature = case.form in FEATURES[case.groups]
    if (clock or feature) and "error" not in row and row["loop_spills"] <= (LOOP_SPILLS if clock and feature else 0):
        row = row | {"spills": 0, "stack": 0}
    if allowed and "error" not in row and row["stack"] <= allowed:
        row = row | {"spills": 0, "stack": 0}
    found = problems(row)
    return f"{case.kernel} {case.target} {case.form} G{case.groups}: {found[0]}" if found else ""


class Choice(NamedTuple):
    """What was found for one entry."""

    key: Key
    entry: Entry | None
    refused: list[tuple[Launch, str]]
    spills: list[dict[str, Any]]  # of the accepted launch, outside of main loops

    def record(self, times: dict[Launch, dict[str, float]]) -> dict[str, Any]:
        return {
            "key": list(self.key),
            "launch": self.entry and list(self.entry.launch),
            "shared_memory": self.entry and self.entry.shared_memory,
            "refused": [[list(one), reason] for one, reason in self.refused],
            "spills": self.spills,
            "milliseconds": [[list(one), time] for one, time in times.items()],
        }


def choose_all(keys: list[Key], launches: list[list[Launch]], targets: list[str], allowed: int) -> list[Choice]:
    """Return the choices for a head tile, the most groups first: a launch that serves many groups serves few."""
    choices: list[Choice] = []
    for key, to_try in zip(keys, launches, strict=True):
        more = choices[-1].entry if choices else None
        choices.append(choose(key, to_try, targets, more, allowed))
    return choices


def choose(key: Key, launches: list[Launch], targets: list[str], more: Entry | None = None, allowed: int = 0) -> Choice:
    """Return the first launch that is accepted, with the shared memory of its largest form, and those rejected before
    it; `more` is accepted for more groups."""
    refused = []
    for launch in launches:
        if more is not None and launch == more.launch:
            return Choice(key, more._replace(groups=key.groups), refused, [])
        shared, spills, why = 0, [], ""
        for case in cases(key, launch, targets):
            row = compile_case(case)
            if why := refusal(case, row, allowed=allowed):
                break
            shared = max(shared, row["shared"])
            if row["spills"] or row["stack"]:
                kept = ("kernel", "target", "dtype", "head_dim", "groups", "form", "launch", "spills", "stack")
                spills.append({field: row[field] for field in kept})
        if not why and shared > limit_of(key.family):
            why = f"shared memory {shared} over {limit_of(key.family)}, the least of {key.family}'s GPUs"
        if not why:
            return Choice(key, Entry(key.head_tile, key.groups, launch, shared), refused, spills)
        refused.append((launch, why))
    return Choice(key, None, refused, [])


Pair = tuple[Key, Launch]


def passing(pool: Executor, pairs: list[Pair], targets: list[str]) -> tuple[list[Pair], dict[Pair, str]]:
    """Return the candidates to time, and the reasons to reject the others; compile all in parallel.

    Spills outside of main loops refuse none here.
    """
    refused: dict[Pair, str] = {}
    compiled: dict[Case, dict[str, Any]] = {}
    # The first form refuses most of what is refused.
    for forms in (slice(0, 1), slice(1, None)):
        left = {pair: list(cases(*pair, targets))[forms] for pair in pairs if pair not in refused}
        missing = list(dict.fromkeys(case for found in left.values() for case in found if case not in compiled))
        compiled |= zip(missing, pool.map(compile_case, missing), strict=True)
        for pair, found in left.items():
            if why := next(filter(None, (refusal(case, compiled[case], clock=True) for case in found)), ""):
                refused[pair] = why
    return [pair for pair in pairs if pair not in refused], refused


@contextmanager
def _entry(key: Key, launch: Launch) -> Iterator[None]:
    """Return the table with one entry before the others."""
    whole = TABLE[key[:3]]
    TABLE[key[:3]] = [Entry(key.head_tile, key.groups, launch, 0), *whole]
    try:
        yield
    finally:
        TABLE[key[:3]] = whole


def operator(key: Key, launch: Launch, tokens: int, device: str = "cuda") -> Callable[[], Any]:
    """Return a function that runs the kernel on random data, causal, with 4 query heads per KV head."""
    import torch

    dtype = torch.bfloat16 if key.element_size == 2 else torch.float32
    heads = max(4, 2048 // key.head_tile)
    queries = 1 if key.table == "decode" else tokens
    shapes = ((heads, queries), (heads // 4, tokens), (heads // 4, tokens))
    q, k, v = (torch.randn(1, h, n, key.head_tile, device=device, dtype=dtype, requires_grad=True) for h, n in shapes)
    # Entries for no groups serve calls without the mass, where one label set stands for none.
    groups = torch.randint(-1, max(1, key.groups), (1, tokens), device=device).to(torch.int8)
    shared: dict[str, Any] = {"num_groups": max(1, key.groups), "backend": "triton"}
    if key.table == "rows":
        rows, last = q[:, :, -1:].detach().requires_grad_(), torch.full((1, 1), tokens - 1, device=device)

        def row() -> Any:
            mass = abft_kernels.row_mass(rows, k, groups, row_positions=last, **shared)
            return torch.autograd.grad(mass, [rows, k], torch.ones_like(mass))

        return _with_entry(key, launch, row)

    def run(*inputs: Any) -> Any:
        if key.groups == 0:
            return (abft_kernels.attention(*inputs, backend="triton"),)
        return abft_kernels.mass_attention(*inputs, groups, **shared)

    if key.table in ("forward", "decode"):
        return _with_entry(key, launch, lambda: run(q.detach(), k.detach(), v.detach()))
    outputs = run(q, k, v)
    incoming = [torch.randn_like(x) for x in outputs]
    return _with_entry(key, launch, lambda: torch.autograd.grad(outputs, [q, k, v], incoming, retain_graph=True))


def _with_entry(key: Key, launch: Launch, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with _entry(key, launch):
            return function()

    return run


def _warm(key: Key, launch: Launch, tokens: int) -> str:
    """Run the kernel once, to compile it; return the error if it does not run."""
    import torch

    try:
        operator(key, launch, tokens)()
        torch.cuda.synchronize()
    except Exception as error:  # compilers raise their own
        return f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return ""


def _measure(pool: Executor, pairs: list[Pair], tokens: int) -> tuple[dict[Pair, dict[str, float]], dict[Pair, str]]:
    """Return the milliseconds of each candidate, timed one by one after compilation, and the errors of the others."""
    import torch

    from bench.gpu.timing import measure

    reasons = pool.map(_warm, *zip(*((*pair, tokens) for pair in pairs), strict=True)) if pairs else []
    refused = {pair: why for pair, why in zip(pairs, reasons, strict=True) if why}
    times: dict[Pair, dict[str, float]] = {}
    for pair in pairs:
        if pair not in refused:
            times[pair] = measure(operator(*pair, tokens), torch.device("cuda"))
    return times, refused


def measured(pool: Executor, key: Key, launches: list[Launch], target: str, tokens: int) -> tuple[Choice, Any]:
    """Return the fastest launch with its shared memory on every GPU of the family, and the times of all."""
    pairs, refused = passing(pool, [(key, launch) for launch in launches], [target])
    times, broken = _measure(pool, pairs, tokens)
    rejected = [(launch, why) for (_, launch), why in (refused | broken).items()]
    of_launch = {launch: time for (_, launch), time in times.items()}
    if not of_launch:
        return Choice(key, None, rejected, []), of_launch
    best = min(of_launch, key=lambda launch: of_launch[launch]["median"])
    rows = [row for row in pool.map(compile_case, list(cases(key, best, TARGETS))) if "error" not in row]
    return Choice(key, Entry(*key[3:], best, max(row["shared"] for row in rows)), rejected, []), of_launch


def _keys(families: Iterable[str], only: str, widths: Iterable[int], groups: Iterable[int]) -> list[Key]:
    return [
        Key(table, element_size, family, width, most)
        for table in TABLES
        for element_size in (2, 4)
        if only in f"{table}-{element_size}"
        for family in families
        for most in (0, 2, 16)
        if not groups or most in groups
        for width in candidates(family, table, element_size, most)
        if not widths or width in widths
    ]


def put(entries: Entries, choice: Choice, timed: bool, everywhere: bool = True) -> None:
    """Put the chosen entry into the table; `everywhere`: compiled for every GPU of its family.

    What could not be timed keeps its launch, what no longer compiles well loses it. A faster entry that not every GPU
    of its family has the memory for comes before the one that they have, which stays.
    """
    before = entries.get(choice.key, [])
    if choice.entry is None:
        if not timed:
            entries.pop(choice.key, None)
        return
    limit, entry = limit_of(choice.key.family), choice.entry
    if not everywhere:  # the other GPUs may have taken more
        known = [one.shared_memory for one in before if one.launch == entry.launch]
        entry = entry._replace(shared_memory=max([entry.shared_memory, *known]))
    fallback = [one for one in before if one.shared_memory <= limit < entry.shared_memory]
    entries[choice.key] = [entry, *fallback]


class Written:
    """The table and the record, written anew after each entry."""

    def __init__(self, out: Path | None, tree: bool, how: str):
        self.module = Path(abft_kernels.__file__).parent / "triton" / "launch_table.py"
        self.tables = [*([out / "launch_table.py"] if out else []), *([self.module] if tree else [])]
        self.record = out / "derived.json" if out else None
        self.how, self.rows = how, list[dict[str, Any]]()
        self.template = Path(__file__).parents[2] / "abft_kernels" / "triton" / "launch_table.py"
        self.provenance = provenance(("torch", "triton"))

    def add(self, entries: Entries, choice: Choice, times: dict[Launch, dict[str, float]]) -> None:
        self.rows.append(choice.record(times))
        for path in self.tables:
            write_text(path, table_source(self.template, entries, FAMILIES, TABLES, self.how))
        if self.record:
            spills = [spill for row in self.rows for spill in row["spills"]]
            write_json(self.record, {"provenance": self.provenance, "entries": self.rows, "spills": spills})
        launch = choice.entry and (tuple(choice.entry.launch), choice.entry.shared_memory)
        medians = (f"{time['median']:.3f}" for time in times.values())
        print(*choice.key, "->", launch, f"({len(choice.refused)} refused)", *medians, flush=True)
        for one, why in choice.refused:
            print("   ", tuple(one), why, flush=True)


def _options(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(prog="python -m bench.compile.derive", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="families of GPUs, comma-separated")
    parser.add_argument("--targets", default=",".join(TARGETS), help="GPUs to compile for; all by default")
    parser.add_argument("--only", default="", help="part of KERNEL-ELEMENTSIZE, for example backward_kv-2")
    parser.add_argument("--widths", type=numbers, default=[], help="head tiles, for example 64,128; all by default")
    parser.add_argument("--groups", type=numbers, default=[], help="groups of entries, of 0,2,16; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--refresh", action="store_true", help="keep present launches that compile well")
    parser.add_argument("--allow-spills", type=int, default=0, help="bytes that a launch may spill, in main loops too")
    parser.add_argument("--measure", action="store_true", help="time every passing candidate on this GPU")
    parser.add_argument("--tokens", type=int, default=8192, help="sequence length for --measure")
    parser.add_argument("--out", type=Path, help="a folder for the table and for what was chosen and refused")
    parser.add_argument("--write", action="store_true", help="rewrite abft_kernels/triton/launch_table.py")
    options = parser.parse_args(arguments)
    if options.measure and options.refresh:
        parser.error("--measure times candidates and --refresh compiles present entries: take one")
    if unknown := set(options.families.split(",")) - set(FAMILIES):
        parser.error(f"unknown families {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    parser, options = _options(arguments)
    families, targets, target = options.families.split(","), options.targets.split(","), ""
    how = f"{_BY_COMPILER[0].upper()}{_BY_COMPILER[1:]}; not tuned on a GPU."
    if options.measure:
        import torch

        if not torch.cuda.is_available():
            parser.error("--measure needs a GPU; without one leave it out, and the compiler alone decides")
        from abft_kernels.triton.launch import gpu_of

        target, family, _ = gpu_of(torch.device("cuda"))
        if target not in TARGETS:
            parser.error(f"{target} is not among the targets {', '.join(TARGETS)}: add it to bench.compile.launches")
        assert family is not None
        families = [family]
        which = " ".join(
            filter(None, [options.only, options.widths and f"head tiles {','.join(map(str, options.widths))}"])
        )
        how = (
            f"{family} ({which or 'all'}): the fastest at {options.tokens} tokens on\n"
            f"{torch.cuda.get_device_name()}, Triton {triton.__version__}.\n"
            f"All else: {_BY_COMPILER}."
        )
    entries = present()
    keys = _keys(families, options.only, options.widths, options.groups)
    if options.refresh:
        keys = [key for key in keys if key in entries]
    if not keys:
        parser.error(f"nothing to choose: no kernel's name holds --only {options.only!r} at --widths {options.widths}")
    to_try = []
    for key in keys:
        found = [Launch(*one) for one in candidates(key.family, key.table, key.element_size, key.groups)[key.head_tile]]
        if options.measure:
            found += measured_candidates(key.family, key.table, key.element_size, key.head_tile)
        first = [entry.launch for entry in entries[key]] if options.refresh else []
        to_try.append(list(dict.fromkeys([*first, *found])))
    written = Written(options.out, options.write, how)
    timed = 0
    # Processes of their own: a fork could not use the GPU.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        choices: Iterable[tuple[Choice, dict[Launch, dict[str, float]]]]
        if options.measure:
            choices = (measured(pool, key, of, target, options.tokens) for key, of in zip(keys, to_try, strict=True))
        else:
            tiles: dict[tuple[Any, ...], list[int]] = {}
            for index in sorted(range(len(keys)), key=lambda index: -keys[index].groups):
                tiles.setdefault((*keys[index][:4], keys[index].groups == 0), []).append(index)
            of_tiles = [[[values[index] for index in tile] for values in (keys, to_try)] for tile in tiles.values()]
            chosen = pool.map(
                choose_all,
                *zip(*of_tiles, strict=True),
                [targets] * len(of_tiles),
                [options.allow_spills] * len(of_tiles),
            )
            choices = ((choice, {}) for of_tile in chosen for choice in of_tile)
        for choice, times in choices:
            timed += bool(times)
            put(entries, choice, options.measure, set(targets) == TARGETS.keys())
            if choice.entry is not None or not options.measure:
                written.add(entries, choice, times)
            elif not timed:
                print("could not be timed:", *sorted({why for _, why in choice.refused})[:5], sep="\n", file=sys.stderr)
    return 1 if options.measure and not timed else 0


if __name__ == "__main__":
    sys.exit(main())
