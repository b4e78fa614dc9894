"""Compile the kernels ahead of time, without a GPU, and read the compiler's report.

    python -m bench.compile.aot [--targets sm_90,gfx942] [--json FILE]     every launch that a user's call can make
    python -m bench.compile.aot --instructions                             main loops with the mass off and on

The first is the gate of `tests/abft_kernels/test_aot.py`: registers, spills, shared memory and matrix instructions of
each target, operator and form. `python -m bench.compile.derive` chooses the launches.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from abft.files import write_json
from bench.compile.gate import gate_cases, sample
from bench.compile.launches import (  # before triton: it turns the interpreter off
    DTYPES,
    KERNELS,
    TABLE,
    TARGETS,
    Case,
    Launch,
    Recorded,
    family_of,
    gpu_target,
)
from bench.compile.machine_code import report
from bench.record import provenance

import triton  # isort: skip

RESERVED = 1024  # bytes of shared memory that the system takes of each block

name = "aot"
description = "no GPU: registers, spills, shared memory and matrix instructions of every launch that a call can make"

__all__ = ["blocks_per_multiprocessor", "compile_case", "compiled_kernel", "problems", "short_name"]


def _reserved(case: Case, one: Recorded) -> int | None:
    """Return the shared memory that the launch's entry in the table names; None of kernels without entries."""
    family = family_of(case.target)
    assert family is not None
    other = "backward_kv" if case.form == "atomic" else "backward_atomic"
    tables = [
        table for table, of in KERNELS.items() if table != other and of[0] == case.operator and case.kernel in of[1]
    ]
    if not tables:
        return None
    of = one.arguments[-1]
    serving = (
        entry.shared_memory
        for entry in TABLE.get((tables[0], DTYPES[case.dtype].itemsize, family), [])
        if of.groups <= entry.groups
        and max(of.block_d, of.block_dv) <= entry.head_tile
        and entry.shared_memory <= TARGETS[case.target]
    )
    return next(serving, None)


def compiled_kernel(case: Case) -> tuple[Recorded, Any]:
    """Return the launch of a case, and the kernel compiled for it."""
    one = [launch for launch in case.launches() if launch.name == case.kernel][case.nth]
    target = gpu_target(case.target)
    source, options = one.source(target)
    return one, triton.compile(source, target=target, options=options)


def compile_case(case: Case) -> dict[str, Any]:
    """Return the case with the figures of :func:`bench.compile.machine_code.report` and `loops`, the instructions of
    each main loop, or with `error`."""
    row: dict[str, Any] = {field: x for field, x in case._asdict().items() if field != "table"}
    row["limit"] = TARGETS[case.target]
    try:
        one, compiled = compiled_kernel(case)
        row |= {"launch": one.launch, "reserved": None if case.launch else _reserved(case, one)}
        figures, loops = report(compiled)
    except Exception as error:  # whatever the compiler raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    return {**row, **figures, "loops": [loop.kinds() for loop in loops]}


def listed_spills(path: Path) -> dict[tuple[Any, ...], int]:
    """Return the bytes of what a result of this command lists as spilling; nothing if there is no such file."""
    rows = json.loads(path.read_text())["spills"] if path.exists() else []
    return {tuple(row[field] for field in Case._fields[:7]): row["stack"] for row in rows}


def problems(row: dict[str, Any], listed: dict[tuple[Any, ...], int] | None = None) -> list[str]:
    """Return the reasons to reject this compilation, empty if it is accepted; `listed` ones may spill so many bytes."""
    if "error" in row:
        return [row["error"]]
    found = []
    known = (listed or {}).get(tuple(row[field] for field in Case._fields[:7]))
    if (row["spills"] or row["stack"]) and (known is None or row["stack"] > known):
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes")
    if row["shared"] > row["limit"]:
        found.append(f"shared memory {row['shared']} over {row['limit']}")
    if row["reserved"] is not None and row["shared"] > row["reserved"]:
        found.append(f"shared memory {row['shared']} over the {row['reserved']} of its entry in the table")
    return found


def instruction_table(targets: list[str], jobs: int) -> list[dict[str, Any]]:
    """Count the instructions of each fused kernel's unmasked main loop, per thread and iteration, mass off and on.

    `skipped` is what a block of keys without a label jumps over. bf16, causal, 2 groups; both with the launch of the
    mass, so that tiles are alike. `sparse`: the same for sparse labels, both with the launch of calls without mass.
    """
    cases = []
    for table in ("forward", "backward_kv", "backward_q"):
        operator, (kernel,) = KERNELS[table]
        for target in targets:
            for head_dim in (64, 128):
                on = Case(operator, kernel, target, "bf16", head_dim, 2)
                of_mass = Launch(*next(one.launch for one in on.launches() if one.name == kernel))
                cases += [on._replace(form="off", table=table, launch=of_mass), on]
                cases += [on._replace(form="off"), on._replace(form="sparse")]
    with ProcessPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_case, cases))
    rows = []
    for off, on_row, without, sparse in zip(*(compiled[i::4] for i in range(4)), strict=True):
        loops = [_main_loop(row) for row in (off, on_row)]
        kept = ("kernel", "target", "head_dim", "launch", "registers", "shared")
        fitting = blocks_per_multiprocessor(
            on_row["target"], on_row["registers"], on_row["launch"][2], on_row["shared"]
        )
        of_sparse = {"launch": sparse["launch"], "registers": sparse["registers"], "spills": sparse["spills"],
                     "off": _main_loop(without), "on": _main_loop(sparse, _main_loop(without))}  # fmt: skip
        counts = {"blocks": fitting, "off": loops[0], "on": loops[1], "sparse": of_sparse}
        rows.append({key: on_row[key] for key in kept} | counts)
    return rows


def _main_loop(row: dict[str, Any], like: dict[str, int] | None = None) -> dict[str, int]:
    """Return the loop over whole blocks: the shortest, or the one that is most `like` another kernel's, for a kernel
    that has loops over labelled keys too."""
    if like is None:
        return min(row["loops"], key=lambda loop: loop["instructions"])
    wanted = like["instructions"] - like["skipped"]
    return min(row["loops"], key=lambda loop: abs(loop["instructions"] - loop["skipped"] - wanted))


def gate_result(rows: list[dict[str, Any]], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the rows with the provenance of each target, and the list of what spills; a target compiled again replaces
    its rows `before`."""
    targets = {row["target"] for row in rows}
    sources = {} if before is None else before["provenance"]
    sources = {**sources, **dict.fromkeys(sorted(targets), provenance(("torch", "triton")))}
    rows = [*([] if before is None else [row for row in before["rows"] if row["target"] not in targets]), *rows]
    kept = (
        "operator",
        "kernel",
        "target",
        "dtype",
        "head_dim",
        "groups",
        "form",
        "launch",
        "spills",
        "stack",
        "loop_spills",
    )
    spills = [{field: row[field] for field in kept} for row in rows if row.get("spills") or row.get("stack")]
    return {"provenance": sources, "spills": spills, "rows": rows}


def blocks_per_multiprocessor(target: str, registers: int, num_warps: int, shared: int) -> int:
    """Return how many blocks fit an NVIDIA multiprocessor by registers, shared memory and warps.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 64 Ki registers, in units of 8 a
    thread; at most 64 warps (48 of sm_86, sm_89 and sm_12x) and 32 blocks, each with 1 KiB of shared memory more.
    """
    small = target in ("sm_86", "sm_89", "sm_120", "sm_121")
    memory = TARGETS[target] + RESERVED
    of_block = -(-registers // 8) * 8 * 32 * num_warps
    return min(65536 // of_block, memory // (shared + RESERVED), (48 if small else 64) // num_warps, 32)


def short_name(kernel: str) -> str:
    """Return a kernel's name without what all share."""
    return kernel.strip("_").removesuffix("_kernel").removeprefix("mass_attn_").replace("row_mass", "rows")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table, targets by kernels: the most registers, KiB of shared memory, and bytes that spill."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        decode = row["operator"] == "decode" and "row_mass_fwd" in row["kernel"]
        found.setdefault((row["target"], "decode" if decode else short_name(row["kernel"])), []).append(row)
    kernels = sorted({kernel for _, kernel in found})
    lines = ["| | " + " | ".join(kernels) + " |", "|---" * (len(kernels) + 1) + "|"]
    for target in TARGETS:
        cells = []
        for kernel in kernels:
            of = found.get((target, kernel), [])
            registers, shared, spilled = (
                max((row[x] for row in of), default=0) for x in ("registers", "shared", "stack")
            )
            cells.append(f"{registers}, {shared / 1024:.0f}" + (f", **{spilled} B**" if spilled else "") if of else "–")
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return lines


def _line(row: dict[str, Any]) -> str:
    what = f"{short_name(row['kernel']):14} {row['target']:7} {row['dtype']} D{row['head_dim']:<3} G{row['groups']:<2}"
    launch = "" if row["launch"] is None else "{}x{} w{} s{}".format(*row["launch"])
    state = "; ".join(problems(row)) or "ok"
    if "error" in row:
        return f"{what} {row['form']:9} {launch:14} {state}"
    numbers = f"{row['registers']:3} regs {row['shared']:6} B shared, matrix {row['matrix']:3}"
    return f"{what} {row['form']:9} {launch:14} {numbers}  {state}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="architectures, comma-separated; all by default")
    parser.add_argument("--head-dims", default="64,128", help="head_dims, comma-separated")
    parser.add_argument("--dtype", default="bf16,fp16,fp32", help="element types, comma-separated")
    parser.add_argument("--forms", default="", help="of bench.compile.gate, comma-separated; all by default")
    parser.add_argument("--sample", action="store_true", help="each target and each form with each kernel, about once")
    parser.add_argument("--part", default="1/1", help="of so many equal parts of the cases the one to compile: 3/8")
    parser.add_argument("--json", type=Path, help="write the rows there")
    known = Path(__file__).parents[1] / "results" / "aot_gate.json"
    parser.add_argument("--known", type=Path, default=known, help="a result whose list of spills is accepted")
    parser.add_argument("--summary", action="store_true", help="print a Markdown table of targets and kernels")
    parser.add_argument("--add", action="store_true", help="keep the rows of other targets that the file has")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--instructions", action="store_true", help="main-loop instruction counts, mass off and on")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if options.instructions:
        table = instruction_table([target for target in targets if target.startswith("sm_")], options.jobs)
        for row in table:
            off, on = row["off"], row["on"]
            fitting = f"{row['registers']} registers, {row['blocks']} blocks, "
            print(
                f"{short_name(row['kernel']):7} {row['target']:7} D{row['head_dim']:<3} {fitting}mass off "
                f"{off['instructions']:4}, on {on['instructions']:4} of which a block without labels skips "
                f"{on['skipped']}"
            )
        if options.json:
            write_json(options.json, {"provenance": provenance(("torch", "triton")), "rows": table})
        return 0
    if options.sample:
        cases = sample(targets)
    else:
        cases = gate_cases(targets, map(int, options.head_dims.split(",")), options.dtype.split(","))
    cases = [case for case in cases if not options.forms or case.form in options.forms.split(",")]
    part, parts = map(int, options.part.split("/"))
    cases = cases[part - 1 :: parts]
    print(f"{len(cases)} compilations", flush=True)
    found = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(compile_case, cases):
            print(_line(row), flush=True)
            found.append(row)
    if options.json:
        before = json.loads(options.json.read_text()) if options.add and options.json.exists() else None
        write_json(options.json, gate_result(found, before))
    if options.summary:
        print(*summary(found), sep="\n")
    listed = listed_spills(options.known)
    bad = sum(bool(problems(row, listed)) for row in found)
    print(f"{len(found)} compilations, {bad} with problems")
    return 1 if bad else 0


def run(out_dir: Path) -> Path:
    """Compile what calls can launch, write `aot_gate.json`, and return its path."""
    path = out_dir / "aot_gate.json"
    main(["--json", str(path)])
    return path


if __name__ == "__main__":
    sys.exit(main())
