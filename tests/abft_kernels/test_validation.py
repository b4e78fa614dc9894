"""Each check of the public arguments, with its message: the value received and the remedy."""

import pytest
import torch

from abft_kernels import attention, available_backends, mass_attention, merge_masses, row_mass
from abft_kernels.masking import Reach
from abft_kernels.triton import launch
from abft_kernels.triton.launch import launch_config, row_splits, widest_head_tile
from abft_kernels.triton.launch_table import ARCHITECTURES

B, H, H_KV, N, D = 2, 4, 2, 6, 8


def _arguments(**changes):
    values = {
        "q": torch.randn(B, H, N, D), "k": torch.randn(B, H_KV, N, D), "v": torch.randn(B, H_KV, N, D),
        "key_groups": torch.zeros(B, N, dtype=torch.long), "num_groups": 2,
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"key_offset": -1}, ValueError, r"key_offset must be an int ≥ 0 .*, got -1"),
        ({"query_offset": 0.5}, ValueError, r"query_offset must be an int ≥ 0 .*, got 0\.5"),
        ({"key_offset": 2**30 - 5}, ValueError, r"key_offset=1073741819 with 6 keys goes beyond position 1073741824"),
        ({"q": torch.randn(H, N, D)}, ValueError, r"q must have shape .*got \(4, 6, 8\); transpose"),
        ({"k": torch.zeros(B, H_KV, N, D, dtype=torch.int32)}, TypeError, "k has dtype torch.int32; use float32"),
        ({"k": torch.randn(B, H_KV, N, D).half()}, TypeError, "q is torch.float32 but k is torch.float16; cast"),
        ({"k": torch.randn(B, H_KV, N, D, device="meta")}, ValueError, "q is on cpu but k is on meta; move"),
        ({"k": torch.randn(1, H_KV, N, D)}, ValueError, "differ in batch"),
        ({"k": torch.randn(B, H_KV, N, D + 1)}, ValueError, "differ in head_dim"),
        ({"k": torch.randn(B, 3, N, D)}, ValueError, "q has 4 heads, not a multiple of the 3 heads of k"),
        ({"k": torch.randn(B, 0, N, D)}, ValueError, "not a multiple of the 0 heads of k"),
        ({"v": torch.randn(B, H_KV, N + 1, D)}, ValueError, "differ in heads or length"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan; None means"),
        ({"key_groups": [[0]]}, TypeError, "key_groups must be a torch.Tensor, got list"),
        ({"key_groups": torch.zeros(B, N)}, ValueError, r"weights must .* = \(2, 6, 2\), got \(2, 6\)"),
        ({"key_groups": torch.zeros(B, N, 3)}, ValueError, r"weights must .* = \(2, 6, 2\), got \(2, 6, 3\)"),
        ({"key_groups": torch.zeros(B, N, dtype=torch.uint8)}, TypeError, "signed integers .* got torch.uint8"),
        ({"key_groups": torch.zeros(B, N + 1, dtype=torch.long)}, ValueError, r"= \(2, 6\), got \(2, 7\)"),
        ({"key_groups": torch.zeros(B, N, dtype=torch.long, device="meta")}, ValueError, "on meta but k is on cpu"),
        ({"num_groups": 0}, ValueError, "num_groups must be an int from 1 to 16, got 0"),
        ({"num_groups": 17}, ValueError, "num_groups must be an int from 1 to 16, got 17"),
        ({"num_groups": 2.0}, ValueError, "got 2.0"),
        ({"key_groups": torch.full((B, N), 2)}, ValueError, "values from 2 to 2; with num_groups=2"),
        ({"key_groups": torch.full((B, N), -2)}, ValueError, "values from -2 to -2"),
        ({"seq_starts": torch.zeros(B, dtype=torch.long)}, ValueError, "seq_starts needs seq_lens"),
        ({"seq_lens": torch.ones(B)}, TypeError, "seq_lens must be an int32 or int64 tensor, got torch.float32"),
        ({"seq_lens": [1, 2]}, TypeError, "seq_lens must be an int32 or int64 tensor"),
        ({"seq_lens": torch.ones(3, dtype=torch.long)}, ValueError, r"shape \(batch=2,\), got \(3,\)"),
        ({"seq_lens": torch.tensor([7, 1])}, ValueError, r"seq_lens \[7, 1\] .* within the 6 keys"),
        ({"seq_lens": torch.tensor([-1, 1])}, ValueError, "within the 6 keys"),
        ({"seq_lens": torch.tensor([3, 3]), "seq_starts": torch.tensor([0, 4])}, ValueError, "within the 6 keys"),
        ({"seq_lens": torch.tensor([3, 3]), "seq_starts": torch.tensor([0, -1])}, ValueError, "within the 6 keys"),
        (
            {"seq_lens": torch.tensor([3, 3]), "causal": False, "q": torch.randn(B, H, 3, D)},
            ValueError,
            "needs as many queries as keys, got 3 and 6",
        ),
        ({"row_positions": torch.zeros(B, 1)}, TypeError, "row_positions must be an int32 or int64 tensor"),
        ({"row_positions": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"\(batch=2, rows\) .*got \(3, 1\)"),
        ({"row_positions": torch.full((B, 1), 6)}, ValueError, "reaches 6 but there are 6 keys"),
        (
            {"row_positions": torch.zeros(B, 1, dtype=torch.long), "q": torch.randn(B, H, 3, D)},
            ValueError,
            "a row before position 3, but q holds only the positions from 3",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
        *(({limit: 0}, ValueError, f"{limit} must be an int ≥ 1 .* got 0") for limit in Reach._fields),
        *(({limit: 2.0}, ValueError, f"{limit} must be an int ≥ 1 .* got 2.0") for limit in Reach._fields),
        *(({limit: 3, "causal": False}, ValueError, f"{limit}=3 needs causal=True") for limit in Reach._fields),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number > 0 or None, got 0.0"),
        ({"sinks": torch.zeros(H_KV)}, ValueError, r"sinks must be .* \(heads,\) = \(4,\), got \(2,\)"),
        ({"sinks": torch.zeros(H, device="meta")}, ValueError, "sinks is on meta but the queries are on cpu"),
        ({"alibi_slopes": torch.zeros(H_KV)}, ValueError, r"\(4,\) or \(2, 4\), got \(2,\)"),
        ({"alibi_slopes": torch.zeros(H, requires_grad=True)}, ValueError, r"alibi_slopes\.detach\(\)"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": 0.1, "dropout_seed": -1}, ValueError, "dropout_seed must be an int from 0 .* got -1"),
        ({"row_mask": torch.ones(B, N)}, TypeError, "row_mask must be a bool tensor, got torch.float32"),
        ({"row_mask": torch.ones(B, N + 1, dtype=torch.bool)}, ValueError, r"= \(2, 6\), got \(2, 7\)"),
        (
            {"row_mask": torch.ones(B, N, dtype=torch.bool), "row_positions": torch.zeros(B, 1, dtype=torch.long)},
            ValueError,
            "row_positions and row_mask both choose rows",
        ),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "with cu_seqlens k must have batch 1"),
    ],
)
def test_mass_attention(changes, error, message):
    with pytest.raises(error, match=message):
        mass_attention(**_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
        ({"cu_seqlens": torch.tensor([6])}, ValueError, r"shape \(sequences \+ 1,\), got \(1,\)"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"start at 0, .* within the 6 tokens, got \[1, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, r"never fall .* got \[0, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, r"within the 6 tokens, got \[0, 7\]"),
        ({"seq_lens": torch.tensor([3])}, ValueError, "cu_seqlens and seq_lens exclude each other"),
        ({"key_offset": 0}, ValueError, "cu_seqlens and key_offset exclude each other"),
        ({"q": torch.randn(1, H, 3, D)}, ValueError, "queries and keys alike, got 3 queries and 6 keys"),
        ({"row_positions": torch.zeros(1, 1, dtype=torch.long)}, ValueError, r"\(batch=2, rows\) .* got \(1, 1\)"),
    ],
)
def test_packed(changes, error, message):
    arguments = _arguments(
        q=torch.randn(1, H, N, D),
        k=torch.randn(1, H_KV, N, D),
        v=torch.randn(1, H_KV, N, D),
        key_groups=torch.zeros(1, N, dtype=torch.long),
    )
    with pytest.raises(error, match=message):
        mass_attention(**{**arguments, "cu_seqlens": torch.tensor([0, 2, 6]), **changes})


def test_merge_masses():
    mass, lse = torch.rand(2, 3, 2), torch.rand(2, 3)
    with pytest.raises(ValueError, match="needs a mass and an lse of every shard, got 2 and 1"):
        merge_masses([mass, mass], [lse])
    with pytest.raises(ValueError, match=r"got \(2, 3, 2\) and \(2,\)"):
        merge_masses([mass], [lse[:, 0]])


def test_row_mass():
    arguments = {name: x for name, x in _arguments().items() if name not in ("q", "v")}
    rows, positions = torch.randn(B, H, 2, D), torch.zeros(B, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="q_rows has 2 rows but row_positions has 1"):
        row_mass(rows, **arguments, row_positions=positions)
    with pytest.raises(TypeError, match=r"q_rows must be a torch\.Tensor, got NoneType"):
        row_mass(None, **arguments, row_positions=positions)


def test_triton_says_what_it_cannot():
    q, k, v, groups, g = _arguments().values()
    with pytest.raises(NotImplementedError, match="no float64; backend='torch' can"):
        mass_attention(q.double(), k.double(), v.double(), groups, g, backend="triton")
    wide = [torch.randn(1, 1, 4, 257) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=r"head_dim 257 is over 128, .*; backend='torch' can"):
        attention(*wide, backend="triton")
    assert attention(*wide, backend="torch").shape == (1, 1, 4, 257)
    with pytest.raises(NotImplementedError, match="head_dim 513 is over 512, the most in bfloat16"):
        attention(*(torch.randn(1, 1, 4, 513, dtype=torch.bfloat16) for _ in range(3)), backend="triton")
    with pytest.raises(NotImplementedError, match="no forward launch for head tiles of 1024"):
        launch_config("forward", 1024, 2, 2, torch.device("cpu"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_launch_table_serves_what_the_docs_promise(arch, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    device = torch.device("cpu")
    assert widest_head_tile("fused", 2, 2, device) == 512
    assert widest_head_tile("fused", 2, 16, device) == (256 if arch == 80 else 512)
    assert widest_head_tile("fused", 4, 16, device) == (64 if arch == 80 else 128)
    assert widest_head_tile("rows", 2, 16, device) == widest_head_tile("rows", 4, 16, device) == 512


def test_without_gpu_or_interpreter(monkeypatch):
    from abft_kernels.triton import common

    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="the tensors are on cpu; set TRITON_INTERPRET=1 before"):
        mass_attention(**_arguments(), backend="triton")
    assert "TRITON_INTERPRET" in available_backends("cpu")["triton"]
    monkeypatch.setattr(common, "INTERPRETED", True)
    assert set(available_backends("cpu").values()) == {"available"}


def test_row_splits_fill_the_device():
    assert row_splits(1, 1000, 132) == 264
    assert row_splits(1000, 1000, 132) == 1
    assert row_splits(10, 3, 132) == 3
