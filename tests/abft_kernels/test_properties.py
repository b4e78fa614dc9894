"""Shapes, layouts, lengths, dtypes and features that no table names.

The profile `ci` draws 50 cases for each test, 200 in all; `--hypothesis-profile nightly` (`make nightly`) 500 each.
"""

from harness import Case, check
from hypothesis import given
from hypothesis import strategies as st

_SHARED = ("sinks", "alibi", "weighted")


def _cases(most: int, features: tuple[str, ...]):
    return st.builds(
        lambda kv_heads, group, **rest: Case(heads=kv_heads * group, kv_heads=kv_heads, **rest),
        batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), n_q=st.integers(1, most),
        n_k=st.integers(1, most), head_dim=st.integers(1, 40), groups=st.integers(1, 16),
        dtype=st.sampled_from(["fp32", "bf16", "fp16"]), causal=st.booleans(),
        padding=st.sampled_from([None, "left", "right", "empty"]), grads=st.sampled_from(["oml", "m", "Ol"]),
        layout=st.sampled_from(["bhnd", "bnhd", "sliced", "strided", "expanded"]),
        window=st.none() | st.integers(1, most), softcap=st.none() | st.floats(0.5, 30.0),
        value_dim=st.none() | st.integers(1, 40), features=st.frozensets(st.sampled_from(features), max_size=4),
    )  # fmt: skip


def _allowed(case: Case) -> Case:
    """The case without what excludes the rest of it."""
    changes: dict = {}
    if not case.causal:
        changes["window"] = None
    if case.has("packed"):
        changes |= {"padding": None, "features": case.features - {"shard"}, "n_q": case.n_k}
    elif case.padding and not case.causal and not case.rows and not case.has("shard"):
        changes["n_q"] = case.n_k
    if case.rows or case.has("alone"):
        changes |= {"value_dim": None, "grads": "ml"}
        changes["features"] = changes.get("features", case.features) - {"drop", "wanted"}
    return Case(**{**vars(case), **changes})


_FUSED = (*_SHARED, "packed", "drop", "wanted", "shard", "alone")
_ROWS = (*_SHARED, "packed", "shard")


@given(case=_cases(150, _FUSED), seed=st.integers(0, 1000))
def test_torch(case, seed, device):
    check(_allowed(case), device, "torch", seed)


@given(case=_cases(150, _ROWS), rows=st.integers(1, 20), seed=st.integers(0, 1000))
def test_torch_rows(case, rows, seed, device):
    check(_allowed(Case(**{**vars(case), "rows": rows})), device, "torch", seed)


@given(case=_cases(40, _FUSED), seed=st.integers(0, 1000))
def test_triton(case, seed, device):
    check(_allowed(case), device, "triton", seed)


@given(case=_cases(90, _ROWS), rows=st.integers(1, 8), seed=st.integers(0, 1000))
def test_triton_rows(case, rows, seed, device):
    check(_allowed(Case(**{**vars(case), "rows": rows})), device, "triton", seed)
