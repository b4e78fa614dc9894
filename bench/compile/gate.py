"""The compilations that calls of a user can make: all of them, and a sample for CI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle

from bench.compile.launches import OPERATORS, Case, gpu_target

__all__ = ["gate_cases", "sample"]

# The forms of each operator, of `bench.compile.launches.FORMS`.
_FORMS = {
    "fused": ("full", "off", "lean", "ones", "mass", "narrow", "noncausal", "packed", "gemma", "oss", "chunk", "alibi",
              "weights", "dropout", "rows", "sparse", "packed sparse", "atomic"),
    "rows": ("full", "one", "ones", "narrow", "final", "many", "noncausal", "packed", "gemma", "oss", "chunk", "alibi",
             "weights"),
    "decode": ("full", "one", "off", "narrow", "ones", "noncausal", "gemma", "oss", "chunk", "alibi", "weights"),
}  # fmt: skip
_SPOTS = ("full", "off", "weights")  # of float32; of float16 the first


def _groups_and_forms(operator: str, dtype: str) -> list[tuple[int, str]]:
    """Return the groups and forms of an operator, 16 groups in some."""
    if dtype == "fp16":
        return [(2, "full")]
    if dtype == "fp32":
        return [*((2, form) for form in _SPOTS if form in _FORMS[operator]), (16, "full")]
    return [*((2, form) for form in _FORMS[operator]), (16, "full"), (16, "weights")]


def gate_cases(targets: Iterable[str], head_dims: Iterable[int], dtypes: Iterable[str]) -> list[Case]:
    """Return every distinct compilation: all forms in bfloat16, some in float32, one in float16.

    A call that no launch of the table serves is left out: the operators refuse it.
    """
    head_dims, dtypes = list(head_dims), list(dtypes)
    cases: dict[tuple[str, str], Case] = {}
    for target in targets:
        for dtype in dtypes:
            for head_dim in head_dims:
                for operator in OPERATORS:
                    for groups, form in _groups_and_forms(operator, dtype):
                        for key, case in _distinct(Case(operator, "", target, dtype, head_dim, groups, form)):
                            cases.setdefault((target, key), case)
    return list(cases.values())


def sample(targets: Iterable[str]) -> list[Case]:
    """Return compilations that meet each target, and each form, with each kernel at least once.

    Head_dims and element types take turns; a turn that the operator refuses goes to bfloat16 at head_dim 64.
    """
    targets, cases = list(targets), []
    for operator in OPERATORS:
        forms = _groups_and_forms(operator, "bf16")
        dtypes = cycle(("bf16", "bf16", "bf16", "fp32", "bf16", "fp16"))
        turns = zip(range(max(len(targets), len(forms))), cycle(targets), cycle(forms), cycle((64, 128)), dtypes)
        for _, target, (groups, form), head_dim, dtype in turns:
            case = Case(operator, "", target, dtype, head_dim, groups, form)
            found = [one for _, one in _distinct(case)]
            plain = case._replace(dtype="bf16", head_dim=64)
            cases += found or [one for _, one in _distinct(plain)]
    for head_dim in (64, 128):  # of the most common call: warpgroup instructions
        cases += [one for _, one in _distinct(Case("fused", "", "sm_90", "bf16", head_dim, 2, "full"))]
    return cases


def _distinct(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the launches of an operator, each with what its compilation depends on."""
    try:
        launches = case.launches()
    except NotImplementedError:
        return
    target = gpu_target(case.target)
    seen: dict[str, int] = {}
    for one in launches:
        source, options = one.source(target)
        nth = seen.setdefault(one.name, 0)
        seen[one.name] += 1
        yield f"{source.hash()} {options}", case._replace(kernel=one.name, nth=nth)
