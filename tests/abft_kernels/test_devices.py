"""Every operator runs with its tensors' device current, and every launch names its options."""

import contextlib

import pytest
import torch
import triton
from kernel_launches import record_launches

from abft_kernels import mass_attention, ops, row_mass


@pytest.fixture
def current_devices(monkeypatch):
    """The devices that were current, in order: PyTorch built without CUDA cannot change them."""
    seen = [0]

    def exchange(index):
        before = seen[-1]
        seen.append(index)
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return seen


def test_a_kernel_runs_with_its_device_current_and_gives_the_other_back(current_devices):
    def kernel(x):
        return (current_devices[-1], x)

    assert ops._run(torch.device("cuda:1"), kernel, 5) == (1, 5)
    assert current_devices == [0, 1, 0]
    with contextlib.suppress(ZeroDivisionError):
        ops._run(torch.device("cuda:1"), lambda: 1 // 0)
    assert current_devices[-1] == 0


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_all_operators_go_that_way(device, backend, monkeypatch):
    seen = []

    def run(of, kernel, *arguments):
        seen.append((of, kernel.__name__))
        return tuple(kernel(*arguments))

    monkeypatch.setattr(ops, "_run", run)
    q, k, v = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))
    groups = torch.randint(-1, 2, (1, 20), device=device)
    last = torch.full((1, 1), 19, device=device)
    _, mass = mass_attention(q, k, v, groups, 2, backend=backend, dropout_p=0.1, dropout_seed=1)
    rows = row_mass(q[:, :, -1:], k, groups, 2, row_positions=last, backend=backend)
    (mass.sum() + rows.sum()).backward()
    assert {of for of, _ in seen} == {q.device}
    assert sorted(name.removeprefix("row_") for _, name in seen) == ["backward", "backward", "forward", "forward"]


def _packed_step(device, lengths, seed):
    """A forward and backward pass of packed sequences, with dropout, all rows and a row of each."""
    total = sum(lengths)
    q, k, v = (torch.randn(1, 4, total, 16, device=device, requires_grad=True) for _ in range(3))
    groups = torch.randint(-1, 2, (1, total), device=device)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    options = {"cu_seqlens": bounds, "backend": "triton"}
    _, mass = mass_attention(q, k, v, groups, 2, dropout_p=0.1, dropout_seed=seed, **options)
    last = (bounds[1:] - bounds[:-1] - 1)[:, None]
    rows = row_mass(
        q.new_zeros(len(lengths), 4, 1, 16, requires_grad=True), k, groups, 2, row_positions=last, **options
    )
    (mass.sum() + rows.sum()).backward()
    few = mass_attention(q[:, :, -1:], k, v, groups, 2, backend="triton")
    return few, mass, rows


def test_fused_multiply_add_is_named_in_every_launch(device, monkeypatch):
    """The compiler's default is off from Triton 3.10 on; what is compiled ahead of time has it on."""
    launches = record_launches(monkeypatch)
    _packed_step(device, [150, 120], seed=3)
    assert len({launch.kernel for launch in launches}) >= 6
    assert all(launch.options.get("enable_fp_fusion") is True for launch in launches)
    assert all(launch.options["num_warps"] >= 1 for launch in launches)


def test_lengths_and_seeds_compile_nothing_anew(device, monkeypatch):
    """Lengths that are odd, multiples of 16 and 1, numbers of sequences, and seeds of 32 and 64 bits."""
    launches = record_launches(monkeypatch)
    for lengths, seed in [
        ([150, 121], 3),
        ([160, 160, 128], 1),
        ([1, 300], 1 << 40),
        ([256, 16], 16),
        ([300], 1 << 33),
    ]:
        _packed_step(device, lengths, seed)
    compilations = {}
    for launch in launches:
        compilations.setdefault(launch.kernel, set()).add(launch.specialization())
    # The row kernel has a form for decoding with values, one for rows, and splits or not; the others have one form.
    most = {"_row_mass_fwd_kernel": 4, "row_mass_combine_kernel": 2, "_row_mass_bwd_kernel": 2}
    surplus = {name: len(found) for name, found in compilations.items() if len(found) > most.get(name, 1)}
    assert not surplus, {name: compilations[name] for name in surplus}
    assert len(compilations) >= 6


def test_the_recorder_sees_a_specialization(device, monkeypatch):
    """Head dimensions are compiled for: the counter above is no constant."""
    launches = record_launches(monkeypatch)
    for head_dim in (16, 32):
        q = torch.randn(1, 2, 20, head_dim, device=device)
        mass_attention(q, q, q, torch.zeros(1, 20, dtype=torch.int8, device=device), 1, backend="triton")
    assert len({launch.specialization() for launch in launches if "fwd" in launch.kernel}) == 2
    assert triton.__version__
