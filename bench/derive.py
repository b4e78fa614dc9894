"""Derives the launch table: of each kernel's candidates, best guess first, the first that the compiler serves well.

    python -m bench.derive --arch 80,90,100 --write        without a GPU: no spills, within shared memory
    python -m bench.derive --measure --write               on a GPU: the fastest of those, for its architecture alone

A candidate must compile without register spills in the forms of `FORMS`, at 2 groups and, for the entries that serve
more, at 16; those of `FEATURES` may spill outside of their main loops alone. `--measure` times the passing candidates
through the public operators, all other kernels of the table as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import abft_kernels
from abft_kernels.launch import ARCHITECTURES, TABLE, Launch
from bench.aot import KERNELS, Case, compile_case, problems
from bench.provenance import provenance, write_json

name = "derive"
description = "chooses the launch table from its candidates: by the compiler, and with --measure by the clock"

__all__ = ["CANDIDATES", "FORMS", "Key", "choose", "main"]

# Of `bench.aot.VARIANTS`; the others may spill, and are slower for it, not wrong.
FORMS = {2: ("full", "off", "lean", "ones"), 16: ("full",)}
FEATURES = ("packed", "gemma", "oss")

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
    """Why the candidate is refused; empty if it passes."""
    for case in key.cases(launch):
        row = compile_case(case)
        if case.variant in FEATURES and "error" not in row and not row["loop_spills"]:
            row |= {"spills": 0, "stack": 0}
        if found := problems(row):
            return f"{case.kernel} {case.variant} G{case.groups}: {found[0]}"
    return ""


def choose(key: Key) -> tuple[Key, list[Launch], list[tuple[Launch, str]]]:
    """The first candidate that passes (all that do, last, are left to `--measure`), and those refused before it."""
    refused = []
    for candidate in CANDIDATES[key.table, key.element_size][key.head_tile]:
        launch = Launch(*candidate)
        if why := _serves(key, launch):
            refused.append((launch, why))
        else:
            return key, [launch], refused
    return key, [], refused


def _choose_all(key: Key) -> tuple[Key, list[Launch], list[tuple[Launch, str]]]:
    passing, refused = [], []
    for candidate in CANDIDATES[key.table, key.element_size][key.head_tile]:
        launch = Launch(*candidate)
        if why := _serves(key, launch):
            refused.append((launch, why))
        else:
            passing.append(launch)
    return key, passing, refused


@contextmanager
def _entry(key: Key, launch: Launch) -> Iterator[None]:
    """The table with one entry replaced."""
    whole = TABLE[key.table, key.element_size, key.arch]
    TABLE[key.table, key.element_size, key.arch] = [(key.head_tile, key.groups, launch), *whole]
    try:
        yield
    finally:
        TABLE[key.table, key.element_size, key.arch] = whole


def _milliseconds(key: Key, launch: Launch, tokens: int) -> float:
    """Median time of the operator that runs the kernel, on random data, causal, 4 query heads per KV head."""
    import torch
    from triton.testing import do_bench

    dtype = torch.bfloat16 if key.element_size == 2 else torch.float32
    heads = max(4, 2048 // key.head_tile)
    shapes = ((heads, tokens), (heads // 4, tokens), (heads // 4, tokens))
    q, k, v = (torch.randn(1, h, n, key.head_tile, device="cuda", dtype=dtype, requires_grad=True) for h, n in shapes)
    groups = torch.randint(-1, key.groups, (1, tokens), device="cuda", dtype=torch.int8)
    with _entry(key, launch):
        if key.table == "rows":
            rows, last = q[:, :, -1:].detach().requires_grad_(), torch.full((1, 1), tokens - 1, device="cuda")

            def run() -> Any:
                return abft_kernels.row_mass(rows, k, groups, key.groups, row_positions=last, backend="triton").sum()

            leaves = [rows, k]
        else:

            def run() -> Any:
                out, mass = abft_kernels.mass_attention(q, k, v, groups, key.groups, backend="triton")
                return out.float().sum() + mass.sum()

            leaves = [q, k, v]
        if key.table == "forward":
            return float(do_bench(run, return_mode="median"))
        return float(do_bench(lambda: torch.autograd.grad(run(), leaves), return_mode="median"))


def _keys(archs: list[int], only: str) -> list[Key]:
    return [
        Key(table, element_size, arch, width, groups)
        for (table, element_size), widths in CANDIDATES.items()
        if only in f"{table}-{element_size}"
        for width in widths
        for arch in archs
        for groups in FORMS
    ]


def table_source(chosen: dict[Key, Launch], archs: tuple[int, ...], how: str) -> str:
    """`abft_kernels/launch_table.py`."""
    lines = [
        '"""The launch table. Written by `python -m bench.derive`: change its candidates, not this file.',
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


def _kept(only: str, archs: list[int]) -> dict[Key, Launch]:
    """The entries of the present table that this run leaves alone."""
    return {
        Key(table, element_size, arch, width, groups): launch
        for (table, element_size, arch), entries in TABLE.items()
        for width, groups, launch in entries
        if arch not in archs or only not in f"{table}-{element_size}"
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.derive", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, comma-separated")
    parser.add_argument("--only", default="", help="part of KERNEL-ELEMENTSIZE, for example backward_kv-2")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--measure", action="store_true", help="time every passing candidate on this GPU")
    parser.add_argument("--tokens", type=int, default=8192, help="sequence length for --measure")
    parser.add_argument("--json", type=Path, help="write what was chosen and refused there")
    parser.add_argument("--write", action="store_true", help="rewrite abft_kernels/launch_table.py")
    options = parser.parse_args(arguments)
    archs = [int(a) for a in options.arch.split(",")]
    how = "No register spills and within shared memory by the compiler's report; not tuned on a GPU."
    if options.measure:
        import torch

        if not torch.cuda.is_available():
            parser.error("--measure needs a CUDA GPU; without one leave it out, and the compiler alone decides")
        from abft_kernels.launch import architecture

        archs = [architecture(torch.device("cuda"))]
        how = f"The fastest launches without spills on {torch.cuda.get_device_name()} at {options.tokens} tokens."
    chosen, record = _kept(options.only, archs), []
    with ProcessPoolExecutor(options.jobs) as pool:
        for key, passing, refused in pool.map(_choose_all if options.measure else choose, _keys(archs, options.only)):
            times = [_milliseconds(key, launch, options.tokens) for launch in passing] if options.measure else []
            best = passing[times.index(min(times))] if times else (passing or [None])[0]
            print(
                *key, "->", best and tuple(best), f"({len(refused)} refused)", *map("{:.3f}".format, times), flush=True
            )
            if best is not None:
                chosen[key] = best
            record.append({"key": list(key), "launch": best, "passing": passing, "milliseconds": times,
                           "refused": [[list(launch), why] for launch, why in refused]})  # fmt: skip
    if options.json:
        write_json(options.json, {"provenance": provenance(("torch", "triton")), "entries": record})
    if options.write:
        everything = tuple(sorted({*ARCHITECTURES, *archs}))
        path = Path(abft_kernels.__file__).parent / "launch_table.py"
        path.write_text(table_source(chosen, everything, how))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
