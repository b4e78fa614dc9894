"""The forms of the fused kernels that a launch or a caller chooses: descriptors, specialized warps, dQ by atomics.

The interpreter runs descriptors, and takes a specialized loop as an ordinary one: its arithmetic is tested here, its
warps are not. No entry of the launch table has these forms yet, so each test puts one there.
"""

import functools

import harness
import pytest
import torch
import triton
from harness import arrange, check
from kernel_cases import Case

from abft_kernels import mass_attention, row_mass
from abft_kernels.triton import backward, descriptors, forward
from abft_kernels.triton.launch import POINTERS, Forms, gpu_of, launch_config
from abft_kernels.triton.launch_table import TABLE, Entry, Launch

KERNELS = ("forward", "backward_kv", "backward_q", "backward_atomic")
FORMS = {
    "pointers": Launch(32, 16, 4, 2, masked_stages=2),
    "descriptors": Launch(32, 16, 4, 2, masked_stages=2, descriptors=True),
    "specialized": Launch(32, 16, 4, 2, masked_stages=2, descriptors=True, specialized=True),
}
# Packed, padded, windows, chunks, shards, soft cap, GQA, odd lengths, another head_dim of the values.
CASES = [
    "B3-H2:1-N47-D16-G2-fp32-causal-packed-oml",
    "B2-H2:1-N40x53-D16-G2-fp32-causal-w13-left-bnhd-oml",
    "B1-H2:1-N50-D16-G2-bf16-causal-k20-c2.5-oml",
    "B2-H2:1-N45-D64-V32-G2-bf16-causal-empty-sinks-oml",
    "B1-H1-N41-D32-G3-fp32-full-weighted-wanted-drop-alibi-oml",
    "B1-H2-N33x47-D16-G2-fp32-causal-shard-left-alone-ml",
]
# Strides and widths that no descriptor takes: a base off 16 bytes, last stride 2, one head for all, columns to pad.
REFUSED = [
    "B1-H2-N35-D16-G2-fp32-causal-sliced-oml",
    "B1-H2-N35-D16-G2-fp32-causal-strided-oml",
    "B1-H2-N35-D16-G2-fp32-causal-expanded-oml",
    "B1-H2-N35-D24-G2-fp32-causal-oml",
    "B1-H1-N35-D16-V20-G2-bf16-causal-packed-oml",
]
NEEDS_TMA = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs an NVIDIA GPU from sm_90 on",
)


@pytest.fixture
def use(monkeypatch, device):
    """Return a function that makes one form the only launch of the fused kernels."""

    def put(form: str) -> None:
        for kernel in KERNELS:
            # Only the forward has specialized warps.
            launch = FORMS[form]._replace(specialized=FORMS[form].specialized and kernel == "forward")
            for size in (2, 4):
                monkeypatch.setitem(TABLE, (kernel, size, gpu_of(device).family), [Entry(512, 16, launch, 0)])

    return put


@pytest.fixture
def seen(monkeypatch):
    """Return the features of the launches of the forward and backward kernels."""
    found = []
    for module in (forward, backward):

        def recorded(*arguments, of=module.features, **others):
            found.append(of(*arguments, **others))
            return found[-1]

        monkeypatch.setattr(module, "features", recorded)
    return found


@pytest.fixture
def any_order(monkeypatch):
    """Run the harness with `deterministic=False`, and fail if the kernel of dQ is launched."""
    torch.use_deterministic_algorithms(False)
    for op in (mass_attention, row_mass):
        monkeypatch.setattr(harness, op.__name__, functools.partial(op, deterministic=False))
    monkeypatch.setattr(backward, "_mass_attn_bwd_q_kernel", None)


@NEEDS_TMA
@pytest.mark.parametrize("form", ["descriptors", "specialized"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case, form, use, seen, device):
    use(form)
    check(Case.parse(case), device, "triton")
    assert all(of.descriptors for of in seen)
    assert any(of.specialized for of in seen) == (form == "specialized")


@pytest.mark.parametrize("case", REFUSED)
def test_falls_back_to_pointers(case, use, seen, device):
    use("specialized")
    check(Case.parse(case), device, "triton")
    assert seen
    assert not any(of.descriptors or of.specialized for of in seen)


@NEEDS_TMA
@pytest.mark.parametrize("form", ["descriptors", "specialized"])
def test_padding_has_no_effect(form, use, device):
    """NaN before, between and after the sequences, in q, k, v and the gradient of out, changes no bit."""
    use(form)
    arguments = {"seq_starts": torch.tensor([11, 3], device=device), "seq_lens": torch.tensor([30, 25], device=device)}
    positions = torch.arange(43, device=device)
    starts, ends = arguments["seq_starts"], arguments["seq_starts"] + arguments["seq_lens"]
    padding = ((positions < starts[:, None]) | (positions >= ends[:, None]))[:, None, :, None]
    groups = positions.expand(2, -1) % 3 - 1
    torch.manual_seed(0)
    heads = [torch.randn(2, count, 43, 16, device=device) for count in (2, 1, 1, 2)]
    found = []
    for fill in (0.0, float("nan")):
        *inputs, do = (x.masked_fill(padding, fill) for x in heads)
        inputs = [x.requires_grad_() for x in inputs]
        out, mass = mass_attention(*inputs, groups, 2, backend="triton", **arguments)
        found.append((out, mass, *torch.autograd.grad((out, mass), inputs, (do, torch.ones_like(mass)))))
    for zeros, nans in zip(*found, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize(
    ("layout", "head_dim", "described"),
    [("bhnd", 16, True), ("bnhd", 64, True), ("sliced", 16, False), ("strided", 16, False), ("expanded", 16, False),
     ("bhnd", 24, False), ("bhnd", 8, False)],
)  # fmt: skip
def test_strides_of_descriptors(layout, head_dim, described):
    x = arrange(torch.zeros(2, 2, 5, head_dim, dtype=torch.bfloat16), layout)
    assert descriptors._can_be_described(x) is described


def test_choice_of_a_form(monkeypatch, device):
    """A call takes the first entry whose form it can take; if there is none, the first one without that form."""
    of_table, plain = (64, 2, 2, device), Launch(128, 64, 8, 3)
    for form in (FORMS["descriptors"], FORMS["specialized"]):
        entries = [Entry(128, 16, form, 0), Entry(128, 16, plain, 0)]
        monkeypatch.setitem(TABLE, ("forward", 2, gpu_of(device).family), entries)
        assert launch_config("forward", *of_table, Forms(descriptors=True, specialized=True)) == form
        assert launch_config("forward", *of_table) == plain
        del entries[1]
        assert launch_config("forward", *of_table, POINTERS) == FORMS["pointers"]


def test_no_form_is_chosen_before_it_is_measured():
    assert not [entry for entries in TABLE.values() for entry in entries if entry.launch.specialized]


@pytest.mark.skipif(triton.__version__.startswith("3.4."), reason="Triton 3.4 has one allocator for the process")
def test_memory_of_descriptors_leaves_the_allocator_alone(monkeypatch):
    from triton.runtime import _allocation

    monkeypatch.setattr(descriptors, "INTERPRETED", False)
    before = _allocation._allocator.get()
    run = descriptors.with_scratch(
        lambda size: _allocation._allocator.get()(size, 128, None), FORMS["descriptors"], "cpu"
    )
    assert run(256).nbytes == 256
    assert _allocation._allocator.get() is before


@pytest.mark.parametrize("form", ["pointers", pytest.param("descriptors", marks=NEEDS_TMA)])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[5]])
def test_atomics_equal_the_oracle(case, form, use, seen, any_order, device):
    use(form)
    check(Case.parse(case), device, "triton")
    assert all(of.descriptors is (form == "descriptors") for of in seen)


def _gradients(device, **arguments) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 41, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]
    groups = torch.arange(41, device=device)[None] % 3 - 1
    out, mass = mass_attention(*inputs, groups, 2, backend="triton", **arguments)
    return list(torch.autograd.grad((out, mass), inputs, (torch.ones_like(out), torch.ones_like(mass))))


def test_default_is_repeatable(device):
    torch.use_deterministic_algorithms(False)
    first, second = _gradients(device), _gradients(device)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_only_dq_changes_with_atomics(device):
    torch.use_deterministic_algorithms(False)
    (dq, *others), (summed, *same) = _gradients(device), _gradients(device, deterministic=False)
    torch.testing.assert_close(summed, dq, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(others, same, strict=True))


def test_pytorch_can_force_the_deterministic_form(device, seen):
    """As every test, this one runs under `torch.use_deterministic_algorithms(True)`."""
    expected = _gradients(device)
    assert all(torch.equal(x, y) for x, y in zip(expected, _gradients(device, deterministic=False), strict=True))
    assert not any(of.atomic_dq for of in seen)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_effect_in_other_backends(backend, device):
    q = torch.randn(1, 2, 9, 8, device=device)
    groups = torch.zeros(1, 9, dtype=torch.int64, device=device)
    for deterministic in (True, False):
        mass = row_mass(q, q, groups, 1, backend=backend, deterministic=deterministic)
        torch.testing.assert_close(mass, torch.ones_like(mass))
