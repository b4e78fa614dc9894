"""The memory claim at a length that a test can afford."""

import json
from pathlib import Path

import pytest

from bench.cases.memory import collect
from bench.cases.own_process import in_own_process

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_memory_is_a_fraction_of_eager():
    """Twice the tokens take less than half of eager attention's memory; at 8,192 tokens each, a twentieth."""
    eager, abft = (in_own_process("memory", *size)["bytes"] for size in (("eager", 2048), ("abft", 4096)))
    assert 0 < abft < eager / 2


def test_memory_rows():
    """Rows, ratios and exponents follow from made-up measurements."""

    def made_up(method, length):
        return {"bytes": length**2 if method == "eager" else 8 * length, "seconds": length / 1000}

    found = collect((64, 128, 256), repeats=2, log=lambda line: None, measured=made_up)
    assert len(found["rows"]) == 9
    committed = json.loads((ROOT / "bench" / "results" / "cpu_memory.json").read_text())
    assert [found["ratios"][0].keys(), found.keys()] == [
        committed["ratios"][0].keys(),
        committed.keys() - {"provenance"},
    ]
    assert found["ratios"][-1]["memory_abft_to_eager"] == 8 / 256
    assert found["time_exponent"]["abft"] == pytest.approx(1.0)
