"""What the compiler reports of a kernel: registers, spills, shared memory, matrix instructions and main loops.

NVIDIA's figures come from `cuobjdump` and `nvdisasm` in Triton's wheel, AMD's from the assembly and its metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends import nvidia

__all__ = ["Loop", "main_loops", "report"]

_MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma\w*|v_wmma\w*")
# How a disassembly writes a label, an instruction behind its address and predicate, and a branch.
_SASS = (
    re.compile(r"\s*(\.L_x_\d+):"),
    re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"),
    re.compile(r"BRA.*`\((\.L_x_\d+)\)"),
)
_AMDGCN = (
    re.compile(r"(\.LBB\d+_\d+):"),
    re.compile(r"\t([a-z]\w+)"),
    re.compile(r"\ts_c?branch\w*\s+(\.LBB\d+_\d+)"),
)
_MOVED = re.compile(r"UMOV (UR\d+), (0x[0-9a-f]+)")
_DESCRIBED = re.compile(r"MMA .*idesc\[(UR\d+)\]")
_KINDS = {
    "matrix": r".*MMA|v_w?mf?ma\w*",
    "special": r"MUFU|v_(exp|log|rcp|sqrt|rsq)_\w+",
    "float": r"F(ADD|MUL|FMA|MNMX\w*|SEL|SET\w*)|v_(pk_)?(add|sub|mul|fma|fmac|max|max3|mac|mad)_f32\w*",
    "shared": r"LDS\w*|STS\w*|ds_(read|write|load|store)\w*",
    "global": r"LDG\w*|LDGSTS\w*|UTMALDG|STG|(global|buffer)_(load|store)\w*",
}


class Loop(NamedTuple):
    opcodes: Counter[str]
    skipped: int  # instructions of the longest stretch that a branch inside the loop jumps over
    lines: tuple[str, ...]
    start: int = 0  # where the first of them stands: loops may overlap

    def kinds(self) -> dict[str, int]:
        """Return the number of instructions, of those skipped, and of each kind."""
        counts = {
            kind: sum(n for op, n in self.opcodes.items() if re.fullmatch(pattern, op))
            for kind, pattern in _KINDS.items()
        }
        return {"instructions": self.opcodes.total(), "skipped": self.skipped, **counts}


def main_loops(assembly: str) -> list[Loop]:
    """Return the innermost loops that hold matrix instructions, in the order of the code (SASS or amdgcn)."""
    label_of, instruction, branch = _AMDGCN if ".LBB0_" in assembly else _SASS
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    moved: dict[str, str] = {}
    branches: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := label_of.match(line):
            labels[label[1]] = len(lines)
        elif found := instruction.search(line):
            if move := _MOVED.search(line):
                moved[move[1]] = move[2]
            elif of_tensor_core := _DESCRIBED.search(line):  # the shape stands in a register
                line += f" // {moved.get(of_tensor_core[1], '')}"
            lines.append((found[1], line.strip()))
            if target := branch.search(line):
                branches.append((len(lines), target[1]))
    jumps = [(source, labels[label]) for source, label in branches if label in labels]
    ends: dict[int, int] = {}
    for source, to in jumps:  # several jumps back to one place are one loop
        if to < source:
            ends[to] = max(source, ends.get(to, 0))
    loops = [loop for loop in ends.items() if any(_MATRIX.fullmatch(op) for op, _ in lines[slice(*loop)])]
    innermost = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [
        Loop(
            Counter(op for op, _ in lines[start:end]),
            max((to - source for source, to in jumps if start <= source < to < end), default=0),
            tuple(line for _, line in lines[start:end]),
            start,
        )
        for start, end in sorted(innermost)
    ]


def report(compiled: Any) -> tuple[dict[str, int], list[Loop]]:
    """Return the figures of a compiled kernel and its main loops.

    `registers` of a thread, `stack`: bytes of its local memory, `spills`: instructions that spill to it or reload,
    `loop_spills`: those of them in main loops, `shared`: bytes, `matrix`: matrix instructions, and of NVIDIA's
    `warpgroup`: those of them that a warpgroup or the tensor core's own memory takes part in.
    """
    figures, assembly, spill = _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)
    loops = main_loops(assembly)
    figures["spills"] = len(spill.findall(assembly))
    in_loops = {at for loop in loops for at, line in enumerate(loop.lines, loop.start) if spill.search(line)}
    figures["loop_spills"] = len(in_loops)
    figures["matrix"] = sum(1 for word in re.findall(r"[\w]+", assembly) if _MATRIX.fullmatch(word))
    return figures, loops


def _nvidia(compiled: Any) -> tuple[dict[str, int], str, re.Pattern[str]]:
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no usage: {usage[:200]}")
    figures = {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}
    figures["warpgroup"] = len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)\b", sass))
    return figures, sass, re.compile(r"\b(?:STL|LDL)\b")


def _amd(compiled: Any) -> tuple[dict[str, int], str, re.Pattern[str]]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    figures = {"registers": field("vgpr_count"), "stack": field("private_segment_fixed_size")}
    # Launched with so much; the segment of the metadata is the static part alone.
    figures["shared"] = max(compiled.metadata.shared, field("group_segment_fixed_size"))
    # Scalar registers spill to lanes of vector registers, not to memory.
    figures |= {"scalar": field("sgpr_count"), "scalar_spills": field("sgpr_spill_count")}
    return figures, assembly, re.compile(r"Folded (?:Spill|Reload)")
