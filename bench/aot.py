"""Compiles every kernel of the launch table ahead of time, with no GPU, and reads what the compiler made of it.

    python -m bench.aot [--json FILE]      the table: registers, spills, shared memory, matrix instructions
    python -m bench.aot --sweep            candidates for the table instead of its entries

All features are on (causal, left padding, every incoming gradient). `--variants` adds two forms of each kernel that
a launch can also take: every feature off, and all integer arguments 1 (which Triton makes constants).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, below
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from abft_kernels.launch import TABLE, Launch, preprocess_block
from abft_kernels.triton import backward, forward, rows
from abft_kernels.triton.common import head_block, next_power_of_2
from bench.provenance import provenance, write_json

name = "aot"
description = "no GPU: registers, spills, shared memory and matrix instructions of every entry of the launch table"

__all__ = ["Case", "compile_case", "table_cases"]

KERNELS = {
    "forward": ["_mass_attn_fwd_kernel"],
    "backward_kv": ["_mass_attn_bwd_kv_kernel"],
    "backward_q": ["_mass_attn_bwd_q_kernel"],
    "rows": ["_row_mass_fwd_kernel", "_row_mass_bwd_kernel"],
    "other": ["_mass_attn_bwd_preprocess_kernel", "_row_mass_combine_kernel"],
}
# Shared memory that one program may have, in bytes; sm_80 itself has 163 KiB, sm_86 and sm_89 run the same entries.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_POINTERS = {"Groups": "*i8", "Labelled": "*i8", "Starts": "*i32", "Ends": "*i32", "Positions": "*i32"}
_FLOAT32 = ("Mass", "dMass", "LSE", "dLSE", "Delta", "PartLSE", "PartMass", "PartDQ")
_FLOATS = ("scale", "qk_scale", "log2e", "ln2")

# --sweep: (block_m, block_n, num_warps, num_stages) by kernel, element size and head tile; best guess first.
_CANDIDATES: dict[tuple[str, int], dict[int, list[tuple[int, int, int, int]]]] = {
    ("forward", 2): {
        64: [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
              (64, 64, 8, 2), (64, 32, 4, 3)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3)],
    },
    ("forward", 4): {
        64: [(64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1)],
        128: [(64, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 4, 1)],
        256: [(32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    },
    ("backward_kv", 2): {
        64: [(64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 2)],
        128: [(64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 4, 1), (32, 64, 8, 2)],
        256: [(32, 64, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1)],
    },
    ("backward_kv", 4): {
        64: [(32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
        128: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 2)],
    },
    ("backward_q", 2): {
        64: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
        128: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 4, 2)],
        256: [(64, 64, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2), (64, 16, 8, 1), (32, 32, 4, 1)],
    },
    ("backward_q", 4): {
        64: [(64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)],
        128: [(32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1), (32, 16, 16, 1)],
        256: [(32, 16, 16, 1), (16, 16, 16, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    ("rows", 2): {
        64: [(32, 128, 8, 3), (32, 128, 4, 3), (32, 64, 4, 3)],
        128: [(32, 128, 8, 3), (32, 64, 8, 3), (32, 64, 4, 3), (16, 64, 4, 3)],
        256: [(32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 4, 2)],
    },
    ("rows", 4): {
        64: [(32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 4, 2), (16, 32, 4, 2)],
        128: [(16, 64, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
        256: [(16, 32, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 4, 2)],
    },
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
    variant: str = "full"  # "full", "lean" (features off), "ones" (integer arguments 1)


def _kernel(name: str) -> Any:
    for module in (forward, backward, rows):
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"no kernel {name}")


def _source(case: Case) -> ASTSource:
    kernel = _kernel(case.kernel)
    on = case.variant != "lean"
    groups = case.groups if on or case.table == "rows" else 0
    constants = {
        "HEAD_DIM": case.head_dim, "BLOCK_D": head_block(case.head_dim),
        "BLOCK_M": case.launch.block_m, "BLOCK_R": case.launch.block_m, "BLOCK_N": case.launch.block_n, "BLOCK": 32,
        "GROUPS": groups, "GROUPS_PAD": next_power_of_2(max(1, groups)), "IS_CAUSAL": on,
        "HAS_STARTS": on, "HAS_ENDS": on, "HAS_DO": True, "HAS_DMASS": groups > 0, "HAS_DLSE": on,
        "WRITE_DQ": True, "WRITE_DK": True, "PRECISION": "ieee" if case.dtype == "fp32" else "tf32",
    }  # fmt: skip
    absent = set() if on else {"Starts", "Ends", "dLSE"}
    if groups == 0:
        absent |= {"Groups", "Labelled", "Mass", "dMass"}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in absent:
            signature[name], values[name] = "constexpr", None
        elif name.lstrip("d")[0].isupper():
            pointee = "*fp32" if name in _FLOAT32 else f"*{case.dtype}"
            signature[name] = _POINTERS.get(name, pointee)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif re.fullmatch(r"stride_\w+d", name) or case.variant == "ones":
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if name.startswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def compile_case(case: Case) -> dict[str, Any]:
    """Adds `registers`, `stack`, `spills` (local-memory instructions), `shared`, `hgmma`, `hmma`, or `error`."""
    row: dict[str, Any] = {**case._asdict(), "launch": list(case.launch)}
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages}
    try:
        compiled = triton.compile(_source(case), target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error)[:300]}"}
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
    return {
        **row, "registers": int(found[1]), "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)), "shared": compiled.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)), "hmma": len(re.findall(r"\bHMMA\b", sass)),
    }  # fmt: skip


def _first(entries: list[tuple[int, int, Launch]], head_dim: int, groups: int) -> Launch:
    return next(launch for width, most, launch in entries if head_dim <= width and groups <= most)


def table_cases(archs: list[int], groups: list[int], variants: bool = False) -> list[Case]:
    """Every kernel of every entry; `variants` adds the other forms of the head-128 and head-64 entries."""
    cases = []
    for (table, element_size, table_arch), entries in TABLE.items():
        dtype = "bf16" if element_size == 2 else "fp32"
        for arch in archs:
            if table_arch != (80 if arch < 90 else 90):
                continue
            for head_dim, _, launch in entries:
                served = [g for g in groups if _first(entries, head_dim, g) == launch]
                tiles = {launch, launch._replace(block_m=16)} if table == "rows" else {launch}
                for kernel in KERNELS[table]:
                    cases += [
                        Case(kernel, table, arch, dtype, head_dim, g, tile) for g in served for tile in sorted(tiles)
                    ]
                    if variants and head_dim == 128 and element_size == 2 and 2 in served:
                        cases += [Case(kernel, table, arch, dtype, head_dim, 2, launch, v) for v in ("lean", "ones")]
    for arch in archs:
        for head_dim in (64, 128, 256):
            launch = Launch(preprocess_block(head_dim), 0, 4, 3)
            cases.append(Case(KERNELS["other"][0], "other", arch, "fp32", head_dim, groups[-1], launch))
        cases.append(Case(KERNELS["other"][1], "other", arch, "fp32", 64, groups[-1], Launch(32, 0, 1, 3)))
    return cases


def _candidate_cases(archs: list[int], groups: list[int], only: str) -> list[Case]:
    return [
        Case(kernel, table, arch, "bf16" if element_size == 2 else "fp32", head_dim, g, Launch(*candidate))
        for (table, element_size), widths in _CANDIDATES.items()
        if re.search(only, f"{table}-{element_size}")
        for head_dim, candidates in widths.items()
        for candidate in candidates
        for kernel in KERNELS[table]
        for arch in archs
        for g in groups
    ]


def problems(row: dict[str, Any]) -> list[str]:
    """What keeps an entry out of the table."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"shared memory {row['shared']} over {SHARED_LIMIT[row['arch']]}")
    return found


def _line(row: dict[str, Any]) -> str:
    what = f"{row['kernel'][1:-7]:24} sm_{row['arch']:<3} {row['dtype']} D{row['head_dim']:<3} G{row['groups']}"
    launch = "x".join(map(str, row["launch"][:2])) + f" w{row['launch'][2]} s{row['launch'][3]}"
    state = "; ".join(problems(row)) or "ok"
    if "error" in row:
        return f"{what} {row['variant']:4} {launch:14} {state}"
    numbers = f"{row['registers']:3} regs {row['shared']:6} B shared, HGMMA {row['hgmma']:3} HMMA {row['hmma']:3}"
    return f"{what} {row['variant']:4} {launch:14} {numbers}  {state}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="80,90", help="compute capabilities, comma-separated (80, 90, 100)")
    parser.add_argument("--groups", default="2,8", help="numbers of key groups, comma-separated")
    parser.add_argument("--dtype", default="bf16,fp32", help="element types, comma-separated")
    parser.add_argument("--brief", action="store_true", help="each entry with its largest number of groups only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--variants", action="store_true", help="also compile the featureless and the all-ones form")
    parser.add_argument("--sweep", nargs="?", const="", help="try candidates instead (regex over KERNEL-ELEMENTSIZE)")
    options = parser.parse_args(arguments)
    archs = [int(a) for a in options.arch.split(",")]
    groups = [int(g) for g in options.groups.split(",")]
    if options.sweep is not None:
        cases = _candidate_cases(archs, groups, options.sweep)
    else:
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
    return 1 if bad and options.sweep is None else 0


def run(out_dir: Path) -> Path:
    """Compiles the table, writes `aot.json`, and returns its path."""
    path = out_dir / "aot.json"
    main(["--json", str(path)])
    return path


if __name__ == "__main__":
    sys.exit(main())
