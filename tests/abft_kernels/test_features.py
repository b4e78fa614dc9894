"""Every feature × forward and each gradient, in the fused op, the mass-only op and the row op, on every backend.

`docs/attention-mass.md` holds the table of features; this is its proof. Each case is checked for out, mass, lse and the
gradients of q, k, v, sinks and weights against the float64 oracle.
"""

import pytest
from harness import check
from kernel_cases import BORDERS, FUSED, ROWS, Case


def _cases(table: dict[str, list[str]]) -> list:
    return [pytest.param(case, id=f"{feature}:{case}") for feature, cases in table.items() for case in cases]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", _cases(FUSED))
def test_fused(case, backend, device):
    check(Case.parse(case), device, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", _cases(ROWS))
def test_rows(case, backend, device):
    check(Case.parse(case), device, backend)


@pytest.mark.parametrize("case", BORDERS)
def test_limits_that_end_at_a_border_of_tiles(case, device):
    """Each kernel's bounds, one off at a time."""
    check(Case.parse(case), device, "triton")
