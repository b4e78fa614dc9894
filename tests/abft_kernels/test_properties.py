"""Shapes, layouts, lengths, dtypes and features that no table names.

The profile `ci` draws 50 cases for each test, 200 in all; `--hypothesis-profile nightly` (`make nightly`) 500 each.
"""

from harness import check
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Case, allowed, drawn

_SHARED = ("sinks", "alibi", "weighted")


_FUSED = (*_SHARED, "packed", "drop", "wanted", "shard", "alone", "sparse")
_ROWS = (*_SHARED, "packed", "shard")


@given(case=drawn(150, _FUSED), seed=st.integers(0, 1000))
def test_torch(case, seed, device):
    check(allowed(case), device, "torch", seed)


@given(case=drawn(150, _ROWS), rows=st.integers(1, 20), seed=st.integers(0, 1000))
def test_torch_rows(case, rows, seed, device):
    check(allowed(Case(**{**vars(case), "rows": rows})), device, "torch", seed)


@given(case=drawn(40, _FUSED), seed=st.integers(0, 1000))
def test_triton(case, seed, device):
    check(allowed(case), device, "triton", seed)


@given(case=drawn(90, _ROWS), rows=st.integers(1, 8), seed=st.integers(0, 1000))
def test_triton_rows(case, rows, seed, device):
    check(allowed(Case(**{**vars(case), "rows": rows})), device, "triton", seed)
