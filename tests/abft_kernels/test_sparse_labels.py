"""Labelled keys last: the results of the form for sparse labels, whatever the labels."""

import pytest
from harness import check
from kernel_cases import FUSED, Case

_CASES = [
    pytest.param(case, id=f"{feature}:{case}")
    for feature, cases in FUSED.items()
    for case in cases
    if "weighted" not in case and feature != "decoding"
]


@pytest.mark.parametrize("case", _CASES)
def test_every_feature(case, device):
    check(Case.parse(f"{case}-sparse"), device, "triton")
