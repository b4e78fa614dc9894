"""Shapes, layouts, lengths and dtypes that no table names."""

from harness import Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _cases(most: int):
    return st.builds(
        lambda kv_heads, group, **rest: Case(heads=kv_heads * group, kv_heads=kv_heads, **rest),
        batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), n_q=st.integers(1, most),
        n_k=st.integers(1, most), head_dim=st.integers(1, 40), groups=st.integers(1, 8),
        dtype=st.sampled_from(["fp32", "bf16", "fp16"]), causal=st.booleans(),
        padding=st.sampled_from([None, "left", "right", "empty"]), grads=st.sampled_from(["oml", "m", "Ol"]),
        layout=st.sampled_from(["bhnd", "bnhd", "sliced", "strided", "expanded"]),
    )  # fmt: skip


def _allowed(case: Case) -> Case:
    if case.padding and not case.causal and not case.rows:
        return Case(**{**vars(case), "n_q": case.n_k})
    return case


@settings(max_examples=60, deadline=None, suppress_health_check=_RELAXED, derandomize=True)
@given(case=_cases(150), seed=st.integers(0, 1000))
def test_torch(case, seed, device):
    check(_allowed(case), device, "torch", seed)


@settings(max_examples=40, deadline=None, suppress_health_check=_RELAXED, derandomize=True)
@given(case=_cases(150), rows=st.integers(1, 20), seed=st.integers(0, 1000))
def test_torch_rows(case, rows, seed, device):
    check(Case(**{**vars(case), "rows": rows, "grads": "ml"}), device, "torch", seed)


@settings(max_examples=8, deadline=None, suppress_health_check=_RELAXED, derandomize=True)
@given(case=_cases(40), seed=st.integers(0, 1000))
def test_triton(case, seed, device):
    check(_allowed(case), device, "triton", seed)


@settings(max_examples=10, deadline=None, suppress_health_check=_RELAXED, derandomize=True)
@given(case=_cases(90), rows=st.integers(1, 8), seed=st.integers(0, 1000))
def test_triton_rows(case, rows, seed, device):
    check(Case(**{**vars(case), "rows": rows, "grads": "ml"}), device, "triton", seed)
