"""Bounds that the machine code of the fused kernels implies: a prediction without a GPU, and no measurement.

    python -m bench.compile.implied_bounds [--json FILE]

Of each kernel's unmasked main loop, cycles of one multiprocessor for one iteration of one block:

    matrix   Σ operations of the matrix instructions / operations per cycle
    special  MUFU instructions · threads / 16
    issue    max(instructions · warps / 4 schedulers, FP32 instructions · threads / FP32 lanes)
    shared   bytes of LDS, STS, LDSM, STSM, cp.async and of the operands that wgmma and tcgen05 read / 128

Two assumptions bound the share of the matrix units' peak; `useful` are the cycles of the products that the algorithm
needs, fewer than `matrix` where warps compute the same:

    overlap  useful / max(matrix, special, issue, shared)                    all units work at once
    serial   useful / (max(matrix, shared) + max(special, issue))            the softmax waits for the products

Latency, barriers, memory traffic, tensor memory and masked blocks are left out: a kernel may be slower than "serial".
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from abft.files import write_json
from bench.compile.aot import blocks_per_multiprocessor, compiled_kernel, short_name
from bench.compile.launches import KERNELS, Case
from bench.compile.machine_code import Loop, report
from bench.gpu.goals import verdicts
from bench.record import provenance

name = "implied_bounds"
description = "no GPU: cycles that the main loops' machine code implies, and the predicted share of the matrix peak"

__all__ = ["MACHINES", "Machine", "cycles", "shares"]


class Machine(NamedTuple):
    """A GPU, as its vendor describes it."""

    gpu: str
    matrix: int  # operations per cycle and multiprocessor, 16 bits into float32, dense
    float_lanes: int  # FP32 results per cycle and multiprocessor
    teraflops: float  # the peak of the whole GPU


# Peaks: NVIDIA's A100, H100 and Blackwell papers. Per cycle and multiprocessor: 312 TFLOP/s / (108 · 1.41 GHz) and
# 989.4 TFLOP/s / (132 · 1.83 GHz); for B200 twice H100's is assumed. FP32 results, MUFU and shared memory: CUDA
# C++ Programming Guide, "Arithmetic Instructions" and "Technical Specifications".
MACHINES = {
    "sm_80": Machine("A100", 2048, 64, 312.0),
    "sm_90": Machine("H100 SXM", 4096, 128, 989.4),
    "sm_100": Machine("B200", 8192, 128, 2250.0),
}
# Matrix products of a block of scores in each kernel.
PRODUCTS = {"_mass_attn_fwd_kernel": 2, "_mass_attn_bwd_kv_kernel": 4, "_mass_attn_bwd_q_kernel": 3}
SPECIAL, SCHEDULERS, BANKS = 16, 4, 128  # MUFU results, warp instructions and bytes of shared memory per cycle
_WIDTH = {"32": 4, "64": 8, "128": 16}  # bytes of a thread


class Work(NamedTuple):
    """What one block does in one iteration."""

    operations: float  # of matrix instructions
    special: float  # MUFU results
    instructions: float  # of warps
    floats: float  # FP32 results
    shared_bytes: float


def _matrix(line: str) -> tuple[float, float, int]:
    """Return operations, bytes of shared memory and warps of a matrix instruction with operands of 16 bits."""
    if found := re.search(r"\bHMMA\.(16)(8)(16|8)\.", line):
        m, n, k = map(int, found.groups())
        return 2.0 * m * n * k, 0.0, 1
    if found := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\.\S+ \w+, (\w+)", line):
        m, n, k = map(int, found.groups()[:3])
        operands = n * k + (m * k if found[4] == "gdesc" else 0)  # the first may stand in registers
        return 2.0 * m * n * k, 2.0 * operands, 4
    if found := re.search(r"\bUTCHMMA (\w+).*// 0x([0-9a-f]+)", line):
        shape, k = int(found[2], 16), 16
        m, n = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
        return 2.0 * m * n * k, 2.0 * (n * k + (m * k if found[1] == "gdesc" else 0)), 0
    raise ValueError(f"a matrix instruction of unknown shape: {line}")


def _shared_bytes(line: str) -> float:
    """Return the bytes of shared memory that a warp's instruction moves; each takes a cycle at least."""
    if "@!PT" in line:  # never executed
        return 0.0
    if found := re.search(r"\b(?:LDSM|STSM)\.\S*?M?T?88(?:\.([24]))?", line):
        return BANKS * float(found[1] or 1)
    if found := re.search(r"\b(?:LDS|STS|LDGSTS)(?!M)((?:\.\w+)*)", line):
        sizes = [_WIDTH[word] for word in found[1].split(".") if word in _WIDTH]
        return 32.0 * (sizes[0] if sizes else 4)
    return 0.0


def work(loop: Loop, num_warps: int) -> Work:
    """Count what a block of so many warps does in one iteration."""
    operations = matrix_bytes = moved = 0.0
    for line in loop.lines:
        if re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", line):
            flop, read, warps = _matrix(line)
            times = num_warps / warps if warps else 1  # tcgen05: one thread for the block
            operations += flop * times
            matrix_bytes += read * times
        else:
            moved += _shared_bytes(line)
    kinds, threads = loop.kinds(), 32 * num_warps
    instructions = kinds["instructions"] * num_warps
    return Work(
        operations, kinds["special"] * threads, instructions, kinds["float"] * threads, matrix_bytes + moved * num_warps
    )


def cycles(of: Work, machine: Machine) -> dict[str, float]:
    """Return the cycles of each unit for one iteration of one block."""
    return {
        "matrix": of.operations / machine.matrix,
        "special": of.special / SPECIAL,
        "issue": max(of.instructions / SCHEDULERS, of.floats / machine.float_lanes),
        "shared": of.shared_bytes / BANKS,
    }


def shares(of: dict[str, float], useful: float) -> dict[str, float]:
    """Return the predicted shares of the matrix peak, with perfect overlap and with a serial softmax."""
    serial = max(of["matrix"], of["shared"]) + max(of["special"], of["issue"])
    return {"overlap": useful / max(of.values()), "serial": useful / serial}


def bound(case: Case) -> dict[str, Any]:
    """Compile a case and return the bounds of its unmasked main loop, the shortest."""
    machine, (one, compiled) = MACHINES[case.target], compiled_kernel(case)
    figures, loops = report(compiled)
    loop = min(loops, key=lambda loop: loop.opcodes.total())
    block_m, block_n, num_warps, _ = one.launch
    of = cycles(work(loop, num_warps), machine)
    product = 2.0 * block_m * block_n * case.head_dim / machine.matrix
    return {
        "kernel": case.kernel,
        "target": case.target,
        "head_dim": case.head_dim,
        "mass": case.form != "off",
        "launch": one.launch,
        "registers": figures["registers"],
        "shared": figures["shared"],
        "blocks": blocks_per_multiprocessor(case.target, figures["registers"], num_warps, figures["shared"]),
        "products": of["matrix"] / product,  # as executed: a check of what was read, and of repeated work
        "cycles": of,
        "shares": shares(of, PRODUCTS[case.kernel] * product),
    }


def bounds(targets: list[str], jobs: int) -> list[dict[str, Any]]:
    """Return the bounds of the fused kernels, bf16, causal, without mass and with 2 groups that every block holds."""
    cases = [
        Case("fused", KERNELS[table][1][0], target, "bf16", head_dim, 2, form)
        for table in ("forward", "backward_kv", "backward_q")
        for target in targets
        for head_dim in (64, 128)
        for form in ("off", "full")
    ]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(bound, cases))


def backward_share(rows: list[dict[str, Any]], assumption: str) -> float:
    """Return the share of the peak of both backward kernels together: 5 of their 7 products are useful."""
    time = sum(PRODUCTS[row["kernel"]] / row["shares"][assumption] for row in rows)
    return 5.0 / time


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile.implied_bounds", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--targets", default=",".join(MACHINES), help="architectures, comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := set(targets) - MACHINES.keys():
        parser.error(f"no constants of {', '.join(sorted(unknown))}; known: {', '.join(MACHINES)}")
    print(__doc__)
    rows = bounds(targets, options.jobs)
    for row in rows:
        of, share, mass = row["cycles"], row["shares"], "on" if row["mass"] else "off"
        print(
            f"{short_name(row['kernel']):6} {row['target']:6} D{row['head_dim']:<3} mass {mass:3} matrix "
            f"{of['matrix']:5.0f}, special {of['special']:5.0f}, issue {of['issue']:5.0f}, shared "
            f"{of['shared']:5.0f} cycles; {row['products']:.0f} products; {row['blocks']} blocks; "
            f"share of the peak: overlap {share['overlap']:.0%}, "
            f"serial {share['serial']:.0%}"
        )
    for line in against_goals(rows):
        print(line)
    if options.json:
        write_json(options.json, {"provenance": provenance(("torch", "triton")), "prediction": __doc__, "rows": rows})
    return 0


def against_goals(rows: list[dict[str, Any]]) -> list[str]:
    """Return the predicted TFLOP/s of useful operations on an H100 at head_dim 128 beside the targets of the suite."""
    lines, peak = [], MACHINES["sm_90"].teraflops
    for mass in (False, True):
        of = [row for row in rows if (row["target"], row["head_dim"], row["mass"]) == ("sm_90", 128, mass)]
        if not of:
            continue
        for direction, targets in _targets().items():
            parts = [row for row in of if ("fwd" in row["kernel"]) == (direction == "forward")]
            low, high = (
                peak * (parts[0]["shares"][one] if direction == "forward" else backward_share(parts, one))
                for one in ("serial", "overlap")
            )
            lines.append(
                f"H100, head_dim 128, mass {'in every block' if mass else 'off'}: {direction} {low:.0f} (serial) to "
                f"{high:.0f} (overlap) TFLOP/s predicted; target of bench.gpu.goals: {targets}"
            )
    return lines


def _targets() -> dict[str, str]:
    """Return the targets in TFLOP/s, by direction."""
    texts = [verdict.target for verdict in verdicts({}) if "TFLOP/s" in verdict.target]
    return {
        direction: next((text for text in texts if direction in text), "none") for direction in ("forward", "backward")
    }


if __name__ == "__main__":
    sys.exit(main())
