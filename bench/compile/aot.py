"""Compile every kernel of the launch table ahead of time, without a GPU, and read the compiler's report.

    python -m bench.compile.aot [--json FILE]      the table: registers, spills, shared memory, matrix instructions

Each is causal with left padding and every incoming gradient, as a padded batch in training is; `--variants` adds the
feature sets of `VARIANTS`, a form without any feature, and one with all integer arguments 1, which Triton makes
constants. `python -m bench.compile.derive` chooses the entries.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, below
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from abft.files import write_json
from abft_kernels.masking import Reach
from abft_kernels.triton import backward, combine, forward, rows
from abft_kernels.triton.launch import TABLE, Launch, preprocess_block, table_architecture
from abft_kernels.triton.structs import (
    Dropout,
    Features,
    Heads,
    Labels,
    RowShape,
    Scores,
    Sequences,
    Shape,
    head_block,
    next_power_of_2,
)
from bench.record import provenance

name = "aot"
description = "no GPU: registers, spills, shared memory and matrix instructions of every entry of the launch table"

__all__ = ["Case", "compile_case", "table_cases"]

KERNELS = {
    "forward": ["_mass_attn_fwd_kernel"],
    "backward_kv": ["_mass_attn_bwd_kv_kernel"],
    "backward_q": ["_mass_attn_bwd_q_kernel"],
    "rows": ["_row_mass_fwd_kernel", "_row_mass_bwd_kernel"],
    "other": ["_mass_attn_bwd_preprocess_kernel", "row_mass_combine_kernel", "row_mass_dq_kernel"],
}
# Shared memory that one program may have, in bytes; sm_80 itself has 163 KiB, sm_86 and sm_89 run the same entries.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Types of what has not the dtype of the case, by name; a field of a tuple goes by TUPLE.FIELD.
_POINTERS = {
    "labels.keys": "*i8", "labels.blocks": "*i8", "row_mask": "*u8", "statistics.row_mask": "*u8",
    "sequences.starts": "*i32", "sequences.ends": "*i32", "sequences.tiles": "*i32", "positions": "*i32",
}  # fmt: skip
_FLOAT32 = ("mass", "lse", "dmass", "dlse", "statistics.lse2", "statistics.delta", "statistics.dmass",
            "scores.slope", "part_lse", "part_mass", "part_dq", "dw")  # fmt: skip
_FLOATS = ("scale", "scores.factor", "scores.softcap2", "dropout.scale")
_OF_CASE = ("sinks", "part_out", "dq", "dk", "dv")
_TUPLES: dict[str, Any] = {
    **dict.fromkeys(("q", "k", "v", "out", "do"), Heads), "labels": Labels, "scores": Scores, "dropout": Dropout,
    "sequences": Sequences, "statistics": backward.Statistics,
}  # fmt: skip
# What a launch may have beside causal padded batches, and the tensor that comes with it.
_FEATURES = {
    **dict.fromkeys(Reach._fields, ""), "softcap": "", "dropout": "", "weights": "", "sinks": "sinks",
    "slopes": "scores.slope", "row_mask": "row_mask", "packed": "sequences.tiles", "dw": "dw",
}  # fmt: skip
# Feature sets of models and of training; "all" is every one at once, "lean" not even a causal mask, "off" no mass.
VARIANTS = {
    "full": (), "packed": ("packed",), "gemma": ("window", "softcap"), "oss": ("window", "sinks"),
    "alibi": ("slopes",), "weights": ("weights", "dw"), "dropout": ("dropout",),
    "rows": ("row_mask",),
}  # fmt: skip


class Case(NamedTuple):
    """One compilation."""

    kernel: str
    table: str
    arch: int
    dtype: str
    head_dim: int
    groups: int
    launch: Launch
    variant: str = "full"


def _kernel(name: str) -> Any:
    for module in (forward, backward, rows, combine):
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"no kernel {name}")


def _features(case: Case, extra: set[str]) -> Features:
    on = case.variant != "lean"
    groups = 0 if case.variant == "off" or (not on and case.table != "rows") else case.groups
    v = case.table != "rows" and case.kernel != "row_mass_combine_kernel"
    block = head_block(case.head_dim)
    reach = Reach(**dict.fromkeys(extra & set(Reach._fields), 1))
    return Features(
        head_dim=case.head_dim,
        head_dim_v=case.head_dim,
        block_d=block,
        block_dv=block if v else 1,
        block_m=case.launch.block_m,
        block_n=case.launch.block_n,
        groups=groups,
        groups_pad=next_power_of_2(max(1, groups)),
        precision="ieee" if case.dtype == "fp32" else "tf32",
        causal=on,
        reach=reach,
        starts=on,
        ends=on,
        v=v,
        dlse=on,
        dq=True,
        dk=True,
        **dict.fromkeys(extra - set(Reach._fields), True),
    )


def _source(case: Case) -> ASTSource:
    """Return the source as a launch would specialize it."""
    kernel = _kernel(case.kernel)
    extra = set(_FEATURES) if case.variant == "all" else set(VARIANTS.get(case.variant, ()))
    chosen = _features(case, extra)
    absent = {pointer for flag, pointer in _FEATURES.items() if flag not in extra}
    if not chosen.starts:
        absent |= {"sequences.starts", "sequences.ends", "dlse"}
    if chosen.groups == 0:
        absent |= {"labels.keys", "labels.blocks", "dmass", "statistics.dmass"}
    if case.kernel != "_mass_attn_fwd_kernel" and case.kernel != "_mass_attn_bwd_q_kernel":
        absent |= {"labels.blocks"}
    if not chosen.v:
        absent |= {"v", "out", "part_out"}
    if case.kernel == "row_mass_combine_kernel":
        absent |= {"sinks"}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def constant(path: tuple[int, ...], value: Any) -> str:
        constants[path] = value
        return "constexpr"

    def of_type(name: str, field: str, path: tuple[int, ...]) -> str:
        full = f"{name}.{field}" if field else name
        of_heads = field == "ptr" or full in _OF_CASE
        if name in absent or full in absent:
            return constant(path, None if of_heads or not field or full in absent else 0)
        if of_heads or full in _FLOAT32 or full in _POINTERS:
            attributes[path] = [["tt.divisibility", 16]]
            wide = full in _FLOAT32 or (full == "labels.keys" and "weights" in extra)
            if full == "dq" and case.table == "rows":
                wide = True  # parts of it
            return "*fp32" if wide else _POINTERS.get(full, f"*{case.dtype}")
        if full in _FLOATS:
            return "fp32"
        if field == "d" or case.variant == "ones":
            return constant(path, 1)
        if field in ("b", "h", "n"):
            attributes[path] = [["tt.divisibility", 16]]
        return "i64" if full == "dropout.seed" else "i32"

    def of_tuple(name: str, kind: Any, path: tuple[int, ...]) -> Any:
        types = (
            of_tuple(name, Reach, (*path, at)) if field == "reach" else of_type(name, field, (*path, at))
            for at, field in enumerate(kind._fields)
        )
        return kind(*types)

    signature: dict[str, Any] = {}
    tuples = _TUPLES | {"shape": RowShape if case.table == "rows" else Shape}
    for index, name in enumerate(kernel.arg_names):
        if name == "F":
            signature[name] = constant((index,), chosen)
        elif name in tuples:
            signature[name] = of_tuple(name, tuples[name], (index,))
        else:
            signature[name] = of_type(name, "", (index,))
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


class Loop(NamedTuple):
    opcodes: Counter[str]
    skipped: int  # instructions of the longest stretch that a branch inside the loop jumps over


def main_loops(sass: str) -> list[Loop]:
    """Return the innermost loops that hold matrix instructions, in the order of the code."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            opcodes.append(found[1])
            if target := re.search(r"BRA.*`\((\.L_x_\d+)\)", line):
                branches.append((len(opcodes), target[1]))
    jumps = [(source, labels[label]) for source, label in branches if label in labels]
    matrix = {"HGMMA", "HMMA", "UTCHMMA"}
    loops = [(to, source) for source, to in jumps if to < source and matrix & set(opcodes[to:source])]
    innermost = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [
        Loop(
            Counter(opcodes[start:end]),
            max((to - source for source, to in jumps if start <= source < to < end), default=0),
        )
        for start, end in innermost
    ]


def compile_case(case: Case) -> dict[str, Any]:
    """Add `registers`, `stack`, `spills` (local-memory instructions), `loop_spills` (those of them inside main loops),
    `shared`, `hgmma`, `hmma`, `utcmma`, `loops` (counts of instructions of each main loop), or `error`."""
    row: dict[str, Any] = {**case._asdict(), "launch": list(case.launch)}
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages}
    try:
        compiled = triton.compile(_source(case), target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        return {**row, "error": f"cuobjdump gave no usage: {usage[:200]}"}
    loops = main_loops(sass)
    return {
        **row,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "hmma": len(re.findall(r"\bHMMA\b", sass)),
        "utcmma": len(re.findall(r"\bUTC\w*MMA\b", sass)),
        "loops": [_kinds(loop) for loop in loops],
        "loop_spills": sum(loop.opcodes[op] for loop in loops for op in ("STL", "LDL")),
    }


def _kinds(loop: Loop) -> dict[str, int]:
    kinds = {"matrix": r".*MMA", "special": r"MUFU", "float": r"F(ADD|MUL|FMA|MNMX\w*|SEL|SET\w*)",
             "shared": r"(LDS\w*|STS\w*)", "global": r"(LDG\w*|LDGSTS\w*|UTMALDG|STG)"}  # fmt: skip
    counts = {
        kind: sum(n for op, n in loop.opcodes.items() if re.fullmatch(pattern, op)) for kind, pattern in kinds.items()
    }
    return {"instructions": loop.opcodes.total(), "skipped": loop.skipped, **counts}


def instruction_table(archs: list[int], jobs: int) -> list[dict[str, Any]]:
    """Count the instructions of each fused kernel's unmasked main loop, per thread and iteration, mass off and on.

    `skipped` is what a block of keys without a label jumps over. bf16, causal, 2 groups, the launch of the table.
    """
    cases = []
    for table in ("forward", "backward_kv", "backward_q"):
        for arch in archs:
            for head_dim in (64, 128):
                launch = _first(TABLE[table, 2, table_architecture(arch)], head_dim, 2)
                assert launch is not None  # every architecture has them
                cases += [Case(KERNELS[table][0], table, arch, "bf16", head_dim, 2, launch, v) for v in ("off", "full")]
    with ProcessPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_case, cases))
    rows = []
    for off, on in zip(compiled[::2], compiled[1::2], strict=True):
        loops = [min(row["loops"], key=lambda loop: loop["instructions"]) for row in (off, on)]
        rows.append(
            {key: on[key] for key in ("kernel", "arch", "head_dim", "launch")} | {"off": loops[0], "on": loops[1]}
        )
    return rows


def _first(entries: list[tuple[int, int, Launch]], head_dim: int, groups: int) -> Launch | None:
    return next((launch for width, most, launch in entries if head_dim <= width and groups <= most), None)


def table_cases(archs: list[int], groups: list[int], variants: bool = False) -> list[Case]:
    """Return every kernel of every entry; `variants` adds the other forms of the head-128 and head-64 entries."""
    cases = []
    for (table, element_size, table_arch), entries in TABLE.items():
        dtype = "bf16" if element_size == 2 else "fp32"
        for arch in archs:
            if table_arch != table_architecture(arch):
                continue
            for head_dim, _, launch in entries:
                served = [g for g in groups if _first(entries, head_dim, g) == launch]
                tiles = {launch, launch._replace(block_m=16)} if table == "rows" else {launch}
                for kernel in KERNELS[table]:
                    cases += [
                        Case(kernel, table, arch, dtype, head_dim, g, tile) for g in served for tile in sorted(tiles)
                    ]
                    if variants and head_dim == 128 and element_size == 2 and 2 in served:
                        cases += [
                            Case(kernel, table, arch, dtype, head_dim, 2, launch, v) for v in ("lean", "ones", "all")
                        ]
    for arch in archs:
        for head_dim in (64, 128, 256):
            launch = Launch(preprocess_block(head_dim), 0, 4, 3)
            cases.append(Case(KERNELS["other"][0], "other", arch, "fp32", head_dim, groups[-1], launch))
            cases.append(
                Case(KERNELS["other"][2], "other", arch, "fp32", head_dim, 1, Launch(4096 // head_dim, 0, 4, 3))
            )
        cases.append(Case(KERNELS["other"][1], "other", arch, "fp32", 64, groups[-1], Launch(32, 0, 1, 3)))
    return cases


def problems(row: dict[str, Any]) -> list[str]:
    """Return the reasons to reject this entry; empty if it is accepted."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"shared memory {row['shared']} over {SHARED_LIMIT[row['arch']]}")
    return found


def _line(row: dict[str, Any]) -> str:
    kernel = row["kernel"].strip("_").removesuffix("_kernel")
    what = f"{kernel:24} sm_{row['arch']:<3} {row['dtype']} D{row['head_dim']:<3} G{row['groups']}"
    launch = "x".join(map(str, row["launch"][:2])) + f" w{row['launch'][2]} s{row['launch'][3]}"
    state = "; ".join(problems(row)) or "ok"
    if "error" in row:
        return f"{what} {row['variant']:4} {launch:14} {state}"
    numbers = (
        f"{row['registers']:3} regs {row['shared']:6} B shared, MMA {row['hgmma'] + row['hmma'] + row['utcmma']:3}"
    )
    return f"{what} {row['variant']:4} {launch:14} {numbers}  {state}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="80,90", help="compute capabilities, comma-separated (80, 90, 100)")
    parser.add_argument("--groups", default="2,8", help="numbers of key groups, comma-separated")
    parser.add_argument("--dtype", default="bf16,fp32", help="element types, comma-separated")
    parser.add_argument("--brief", action="store_true", help="each entry with its largest number of groups only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--variants", action="store_true", help="also compile the featureless and the all-ones form")
    parser.add_argument("--instructions", action="store_true", help="main-loop instruction counts, mass off and on")
    options = parser.parse_args(arguments)
    archs = [int(a) for a in options.arch.split(",")]
    groups = [int(g) for g in options.groups.split(",")]
    if options.instructions:
        table = instruction_table(archs, options.jobs)
        for row in table:
            off, on = row["off"], row["on"]
            print(
                f"{row['kernel']:26} sm_{row['arch']:<3} D{row['head_dim']:<3} mass off {off['instructions']:4}, on "
                f"{on['instructions']:4} of which a block without labels skips {on['skipped']}"
            )
        if options.json:
            write_json(options.json, {"provenance": provenance(("torch", "triton")), "rows": table})
        return 0
    cases = table_cases(archs, groups, options.variants)
    cases = [case for case in cases if case.dtype in options.dtype.split(",") or case.table == "other"]
    if options.brief:
        largest = {case._replace(groups=0): case for case in sorted(cases, key=lambda case: case.groups)}
        cases = list(largest.values())
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
    """Compile the table, write `aot.json`, and return its path."""
    path = out_dir / "aot.json"
    main(["--json", str(path)])
    return path


if __name__ == "__main__":
    sys.exit(main())
