"""Labelled keys last: the form for sparse labels has the results of the oracle, whatever the labels."""

import pytest
import torch
from harness import assert_close, check, make_inputs, natural_size, run
from kernel_cases import Case
from test_saturation import _error, _gradients, _saturated

from abft_kernels import mass_attention, mass_attention_reference
from abft_kernels.call import Call
from abft_kernels.triton.labelled import index_labels

# Labels as dense as in the table of features: some tiles of labelled keys are full, and some lie in two sequences.
CASES = [
    "B2-H2:1-N60-D32-G2-bf16-causal-left-oml",
    "B1-H2-N40x70-D16-G3-fp32-full-V24-om",
    "B4-H2:1-N70-D16-G2-fp32-causal-packed-w30-oml",
    "B3-H1-N50-D16-G2-fp32-full-packed-m",
    "B2-H1-N40x60-D16-G2-fp32-causal-w20-left-sinks-alibi-wanted-drop-c3.0-oml",
    "B1-H2:1-N70-D16-G2-fp32-causal-k24-oml",
    "B2-H2-N70x40-D16-G2-fp32-causal-shard-alibi-oml",
    "B2-H2:1-N50-D16-G16-fp32-causal-empty-alone-ml",
]


@pytest.mark.parametrize("case", CASES)
def test_every_feature(case, device):
    check(Case.parse(f"{case}-sparse"), device, "triton")


@pytest.mark.parametrize("labels", ["none", "one", "all", "few"])
@pytest.mark.parametrize("shape", ["B2-H1-N50-D16-G2-fp32-causal-left-oml", "B3-H1-N50-D16-G2-fp32-causal-packed-oml"])
def test_number_of_labels(shape, labels, device):
    case = Case.parse(f"{shape}-sparse")
    inputs = make_inputs(case, device)
    groups, places = inputs.groups.zero_(), torch.arange(50, device=device)
    if labels != "all":
        labelled = {"none": places < 0, "one": places == 41, "few": places % 23 == 7}[labels]
        groups.masked_fill_(~labelled, -1)
    ours, again = run(case, inputs, "triton"), run(case, inputs, "triton")
    base, oracle = (run(case, inputs, "reference", dtype) for dtype in (None, torch.float64))
    for name, value in oracle.items():
        assert torch.equal(ours[name], again[name]), f"{name}: other bits the second time"
        assert_close(name, ours[name], base[name], value, natural_size(case, inputs))


@pytest.mark.parametrize("target", [0.98, 0.999])
def test_gradient_of_saturated_heads(target, device):
    """The bounds of `test_saturation`."""
    q, k, groups = _saturated(target, device)
    mean, dq, dk = _gradients(mass_attention_reference, q, k, groups, torch.float64)
    ours_mean, ours_dq, ours_dk = _gradients(mass_attention, q, k, groups, backend="triton", sparse_labels=True)
    assert abs(ours_mean - mean) < 1e-5
    assert _error(ours_dq, dq) < 0.01
    assert _error(ours_dk, dk) < 0.01


@pytest.mark.parametrize("n_k", [1, 16, 1023, 1024, 2100])
def test_index(n_k, device):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(-2, 4, (2, n_k), generator=generator).to(device, torch.int8)  # 2 and 3 are no groups
    _, before, positions = index_labels(Call(groups=groups), 2)
    for sample in range(2):
        expected = ((groups[sample] >= 0) & (groups[sample] < 2)).nonzero()[:, 0].int()
        number = len(expected)
        assert torch.equal(positions[sample, :number], expected)
        assert (positions[sample, number : number + 16] == n_k).all()
        borders = 16 * torch.arange(before.shape[1], device=device)
        assert torch.equal(before[sample], torch.searchsorted(expected, borders.int()).int())


def test_weights_are_refused(device):
    x = torch.zeros(1, 1, 4, 16, device=device)
    with pytest.raises(ValueError, match="integer key_groups"):
        mass_attention(x, x, x, torch.ones(1, 4, 2, device=device), 2, sparse_labels=True)
