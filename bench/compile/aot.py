"""Compile the kernels ahead of time, without a GPU, and read the compiler's report.

    python -m bench.compile.aot [--targets sm_90,gfx942] [--json FILE]     every launch that a user's call can make
    python -m bench.compile.aot --instructions                             main loops with the mass off and on

The first is the gate of `tests/abft_kernels/test_aot.py`: registers, spills, shared memory and matrix instructions of
each target, operator and form. `python -m bench.compile.derive` chooses the launches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from abft.files import write_json
from bench.compile.launches import (  # before triton: it turns the interpreter off
    KERNELS,
    OPERATORS,
    TARGETS,
    Launch,
    Recorded,
    gpu_target,
    recorded,
)
from bench.compile.machine_code import report
from bench.record import provenance

import triton  # isort: skip

name = "aot"
description = "no GPU: registers, spills, shared memory and matrix instructions of every launch that a call can make"

__all__ = ["Case", "compile_case", "gate_cases", "problems"]


class Case(NamedTuple):
    """One compilation: a kernel among the launches of an operator."""

    operator: str
    kernel: str
    target: str
    dtype: str
    head_dim: int
    groups: int
    form: str = "full"
    table: str = ""  # whose launch `launch` replaces
    launch: Launch | None = None
    nth: int = 0  # among the operator's launches of this kernel

    def launches(self) -> list[Recorded]:
        """Return all launches of the operator."""
        return recorded(
            self.operator,
            self.target,
            dtype=self.dtype,
            head_dim=self.head_dim,
            groups=self.groups,
            form=self.form,
            launch_of=(self.table, self.launch),
        )


def compile_case(case: Case) -> dict[str, Any]:
    """Return the case with the figures of :func:`bench.compile.machine_code.report` and `loops`, the instructions of
    each main loop, or with `error`."""
    row: dict[str, Any] = {field: x for field, x in case._asdict().items() if field not in ("table", "nth")}
    try:
        one = [launch for launch in case.launches() if launch.name == case.kernel][case.nth]
        row["launch"] = one.launch
        target = gpu_target(case.target)
        source, options = one.source(target)
        figures, loops = report(triton.compile(source, target=target, options=options))
    except Exception as error:  # whatever the compiler raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    return {**row, **figures, "loops": [loop.kinds() for loop in loops]}


def problems(row: dict[str, Any]) -> list[str]:
    """Return the reasons to reject this compilation; empty if it is accepted."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes")
    if row["shared"] > TARGETS[row["target"]]:
        found.append(f"shared memory {row['shared']} over {TARGETS[row['target']]}")
    return found


# The forms of each operator.
GATE_FORMS = {
    "fused": ("full", "off", "lean", "ones", "mass", "narrow", "noncausal", "packed", "gemma", "oss", "chunk", "alibi",
              "weights", "dropout", "rows"),
    "rows": ("full", "one", "ones", "narrow", "final", "many", "noncausal", "packed", "gemma", "oss", "chunk", "alibi",
             "weights"),
    "decode": ("full", "one", "off", "narrow", "final", "noncausal", "gemma", "oss", "chunk", "alibi", "weights"),
}  # fmt: skip


def gate_cases(
    targets: Iterable[str], head_dims: Iterable[int], dtypes: Iterable[str] = ("bf16", "fp32")
) -> list[Case]:
    """Return every distinct compilation of the calls that a user can make; fp16 compiles its full forms alone.

    A call that no launch of the table serves is left out: the operators refuse it.
    """
    cases: dict[tuple[str, str], Case] = {}
    for target in targets:
        for dtype in dtypes:
            for head_dim in head_dims:
                for operator in OPERATORS:
                    for groups, form in _groups_and_forms(operator, dtype):
                        case = Case(operator, "", target, dtype, head_dim, groups, form)
                        for key, one in _distinct(case):
                            cases.setdefault((target, key), one)
    return list(cases.values())


def _groups_and_forms(operator: str, dtype: str) -> list[tuple[int, str]]:
    if dtype == "fp16":
        return [(2, "full")]
    return [*((2, form) for form in GATE_FORMS[operator]), (16, "full"), (16, "weights")]


def _distinct(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the launches of an operator, each with what its compilation depends on."""
    try:
        launches = case.launches()
    except NotImplementedError:
        return
    target = gpu_target(case.target)
    seen: dict[str, int] = {}
    for one in launches:
        source, options = one.source(target)
        nth = seen.setdefault(one.name, 0)
        seen[one.name] += 1
        yield f"{source.hash()} {options}", case._replace(kernel=one.name, nth=nth)


def instruction_table(targets: list[str], jobs: int) -> list[dict[str, Any]]:
    """Count the instructions of each fused kernel's unmasked main loop, per thread and iteration, mass off and on.

    `skipped` is what a block of keys without a label jumps over. bf16, causal, 2 groups; both with the launch of the
    mass, so that tiles are alike.
    """
    cases = []
    for table in ("forward", "backward_kv", "backward_q"):
        operator, (kernel,) = KERNELS[table]
        for target in targets:
            for head_dim in (64, 128):
                on = Case(operator, kernel, target, "bf16", head_dim, 2)
                of_mass = Launch(*next(one.launch for one in on.launches() if one.name == kernel))
                cases += [on._replace(form="off", table=table, launch=of_mass), on]
    with ProcessPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_case, cases))
    rows = []
    for off, on_row in zip(compiled[::2], compiled[1::2], strict=True):
        loops = [min(row["loops"], key=lambda loop: loop["instructions"]) for row in (off, on_row)]
        kept = ("kernel", "target", "head_dim", "launch", "registers", "shared")
        rows.append({key: on_row[key] for key in kept} | {"off": loops[0], "on": loops[1]})
    return rows


def short_name(kernel: str) -> str:
    """Return a kernel's name without what all share."""
    return kernel.strip("_").removesuffix("_kernel").removeprefix("mass_attn_").replace("row_mass", "rows")


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
    parser.add_argument("--forms", default="", help="forms, comma-separated; all by default")
    parser.add_argument("--json", type=Path, help="write the rows there")
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
            print(
                f"{short_name(row['kernel']):7} {row['target']:7} D{row['head_dim']:<3} mass off "
                f"{off['instructions']:4}, on {on['instructions']:4} of which a block without labels skips "
                f"{on['skipped']}"
            )
        if options.json:
            write_json(options.json, {"provenance": provenance(("torch", "triton")), "rows": table})
        return 0
    cases = gate_cases(targets, map(int, options.head_dims.split(",")), options.dtype.split(","))
    if options.forms:
        cases = [case for case in cases if case.form in options.forms.split(",")]
    print(f"{len(cases)} compilations", flush=True)
    found = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(compile_case, cases):
            print(_line(row), flush=True)
            found.append(row)
    if options.json:
        write_json(options.json, {"provenance": provenance(("torch", "triton")), "rows": found})
    bad = sum(bool(problems(row)) for row in found)
    print(f"{len(found)} compilations, {bad} with problems")
    return 1 if bad else 0


def run(out_dir: Path) -> Path:
    """Compile what calls can launch, write `aot.json`, and return its path."""
    path = out_dir / "aot.json"
    main(["--json", str(path)])
    return path


if __name__ == "__main__":
    sys.exit(main())
