"""The registration as PyTorch operators: schema, fake tensors, autograd, torch.compile, cost of absent gradients."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from harness import Case, make_inputs, run
from torch import library
from torch.utils.checkpoint import checkpoint

from abft_kernels import (
    attention,
    mass_attention,
    mass_attention_reference,
    ops,
    row_mass,
    row_mass_reference,
    validation,
)
from abft_kernels.call import Call, pack, unpack
from abft_kernels.masking import Reach

BACKENDS = ["triton", "torch"]
# The function that the backward operator calls.
TARGETS = {
    ("torch", "_ROWS"): ("abft_kernels.pytorch.passes", "row_backward"),
    ("torch", "_FUSED"): ("abft_kernels.pytorch.passes", "backward"),
    ("triton", "_ROWS"): ("abft_kernels.triton.rows", "backward"),
    ("triton", "_FUSED"): ("abft_kernels.triton.backward", "backward"),
}


# As much as one case may have; alone: no values.
ROWS = ["B2-H2:1-R2-N40-D16-G2-fp32-causal-left", "B2-H2:1-R2-N40-D16-G2-fp32-causal-packed-w9-c2.0-sinks-weighted"]
FUSED = [
    "B2-H2:1-N40-D16-G2-fp32-causal-bnhd",
    "B2-H2:1-N40-D16-G2-fp32-causal-left",
    "B2-H2:1-N40-D16-V32-G2-fp32-causal-packed-w9-c2.0-sinks-alibi-drop-wanted-weighted",
    "B2-H2:1-N40-D16-G2-fp32-causal-alone",
]


def _arguments(name, device, backend):
    """Return the positional arguments of the operator for a case: three tensors, the packed call, the backend."""
    case = Case.parse(name)
    inputs = make_inputs(case, device)
    heads = [x.requires_grad_() for x in inputs.heads.values()]
    if case.has("alone"):
        heads.append(None)
    given = inputs.arguments
    starts, ends = None, None
    if "cu_seqlens" in given:
        starts, ends = (x.int().contiguous() for x in (given["cu_seqlens"][:-1], given["cu_seqlens"][1:]))
    elif "seq_lens" in given:
        starts = given["seq_starts"].int()
        ends = starts + given["seq_lens"].int()
    weights = inputs.extras.get("weights")
    slopes = given.get("alibi_slopes")
    call = Call(
        groups=None if weights is not None else inputs.groups,
        weights=None if weights is None else weights.requires_grad_(),
        sinks=inputs.extras["sinks"].requires_grad_() if "sinks" in inputs.extras else None,
        slopes=None if slopes is None else slopes.float().expand(heads[0].shape[0], -1).contiguous(),
        starts=starts,
        ends=ends,
        row_mask=given["row_mask"].to(torch.uint8) if "row_mask" in given else None,
        num_groups=2,
        scale=0.25,
        reach=Reach(**case.reach),
        softcap=case.softcap or 0.0,
        packed=case.has("packed"),
        dropout_p=given.get("dropout_p", 0.0),
        seed=given.get("dropout_seed", 0),
    )
    if case.rows:
        heads.append(inputs.arguments["row_positions"].int())
    return [*heads, *pack(call), backend]


def _detached(arguments):
    return [x.detach() if torch.is_tensor(x) else x for x in arguments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ROWS)
def test_opcheck_row_mass(case, backend, device):
    arguments = _arguments(case, device, backend)
    library.opcheck(ops.row_mass_op, arguments)
    plain = _detached(arguments)
    results = ops.row_mass_op(*plain)
    for incoming in ([torch.ones_like(x) for x in results], [None, torch.ones_like(results[1])]):
        library.opcheck(ops.row_mass_backward_op, (*incoming, *plain, *results, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FUSED)
def test_opcheck_mass_attention(case, backend, device):
    arguments = _arguments(case, device, backend)
    library.opcheck(ops.mass_attention_op, arguments)
    plain = _detached(arguments)
    results = ops.mass_attention_op(*plain)
    incoming = [torch.ones_like(x) for x in results]
    for chosen in (incoming, [None, incoming[1], None]):
        library.opcheck(ops.mass_attention_backward_op, (*chosen, *plain, *results, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [FUSED[0], FUSED[2]])
def test_opcheck_rows_beside_an_attention(case, backend, device):
    """The combined operator, and the row operator that reads all queries."""
    q, k, v, *packed, _ = _arguments(case, device, backend)
    call = unpack(packed)
    call = call._replace(whole=True, row_mask=None)
    sequences = len(q) if call.starts is None else len(call.starts)
    rows = torch.tensor([[1, 1], [39, -1]], device=device)[:sequences]
    if call.packed:
        rows = torch.stack([call.starts, call.ends - 1], 1).long()
    arguments = [q, k, v, rows, *pack(call), backend]
    alone = [q, k, rows, *pack(call), backend]
    library.opcheck(ops.row_mass_attention_op, arguments)
    library.opcheck(ops.row_mass_op, alone)
    plain = _detached(arguments)
    results = ops.row_mass_attention_op(*plain)
    incoming = [torch.ones_like(x) for x in results[:3]]
    for chosen in (incoming, [None, incoming[1], None], [incoming[0], None, None]):
        library.opcheck(ops.row_mass_attention_backward_op, (*chosen, *plain, *results, True))
    plain = _detached(alone)
    results = ops.row_mass_op(*plain)
    library.opcheck(ops.row_mass_backward_op, (*incoming[1:], *plain, *results, True))


@pytest.mark.parametrize(
    "case",
    [
        "B2-H4:2-N7x9-D4-V3-G2-fp64-causal-left-m",
        "B2-H2-N9-D4-G2-fp64-causal-packed-w3-c2.0-sinks-weighted-alibi-m",
        "B2-H2-N9-D4-G2-fp64-full-drop-weighted-wanted-m",
        "B2-H2-R3-N9-D4-G2-fp64-causal-sinks-weighted-w4-m",
        "B1-H2-N5x9-D4-G2-fp64-causal-shard-m",
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck_of_features(case, backend, device):
    """Finite differences in float64, of the oracle too: it must not only agree with itself."""
    case = Case.parse(case)
    inputs = make_inputs(case, device)
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs.heads.values(), *inputs.extras.values())]
    count = len(inputs.heads)
    op = row_mass if case.rows else mass_attention

    def function(*x):
        extras = dict(zip(inputs.extras, x[count:], strict=True))
        labels = extras.pop("weights", inputs.groups)
        return op(*x[:count], labels, case.groups, backend=backend, **extras, **inputs.arguments)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend, device):
    inputs = make_inputs(Case.parse("B2-H4:2-N7x9-D4-G2-fp64-causal-left"), device)
    heads = [x.requires_grad_() for x in inputs.heads.values()]
    kwargs = {**inputs.arguments, "backend": backend}
    # LSE is −inf on absent rows, where gradcheck would take differences of infinities.
    assert torch.autograd.gradcheck(lambda *x: mass_attention(*x, inputs.groups, 2, **kwargs), heads)
    inputs = make_inputs(Case.parse("B2-H4:2-R3-N9-D4-G2-fp64-causal"), device)
    inputs.arguments["row_positions"].clamp_(min=0)
    heads = [x.requires_grad_() for x in inputs.heads.values()]
    kwargs = {**inputs.arguments, "backend": backend, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: row_mass(*x, inputs.groups, 2, **kwargs), heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["B1-H2:1-N40-D16-G2-fp32-causal-{}", "B1-H2:1-R2-N40-D16-G2-fp32-causal-{}"])
def test_absent_gradients_cost_nothing(shape, backend, device, monkeypatch):
    """The backward op gets None for every result that the loss does not use, and v gets no gradient without dO."""
    seen = []
    for name in ("_ROWS", "_FUSED"):
        operator = getattr(ops, name)
        kernel = operator.kernels(backend)[1]

        def spy(*arguments, operator=operator, backward=kernel):
            seen.append([x is not None for x in arguments[: len(operator.results)]])
            return backward(*arguments)

        monkeypatch.setattr(".".join(TARGETS[backend, name]), spy)
    for grads, rows, fused in [("m", [True, False], [False, True, False]), ("l", [False, True], [False, False, True])]:
        case = Case.parse(shape.format(grads))
        found = run(case, make_inputs(case, device), backend)
        expected = rows if case.rows else fused
        assert seen == [expected]
        assert case.rows or found["dv"] is None
        seen.clear()


def test_no_gradient_at_all(device):
    """Without a use of the mass its op has no backward: None for q and k."""
    inputs = make_inputs(Case.parse("B1-H2-R2-N8-D16-G2-fp32-causal"), device)
    q, k = (x.requires_grad_() for x in inputs.heads.values())
    mass = row_mass(q, k, inputs.groups, 2, row_positions=inputs.arguments["row_positions"])
    assert torch.autograd.grad(q.sum() + 0 * mass.detach().sum(), (q, k), allow_unused=True)[1] is None


def _loss(backend):
    def fused(q, k, v, groups, positions, lengths, starts):
        out, mass, lse = mass_attention(
            q, k, v, groups, 2, seq_lens=lengths, seq_starts=starts, return_lse=True, backend=backend
        )
        rows = row_mass(q[:, :, -2:], k, groups, 2, row_positions=positions, backend=backend)
        lse = torch.where(lse > float("-inf"), lse, 0)
        return out.square().mean() + mass.square().mean() + lse.mean() + rows.square().mean()

    return fused


def _compiled_equals_eager(backend, compiler, device):
    inputs = make_inputs(Case.parse("B2-H2:1-N40-D16-G2-fp32-causal-left"), device)
    positions = torch.tensor([[38, 39], [39, -1]], device=device)
    rest = (inputs.groups, positions, inputs.arguments["seq_lens"], inputs.arguments["seq_starts"])
    found = []
    for compiled in (False, True):
        heads = [x.detach().clone().requires_grad_() for x in inputs.heads.values()]
        function = _loss(backend)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend=compiler)
        loss = function(*heads, *rest)
        found.append([loss, *torch.autograd.grad(loss, heads)])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, device):
    _compiled_equals_eager(backend, "aot_eager", device)


@pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="inductor needs g++")
def test_compile_inductor(device):
    _compiled_equals_eager("torch", "inductor", device)


def test_plain_attention(device):
    """`attention`: the same output without groups, on every backend."""
    inputs = make_inputs(Case.parse("B2-H4:2-N70-D32-G2-fp32-causal-left"), device)
    expected = mass_attention_reference(*inputs.heads.values(), inputs.groups, 2, **inputs.arguments)[0]
    for backend in ("auto", "torch", "triton", "reference"):
        out = attention(*inputs.heads.values(), backend=backend, **inputs.arguments)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_row_reference_is_a_row_of_the_oracle(device):
    inputs = make_inputs(Case.parse("B2-H4:2-N20-D16-G2-fp64-full"), device)
    q, k, v = inputs.heads.values()
    positions = torch.tensor([[3, 19], [0, 7]], device=device)
    rows = torch.stack([q[b][:, positions[b]] for b in range(2)])
    by_row = row_mass_reference(rows, k, inputs.groups, 2, row_positions=positions, causal=False)
    whole = mass_attention_reference(q, k, v, inputs.groups, 2, causal=False)[1]
    torch.testing.assert_close(by_row, torch.stack([whole[b][:, positions[b]] for b in range(2)]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_leaves_the_arithmetic_alone(backend, device):
    """float32 in, float32 inside: the same bits with autocast around, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(1, 2, 24, 16, device=device, generator=generator, requires_grad=True) for _ in range(2))
    groups = torch.arange(24, device=device)[None] % 3 - 1
    rows = torch.tensor([[3, 23]], device=device)

    def results():
        few = row_mass(q[:, :, [3, 23]], k, groups, 2, row_positions=rows, backend=backend)
        alone = row_mass(q, k, groups, 2, window=9, backend=backend)
        return [few, alone, *torch.autograd.grad(few.sum() + alone[..., 0].sum(), [q, k])]

    plain = results()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        again = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_schema_is_written_from_the_fields():
    """A field added to `Call` appears in the schema and travels through pack and unpack, whatever its type."""
    from abft_kernels import call

    assert call.SCHEMA in str(ops.row_mass_op._schema)
    source = Path(call.__file__).read_text()
    fields = {
        "    row_mask: ": "    chosen: Tensor | None = None\n",
        "    packed: ": "    early: int = 7\n    late: bool = True\n",
    }
    for before, field in fields.items():
        assert source.count(before) == 1
        source = source.replace(before, field + before)
    namespace = types.ModuleType("call_with_more")
    sys.modules[namespace.__name__] = namespace
    exec(source.replace("from __future__ import annotations", ""), namespace.__dict__)
    assert "Tensor? chosen" in namespace.SCHEMA
    assert namespace.PACKED_ARGUMENTS == call.PACKED_ARGUMENTS + 1
    made = namespace.Call(chosen=torch.ones(1), early=3, late=False, scale=0.5)
    packed = namespace.pack(made)
    assert len(packed) == namespace.PACKED_ARGUMENTS
    assert namespace.unpack(packed) == made


@pytest.mark.parametrize("rows", [False, True])
def test_one_check_for_each_public_call(rows, device, monkeypatch):
    counts = []
    for name in ("_check_heads", "_check_groups"):
        check = getattr(validation, name)
        monkeypatch.setattr(validation, name, lambda *x, name=name, check=check: (counts.append(name), check(*x))[1])
    inputs = make_inputs(Case.parse("B2-H4:2-N20-D16-G2-fp32-causal-left"), device)
    chosen = {"row_positions": torch.full((2, 1), 19, device=device)} if rows else {}
    for backend in ("torch", "reference"):
        mass_attention(*inputs.heads.values(), inputs.groups, 2, backend=backend, **chosen, **inputs.arguments)
        assert sorted(counts) == ["_check_groups", "_check_heads"]
        counts.clear()


def test_checkpointing_unpacks_saved_tensors_once(device):
    inputs = make_inputs(Case.parse("B2-H4:2-N20-D16-G2-fp32-causal-left"), device)
    heads = [x.requires_grad_() for x in inputs.heads.values()]

    def function(*x):
        out, mass = mass_attention(*x, inputs.groups, 2, window=5, backend="torch", **inputs.arguments)
        return out.sum() + mass.square().sum()

    plain = torch.autograd.grad(function(*heads), heads)
    again = torch.autograd.grad(checkpoint(function, *heads, use_reentrant=False), heads)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compile_with_dynamic_shapes(device):
    torch._dynamo.reset()
    function = torch.compile(_loss("torch"), fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("B2-H2:1-N40-D16-G2-fp32-causal-left", "B2-H2:1-N56-D16-G2-fp32-causal-left"):
        inputs = make_inputs(Case.parse(name), device)
        n = Case.parse(name).n_k
        rest = (inputs.groups, torch.tensor([[n - 2, n - 1], [n - 1, -1]], device=device))
        rest = (*rest, inputs.arguments["seq_lens"], inputs.arguments["seq_starts"])
        heads = [x.requires_grad_() for x in inputs.heads.values()]
        losses = [f(*heads, *rest) for f in (function, _loss("torch"))]
        for one, other in zip(*(torch.autograd.grad(x, heads) for x in losses), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_types_of_return_lse(tmp_path):
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "calls.py"
    program.write_text(
        "from torch import Tensor\n"
        "from abft_kernels import mass_attention, row_mass\n"
        "def f(x: Tensor) -> None:\n"
        "    reveal_type(row_mass(x, x, x, 2, window=3))\n"
        "    reveal_type(row_mass(x, x, x, 2, return_lse=True))\n"
        "    reveal_type(mass_attention(x, x, x, x, 2))\n"
        "    reveal_type(mass_attention(x, x, x, x, 2, causal=False, return_lse=True))\n"
        "    row_mass(x, x, x, 2, windw=3)\n"
    )
    found = [line.partition(": ")[2] for line in api.run([str(program)])[0].replace("torch._tensor.", "").splitlines()]
    tensor = "Tensor"
    expected = [tensor, *(f"tuple[{', '.join([tensor] * n)}]" for n in (2, 2, 3))]
    assert [line.split('"')[1] for line in found if "Revealed type" in line] == expected
    assert any("windw" in line for line in found)
