"""Each check of the public arguments, with its message: the value received and the remedy."""

import pytest
import torch

from abft_kernels import attention, available_backends, mass_attention, row_mass
from abft_kernels.launch import launch_config, row_splits

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
        ({"q": torch.randn(H, N, D)}, ValueError, r"q must have shape .*got \(4, 6, 8\); transpose"),
        ({"k": torch.zeros(B, H_KV, N, D, dtype=torch.int32)}, TypeError, "k has dtype torch.int32; use float32"),
        ({"k": torch.randn(B, H_KV, N, D).half()}, TypeError, "q is torch.float32 but k is torch.float16; cast"),
        ({"k": torch.randn(B, H_KV, N, D, device="meta")}, ValueError, "q is on cpu but k is on meta; move"),
        ({"k": torch.randn(1, H_KV, N, D)}, ValueError, "differ in batch or head_dim"),
        ({"v": torch.randn(B, H_KV, N, D + 1)}, ValueError, "differ in batch or head_dim"),
        ({"k": torch.randn(B, 3, N, D)}, ValueError, "q has 4 heads, not a multiple of the 3 heads of k"),
        ({"k": torch.randn(B, 0, N, D)}, ValueError, "not a multiple of the 0 heads of k"),
        ({"v": torch.randn(B, H_KV, N + 1, D)}, ValueError, "differ in heads or length"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan; None means"),
        ({"key_groups": [[0]]}, TypeError, "key_groups must be a torch.Tensor, got list"),
        ({"key_groups": torch.zeros(B, N)}, TypeError, "signed integers, got torch.float32"),
        ({"key_groups": torch.zeros(B, N, dtype=torch.uint8)}, TypeError, "signed integers, got torch.uint8"),
        ({"key_groups": torch.zeros(B, N + 1, dtype=torch.long)}, ValueError, r"= \(2, 6\), got \(2, 7\)"),
        ({"key_groups": torch.zeros(B, N, dtype=torch.long, device="meta")}, ValueError, "on meta but k is on cpu"),
        ({"num_groups": 0}, ValueError, "num_groups must be an int from 1 to 8, got 0"),
        ({"num_groups": 9}, ValueError, "num_groups must be an int from 1 to 8, got 9"),
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
        ({"seq_lens": torch.tensor([3, 3]), "causal": False, "q": torch.randn(B, H, 3, D)}, ValueError,
         "needs as many queries as keys, got 3 and 6"),
        ({"row_positions": torch.zeros(B, 1)}, TypeError, "row_positions must be an int32 or int64 tensor"),
        ({"row_positions": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"\(batch=2, rows\), got \(3, 1\)"),
        ({"row_positions": torch.full((B, 1), 6)}, ValueError, "reaches 6 but there are 6 keys"),
        ({"row_positions": torch.zeros(B, 1, dtype=torch.long), "q": torch.randn(B, H, 3, D)}, ValueError,
         "a row before position 3, but q holds only the last 3"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
        ({"backend": "reference", "dropout_p": 0.1}, NotImplementedError, "dropout_p=0.1; set it to 0 or use"),
        ({"backend": "triton", "dropout_p": 0.1}, NotImplementedError, "only backend 'torch' has dropout"),
    ],
)  # fmt: skip
def test_mass_attention(changes, error, message):
    with pytest.raises(error, match=message):
        mass_attention(**_arguments(**changes))


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
    with pytest.raises(NotImplementedError, match="head_dim 257 is over 128 in float32; backend='torch' can"):
        attention(*wide, backend="triton")
    assert attention(*wide, backend="torch").shape == (1, 1, 4, 257)
    with pytest.raises(NotImplementedError, match="head_dim 257 is over 256 in bfloat16"):
        attention(*(x.bfloat16() for x in wide), backend="triton")
    with pytest.raises(NotImplementedError, match="no forward launch for head tiles of 512"):
        launch_config("forward", 512, 2, 2, torch.device("cpu"))


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
