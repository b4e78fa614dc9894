"""Inputs at the edge: rows without a key, NaN in the padding, outliers, huge scores; and the same bits every time."""

import pytest
import torch
from harness import Case, assert_close, make_inputs, natural_size, run

BACKENDS = ["triton", "torch"]
FUSED = "B2-H2:1-N80-D32-G2-{}-causal-{}-oml"
ROWS = "B2-H4:2-R4-N80-D32-G2-{}-causal-{}-ml"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("shape", [FUSED, ROWS])
def test_padding_is_never_read(shape, padding, backend, device):
    """NaN in the padding, and in the gradients that come in for it, changes not one bit."""
    case = Case.parse(shape.format("bf16", padding))
    inputs = make_inputs(case, device)
    clean = run(case, inputs, backend)
    starts = inputs.arguments.get("seq_starts", torch.zeros(2, dtype=torch.int64, device=device))
    ends = starts + inputs.arguments["seq_lens"]
    places = torch.arange(80, device=device)
    padded = (places < starts[:, None]) | (places >= ends[:, None])
    absent = padded
    if case.rows:
        positions = inputs.arguments["row_positions"]
        absent = (positions < starts[:, None]) | (positions >= ends[:, None])
    assert absent.any()
    for name, x in inputs.heads.items():
        x.masked_fill_((absent if name == "q" else padded)[:, None, :, None], float("nan"))
    for name, g in inputs.grads.items():
        g.masked_fill_(absent[:, None, :, None] if name != "lse" else absent[:, None], float("nan"))
    poisoned = run(case, inputs, backend)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    hidden = absent[:, None, :, None]
    assert not poisoned["mass"].masked_select(hidden).any()
    assert poisoned["lse"].masked_select(absent[:, None]).eq(float("-inf")).all()
    assert not poisoned["dq"].masked_select(hidden).any()
    assert not poisoned["dk"].masked_select(padded.view(2, 1, 80, 1)).any()
    if not case.rows:
        assert not poisoned["out"].masked_select(hidden).any()
        assert not poisoned["dv"].masked_select(padded.view(2, 1, 80, 1)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_has_a_key(backend, device):
    for case in (Case.parse(FUSED.format("fp32", "empty")), Case.parse(ROWS.format("fp32", "empty"))):
        inputs = make_inputs(case, device)
        inputs.arguments["seq_lens"].zero_()
        found = run(case, inputs, backend)
        assert found.pop("lse").eq(float("-inf")).all()
        for name, value in found.items():
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_present_row_shows(backend, device):
    """Only the padding is silenced: a NaN in the input reaches the outputs and the gradients."""
    for case in (Case.parse(FUSED.format("fp32", "left")), Case.parse(ROWS.format("fp32", "left"))):
        inputs = make_inputs(case, device)
        inputs.heads["q"][0, 0, -1] = float("nan")  # the last row is always present
        found = run(case, inputs, backend)
        assert found["mass"][0, 0, -1].isnan().all()
        assert found["lse"][0, 0, -1].isnan()
        assert found["dq"][0, 0, -1].isnan().all()
        assert found["dk"][0, 0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [FUSED, ROWS])
def test_outliers(shape, dtype, backend, device):
    """N(0, 1) + N(0, 100)·Bernoulli(0.001), as activations are."""
    case = Case.parse(shape.format(dtype, "left"))
    inputs = make_inputs(case, device)
    generator = torch.Generator().manual_seed(1)
    for name, x in inputs.heads.items():
        outlier = torch.randn(x.shape, generator=generator) * 10
        outlier *= torch.rand(x.shape, generator=generator) < 0.001
        inputs.heads[name] = x + outlier.to(x)
    ours, base = run(case, inputs, backend), run(case, inputs, "reference")
    oracle = run(case, inputs, "reference", torch.float64)
    for name, value in oracle.items():
        assert_close(name, ours[name], base[name], value, natural_size(case, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [FUSED, ROWS])
def test_huge_scores(shape, backend, device):
    """Scores of 1e4, positive and negative: no overflow, and the softmax is one key's."""
    case = Case.parse(shape.format("fp32", "left"))
    inputs = make_inputs(case, device)
    inputs.heads["q"] = inputs.heads["q"] * 1e3
    inputs.heads["k"] = inputs.heads["k"] * 1e1
    found, oracle = run(case, inputs, backend), run(case, inputs, "reference", torch.float64)
    assert oracle["lse"].abs().masked_fill(oracle["lse"].isinf(), 0).max() > 1e4
    for name, value in found.items():
        assert not value.isnan().any(), name
        assert torch.equal(value.isinf(), oracle[name].isinf()), name
    assert (found["mass"] - oracle["mass"]).abs().max() < 1e-2  # float32 scores of 1e4 are good to 1e-3
    finite = oracle["lse"].isfinite()
    torch.testing.assert_close(found["lse"].double()[finite], oracle["lse"][finite], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [FUSED, ROWS])
def test_same_bits_every_time(shape, backend, device):
    case = Case.parse(shape.format("bf16", "left"))
    inputs = make_inputs(case, device)
    first, second = run(case, inputs, backend), run(case, inputs, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_outside_the_range_counts_as_none(backend, device):
    """The ops' contract on a GPU, where values are not read back to be checked."""
    from abft_kernels import ops
    from abft_kernels.call import Call

    case = Case.parse("B1-H2-R3-N70-D16-G2-fp32-causal")
    inputs = make_inputs(case, device)
    groups = inputs.groups.to(torch.int8)
    outside = torch.where(groups < 0, torch.tensor(5, dtype=torch.int8, device=device), groups)
    rows = (inputs.heads["q"], inputs.heads["k"], inputs.arguments["row_positions"].to(torch.int32))
    call = Call(num_groups=2, scale=0.25)
    one, other = (ops.row_mass(*rows, call._replace(groups=x), backend)[0] for x in (outside, groups))
    assert torch.equal(one, other)
