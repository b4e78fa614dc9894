"""The memory claim at a length that a test can afford."""

from pathlib import Path

import pytest

from bench.cases.memory import collect, in_process_of_its_own


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_memory_is_a_fraction_of_eager():
    """Twice the tokens in less than half of eager attention's memory; at 8,192 tokens each it is a twentieth."""
    eager, abft = (in_process_of_its_own("memory", *what)["bytes"] for what in (("eager", 2048), ("abft", 4096)))
    assert 0 < abft < eager / 2


def test_memory_rows(monkeypatch):
    """The rows, ratios and exponents of made-up measurements."""

    def made_up(module, method, length):
        return {"bytes": length**2 if method == "eager" else 8 * length, "seconds": length / 1000}

    monkeypatch.setattr("bench.cases.memory.in_process_of_its_own", made_up)
    found = collect((64, 128, 256), repeats=2, log=lambda line: None)
    assert len(found["rows"]) == 9
    assert found["ratios"][-1]["memory_abft_to_eager"] == 8 / 256
    assert found["time_exponent"]["abft"] == pytest.approx(1.0)
