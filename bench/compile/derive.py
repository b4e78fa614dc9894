"""Derive the launch table: for each entry the first candidate, best guess first, that the compiler's report accepts.

    python -m bench.compile.derive --arch 80,90,100 --write        without a GPU: no spills, within shared memory
    python -m bench.compile.derive --measure --write               on a GPU: the fastest, for its architecture alone

A candidate must compile without register spills in the forms of `FORMS`, at 2 groups and, for the entries that serve
more, at 16; those of `FEATURES` may spill outside of their main loops alone. `--measure` leaves spills outside of main
loops to the clock in every form, and in `FEATURES` up to `LOOP_SPILLS` instructions inside; it times candidates through
the public operators, all other kernels of the table as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.progress import track

import abft_kernels
from abft.files import write_json, write_text
from abft_kernels.triton.launch import ARCHITECTURES, TABLE, Launch
from bench.compile.aot import KERNELS, Case, compile_case, problems
from bench.record import provenance

name = "derive"
description = "chooses the launch table from its candidates: by the compiler, and with --measure by the clock"

__all__ = ["CANDIDATES", "FORMS", "Key", "choose", "main"]

# Of `bench.compile.aot.VARIANTS`; the others may spill, and are slower for it, not wrong.
FORMS = {2: ("full", "off", "lean", "ones"), 16: ("full",)}
FEATURES = ("packed", "gemma", "oss")
LOOP_SPILLS = 4
_BY_COMPILER = "no register spills and within shared memory by the compiler's report"

# (block_m, block_n, num_warps, num_stages) by kernel, element size and head tile; the best guess first. For Hopper:
# 128 rows to two warpgroups, deep pipelines; the backward kernels hold two accumulators and take smaller tiles. The
# fused kernels have no float32 tiles 256 wide: in backward none was found that does not spill.
CANDIDATES: dict[tuple[str, int], dict[int, list[tuple[int, int, int, int]]]] = {
    ("forward", 2): {
        64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3),
             (64, 32, 4, 2)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
              (128, 32, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 8, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 3),
              (64, 16, 8, 2), (32, 32, 8, 2)],
        512: [(64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)],
    },
    ("forward", 4): {
        64: [(64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        128: [(64, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_kv", 2): {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 1),
             (32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 4, 2)],
        128: [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2),
              (64, 64, 8, 1), (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 4, 1), (16, 64, 4, 2), (16, 128, 8, 2),
              (16, 64, 8, 2), (32, 32, 8, 1), (16, 32, 4, 1)],
        256: [(32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 8, 2), (16, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1),
              (16, 16, 8, 1)],
        512: [(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)],
    },
    ("backward_kv", 4): {
        64: [(32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        128: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_q", 2): {
        64: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2),
             (64, 32, 8, 2)],
        128: [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2),
              (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2)],
        256: [(64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2), (64, 16, 8, 1), (32, 32, 8, 1),
              (32, 16, 8, 1)],
        512: [(32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1), (32, 16, 16, 1), (16, 32, 16, 1), (16, 16, 4, 1)],
    },
    ("backward_q", 4): {
        64: [(64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
        128: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    # block_m bounds the packed rows (query heads of a KV head × wanted rows); fewer take tiles of 16.
    ("rows", 2): {
        64: [(32, 128, 8, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 8, 3), (16, 64, 4, 2),
             (16, 32, 4, 2)],
        128: [(32, 128, 8, 3), (32, 64, 8, 3), (32, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 2)],
        256: [(32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2)],
        512: [(16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)],
    },
    ("rows", 4): {
        64: [(32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 4, 2), (16, 32, 4, 2)],
        128: [(16, 64, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 4, 2)],
        512: [(16, 16, 8, 1), (16, 16, 16, 1)],
    },
}  # fmt: skip


class Key(NamedTuple):
    """One entry to fill."""

    table: str
    element_size: int
    arch: int
    head_tile: int
    groups: int

    def cases(self, launch: Launch) -> Iterator[Case]:
        dtype = "bf16" if self.element_size == 2 else "fp32"
        tiles = {launch, launch._replace(block_m=16)} if self.table == "rows" else {launch}
        for groups, forms in FORMS.items():
            if groups <= self.groups:
                for form in (*forms, *(FEATURES if groups == 2 else ())):
                    for kernel in KERNELS[self.table]:
                        for tile in sorted(tiles, reverse=True):
                            yield Case(kernel, self.table, self.arch, dtype, self.head_tile, groups, tile, form)


def _serves(key: Key, launch: Launch) -> str:
    """Return the reasons to reject the candidate; empty if it is accepted."""
    return next(filter(None, (_refusal(case, compile_case(case)) for case in key.cases(launch))), "")


def _refusal(case: Case, row: dict[str, Any], clock: bool = False) -> str:
    feature = case.variant in FEATURES
    if (clock or feature) and "error" not in row and row["loop_spills"] <= (LOOP_SPILLS if clock and feature else 0):
        row = row | {"spills": 0, "stack": 0}
    found = problems(row)
    return f"{case.kernel} {case.variant} G{case.groups}: {found[0]}" if found else ""


def choose(key: Key) -> tuple[Key, Launch | None, list[tuple[Launch, str]]]:
    """Return the first candidate that is accepted, and those rejected before it."""
    refused = []
    for candidate in CANDIDATES[key.table, key.element_size][key.head_tile]:
        launch = Launch(*candidate)
        if why := _serves(key, launch):
            refused.append((launch, why))
        else:
            return key, launch, refused
    return key, None, refused


Pair = tuple[Key, Launch]


def passing(pool: Executor, keys: list[Key]) -> tuple[list[Pair], dict[Pair, str]]:
    """Return the candidates to time, and the reasons to reject the others; compile all in parallel.

    Spills outside of main loops refuse none here.
    """
    pairs = [(key, Launch(*one)) for key in keys for one in CANDIDATES[key.table, key.element_size][key.head_tile]]
    refused: dict[Pair, str] = {}
    compiled: dict[Case, dict[str, Any]] = {}
    # The first form refuses most of what is refused.
    for forms in (slice(0, 1), slice(1, None)):
        left = {pair: list(pair[0].cases(pair[1]))[forms] for pair in pairs if pair not in refused}
        missing = list(dict.fromkeys(case for cases in left.values() for case in cases if case not in compiled))
        rows = track(pool.map(compile_case, missing), "Compiling", total=len(missing))
        compiled |= zip(missing, rows, strict=True)
        for pair, cases in left.items():
            if why := next(filter(None, (_refusal(case, compiled[case], clock=True) for case in cases)), ""):
                refused[pair] = why
    return [pair for pair in pairs if pair not in refused], refused


@contextmanager
def _entry(key: Key, launch: Launch) -> Iterator[None]:
    """Return the table with one entry replaced."""
    whole = TABLE[key.table, key.element_size, key.arch]
    TABLE[key.table, key.element_size, key.arch] = [(key.head_tile, key.groups, launch), *whole]
    try:
        yield
    finally:
        TABLE[key.table, key.element_size, key.arch] = whole


def operator(key: Key, launch: Launch, tokens: int, device: str = "cuda") -> Callable[[], Any]:
    """Return a function that runs the kernel on random data, causal, with 4 query heads per KV head."""
    import torch

    dtype = torch.bfloat16 if key.element_size == 2 else torch.float32
    heads = max(4, 2048 // key.head_tile)
    shapes = ((heads, tokens), (heads // 4, tokens), (heads // 4, tokens))
    q, k, v = (torch.randn(1, h, n, key.head_tile, device=device, dtype=dtype, requires_grad=True) for h, n in shapes)
    groups = torch.randint(-1, key.groups, (1, tokens), device=device).to(torch.int8)
    shared: dict[str, Any] = {"num_groups": key.groups, "backend": "triton"}
    if key.table == "rows":
        rows, last = q[:, :, -1:].detach().requires_grad_(), torch.full((1, 1), tokens - 1, device=device)

        def row() -> Any:
            mass = abft_kernels.row_mass(rows, k, groups, row_positions=last, **shared)
            return torch.autograd.grad(mass, [rows, k], torch.ones_like(mass))

        return _with_entry(key, launch, row)
    if key.table == "forward":
        return _with_entry(
            key, launch, lambda: abft_kernels.mass_attention(q.detach(), k.detach(), v.detach(), groups, **shared)
        )
    outputs = abft_kernels.mass_attention(q, k, v, groups, **shared)
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
    reasons = track(reasons, "Compiling for the operators", total=len(pairs))
    refused = {pair: why for pair, why in zip(pairs, reasons, strict=True) if why}
    times: dict[Pair, dict[str, float]] = {}
    for pair in track(pairs, "Timing"):
        if pair not in refused:
            times[pair] = measure(operator(*pair, tokens), torch.device("cuda"))
    return times, refused


def _keys(archs: list[int], only: str, widths: list[int] | None = None) -> list[Key]:
    return [
        Key(table, element_size, arch, width, groups)
        for (table, element_size), of_table in CANDIDATES.items()
        if only in f"{table}-{element_size}"
        for width in of_table
        if not widths or width in widths
        for arch in archs
        for groups in FORMS
    ]


def table_source(chosen: dict[Key, Launch], archs: tuple[int, ...], how: str) -> str:
    """`abft_kernels/triton/launch_table.py`."""
    lines = [
        '"""The launch table. Written by `python -m bench.compile.derive`: change its candidates, not this file.',
        "",
        how,
        '"""',
        "",
        "from typing import NamedTuple",
        "",
        "",
        "class Launch(NamedTuple):",
        '    """Tiles of rows and keys, warps and pipeline stages."""',
        "",
        "    block_m: int",
        "    block_n: int",
        "    num_warps: int",
        "    num_stages: int",
        "",
        "",
        f"ARCHITECTURES = {archs}",
        "",
        "# (kernel, element size, architecture) -> (widest head tile, most groups, launch): the first that fits.",
        "TABLE: dict[tuple[str, int, int], list[tuple[int, int, Launch]]] = {",
    ]
    for table, element_size in CANDIDATES:
        for arch in archs:
            lines.append(f'    ("{table}", {element_size}, {arch}): [')
            entries = [(k, x) for k, x in chosen.items() if k[:3] == (table, element_size, arch)]
            entries.sort(key=lambda entry: entry[0][3:])
            for key, launch in entries:
                # A launch that serves many groups serves few.
                more = [x for k, x in entries if k.head_tile == key.head_tile and k.groups > key.groups]
                if launch not in more:
                    numbers = f"{launch.block_m}, {launch.block_n}, {launch.num_warps}, {launch.num_stages}"
                    lines.append(f"        ({key.head_tile}, {key.groups}, Launch({numbers})),")
            lines.append("    ],")
    return "\n".join([*lines, "}", ""])


def _present() -> dict[Key, Launch]:
    """Return the entries of the present table."""
    return {
        Key(table, element_size, arch, width, groups): launch
        for (table, element_size, arch), entries in TABLE.items()
        for width, groups, launch in entries
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.derive", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, comma-separated")
    parser.add_argument("--only", default="", help="part of KERNEL-ELEMENTSIZE, for example backward_kv-2")
    parser.add_argument("--widths", default="", help="head tiles, comma-separated, for example 64,128; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--measure", action="store_true", help="time every passing candidate on this GPU")
    parser.add_argument("--tokens", type=int, default=8192, help="sequence length for --measure")
    parser.add_argument("--json", type=Path, help="write what was chosen and refused there")
    parser.add_argument("--write", action="store_true", help="rewrite abft_kernels/triton/launch_table.py")
    options = parser.parse_args(arguments)
    archs = [int(a) for a in options.arch.split(",")]
    how = f"{_BY_COMPILER[0].upper()}{_BY_COMPILER[1:]}; not tuned on a GPU."
    if options.measure:
        import torch

        if not torch.cuda.is_available():
            parser.error("--measure needs a CUDA GPU; without one leave it out, and the compiler alone decides")
        from abft_kernels.triton.launch import architecture

        archs = [architecture(torch.device("cuda"))]
        which = " ".join(filter(None, [options.only, options.widths and f"head tiles {options.widths}"])) or "all"
        how = (
            f"sm_{archs[0]} ({which}): the fastest at {options.tokens} tokens on\n"
            f"{torch.cuda.get_device_name()}, Triton {triton.__version__}.\n"
            f"All else: {_BY_COMPILER}."
        )
    keys = _keys(archs, options.only, [int(width) for width in options.widths.split(",") if width])
    if not keys:
        parser.error(f"nothing to choose: no kernel's name holds --only {options.only!r} at --widths {options.widths}")
    # What cannot be timed keeps its launch; what no longer compiles well loses it.
    chosen = {key: launch for key, launch in _present().items() if options.measure or key not in keys}
    record = []
    times: dict[Pair, dict[str, float]] = {}
    refused: dict[Pair, str] = {}
    # Processes of their own: a fork could not use the GPU.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        if options.measure:
            found, refused = passing(pool, keys)
            print(f"{len(found)} candidates pass, {len(refused)} are refused; timing", flush=True)
            times, broken = _measure(pool, found, options.tokens)
            refused |= broken
            if not times:
                print("nothing could be timed:", *sorted(set(refused.values()))[:5], sep="\n", file=sys.stderr)
                return 1
            for key in keys:
                timed = [pair for pair in times if pair[0] == key]
                if timed:
                    chosen[key] = min(timed, key=lambda pair: times[pair]["median"])[1]
        else:
            for key, launch, before in track(pool.map(choose, keys), "Compiling", total=len(keys)):
                refused |= {(key, one): why for one, why in before}
                if launch is not None:
                    chosen[key] = launch
    for key in keys:
        ours = {launch: time for (of, launch), time in times.items() if of == key}
        why = {launch: why for (of, launch), why in refused.items() if of == key}
        launch = chosen.get(key)
        medians = (f"{time['median']:.3f}" for time in ours.values())
        print(*key, "->", launch and tuple(launch), f"({len(why)} refused)", *medians)
        record.append(
            {
                "key": list(key),
                "launch": launch,
                "refused": [[list(one), reason] for one, reason in why.items()],
                "milliseconds": [[list(one), time] for one, time in ours.items()],
            }
        )
    if options.json:
        write_json(options.json, {"provenance": provenance(("torch", "triton")), "entries": record})
    if options.write:
        everything = tuple(sorted({*ARCHITECTURES, *archs}))
        path = Path(abft_kernels.__file__).parent / "triton" / "launch_table.py"
        write_text(path, table_source(chosen, everything, how))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
