"""Main loops and spills, read from lines of machine code written by hand."""

import importlib
import os

import pytest


@pytest.fixture(scope="module")
def machine_code():
    """The module, which needs no interpreter; importing its neighbours would turn it off."""
    interpreted = os.environ.get("TRITON_INTERPRET")
    module = importlib.import_module("bench.compile.machine_code")
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    return module


SASS = """
.L_x_0:
        /*0010*/                   MOV R1, R2 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   MUFU.EX2 R1, R1 ;
.L_x_2:
        /*0060*/                   LDS R1, [R2] ;
        /*0070*/                   STL [R1], R3 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   LDL R1, [R3] ;
"""
AMDGCN = """
.LBB0_1:
\tv_mov_b32_e32 v1, v2
.LBB0_2:
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_execz .LBB0_2
\tv_exp_f32_e32 v1, v1
\tscratch_load_dword v1, off, off offset:4 ; 4-byte Folded Reload
\ts_branch .LBB0_2
\ts_cbranch_scc1 .LBB0_1
"""


def test_innermost_loops_of_sass(machine_code):
    (loop,) = machine_code.main_loops(SASS)
    assert loop.kinds() == {
        "instructions": 7, "skipped": 2, "matrix": 1, "special": 1, "float": 1, "shared": 1, "global": 0,
    }  # fmt: skip
    assert loop.opcodes["STL"] == 1


def test_jumps_back_to_one_place_are_one_loop(machine_code):
    (loop,) = machine_code.main_loops(AMDGCN)
    assert loop.kinds() == {
        "instructions": 5, "skipped": 0, "matrix": 1, "special": 1, "float": 0, "shared": 0, "global": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("segment", "stack"), [(0, 0), (24, 24)])
def test_figures_of_amdgcn(machine_code, segment, stack):
    class Compiled:
        asm = {  # noqa: RUF012
            "amdgcn": AMDGCN
            + f"""
  - .agpr_count:     16
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: {segment}
    .sgpr_count:     106
    .sgpr_spill_count: 3
    .vgpr_count:     80
    .vgpr_spill_count: 6
"""
        }

        class metadata:
            shared = 8192

    figures, loops = machine_code.report(Compiled)
    assert len(loops) == 1
    assert figures == {
        "registers": 80, "stack": stack, "shared": 8192, "scalar": 106, "scalar_spills": 3, "spills": 1,
        "loop_spills": 1, "matrix": 1,
    }  # fmt: skip
