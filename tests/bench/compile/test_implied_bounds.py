"""The bounds of a main loop that was counted by hand, and of the blocks that fit a multiprocessor."""

import importlib
import os

import pytest


@pytest.fixture(scope="module")
def implied_bounds():
    """The module, which turns the interpreter off for itself: kernels are made before, the variable is set again."""
    for name in ("backward", "combine", "forward", "rows"):
        importlib.import_module(f"abft_kernels.triton.{name}")
    interpreted = os.environ.get("TRITON_INTERPRET")
    module = importlib.import_module("bench.compile.implied_bounds")
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    return module


def _loop(implied_bounds, *instructions):
    lines = [".L_x_1:", *(f"        /*{16 * i:04x}*/                   {one} ;" for i, one in enumerate(instructions))]
    branch = f"        /*{16 * len(instructions):04x}*/               @P1 BRA `(.L_x_1) ;"
    from bench.compile.machine_code import main_loops

    (loop,) = main_loops("\n".join([*lines, branch]))
    return loop


def test_a_loop_of_warpgroups(implied_bounds):
    """8 warps: 2 warpgroups, each 64 · 64 · 16 with both operands in shared memory, and one with the first in
    registers; two MUFU, one FFMA, one LDS of 16 bytes a thread."""
    loop = _loop(
        implied_bounds,
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56",
        "MUFU.EX2 R1, R1",
        "MUFU.EX2 R2, R2",
        "FFMA R1, R1, R2, R3",
        "LDS.128 R4, [R5]",
        "@!PT LDS RZ, [RZ]",
    )
    of = implied_bounds.work(loop, 8)
    assert of.operations == 2 * 2 * (2 * 64 * 64 * 16)
    assert of.special == 2 * 256
    assert of.instructions == 8 * 8
    assert of.floats == 256
    # Per warpgroup (64·16 + 64·16 + 64·16) elements of 2 bytes, and 8 warps of 512 bytes.
    assert of.shared_bytes == 2 * 2 * (64 * 16 * 3) + 8 * 512
    cycles = implied_bounds.cycles(of, implied_bounds.MACHINES["sm_90"])
    assert cycles == {"matrix": 128.0, "special": 32.0, "issue": 16.0, "shared": 128.0}
    assert implied_bounds.shares(cycles, 128.0) == {"overlap": 1.0, "serial": 128 / 160}
    # Half of the work repeats the other half's.
    assert implied_bounds.shares(cycles, 64.0) == {"overlap": 0.5, "serial": 64 / 160}
    assert implied_bounds.cycles(of, implied_bounds.MACHINES["sm_80"])["matrix"] == 256.0


def test_a_loop_of_warps(implied_bounds):
    """4 warps: mma.sync of 16 · 8 · 16, ldmatrix of four and of one 8 × 8 matrices, cp.async of 16 bytes a thread."""
    loop = _loop(
        implied_bounds,
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "LDSM.16.M88.4 R8, [R1]",
        "LDSM.16.MT88 R12, [R2]",
        "LDGSTS.E.BYPASS.128 [R11], desc[UR16][R2.64], P1",
    )
    of = implied_bounds.work(loop, 4)
    assert of.operations == 4 * 2 * 16 * 8 * 16
    assert of.shared_bytes == 4 * (512 + 128 + 512)
    assert implied_bounds.cycles(of, implied_bounds.MACHINES["sm_80"])["matrix"] == 8.0


def test_a_loop_of_tensor_memory(implied_bounds):
    """One thread starts 128 · 64 · 16 for the whole block; the shape stands in a register."""
    loop = _loop(
        implied_bounds,
        "UMOV UR29, 0x8100490",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10], tmem[UR28], idesc[UR29], !UPT",
        "UTCHMMA tmem[UR4], gdesc[UR6], tmem[UR10], tmem[UR28], idesc[UR29], UPT",
    )
    of = implied_bounds.work(loop, 4)
    assert of.operations == 2 * (2 * 128 * 64 * 16)
    assert of.shared_bytes == 2 * (128 * 16 + 64 * 16 + 64 * 16)


def test_unknown_shapes_are_no_guess(implied_bounds):
    loop = _loop(implied_bounds, "HMMA.1234.F32 R4, R8, R12, R4")
    with pytest.raises(ValueError, match="a matrix instruction of unknown shape"):
        implied_bounds.work(loop, 4)


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "blocks"),
    [
        (255, 8, 1 << 10, 1),  # 256 · 256 registers are all
        (128, 8, 1 << 10, 2),
        (121, 8, 1 << 10, 2),  # rounded up to 128
        (64, 4, 100 << 10, 2),  # 228 KiB, of which each takes 101
        (32, 16, 0, 4),  # 64 warps
        (16, 1, 0, 32),
    ],
)
def test_blocks_per_multiprocessor(implied_bounds, registers, num_warps, shared, blocks):
    assert implied_bounds.blocks_per_multiprocessor("sm_90", registers, num_warps, shared) == blocks


def test_against_the_goals(implied_bounds):
    """Forward its share of the peak; backward 5 useful products of the 7 that both kernels compute."""
    of = {"target": "sm_90", "head_dim": 128, "mass": False}
    rows = [
        {**of, "kernel": "_mass_attn_fwd_kernel", "shares": {"overlap": 0.5, "serial": 0.25}},
        {**of, "kernel": "_mass_attn_bwd_kv_kernel", "shares": {"overlap": 0.5, "serial": 0.25}},
        {**of, "kernel": "_mass_attn_bwd_q_kernel", "shares": {"overlap": 0.75, "serial": 0.25}},
    ]
    assert implied_bounds.backward_share(rows[1:], "overlap") == pytest.approx(5 / (4 / 0.5 + 3 / 0.75))
    forward, backward = implied_bounds.against_goals(rows)
    assert "forward 247 (serial) to 495 (overlap) TFLOP/s predicted" in forward
    assert "≥ 450 TFLOP/s" in forward
    assert "≥ 350 TFLOP/s" in backward
