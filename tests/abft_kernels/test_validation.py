"""Each check of the public arguments, with its message: the value received and the remedy."""

import pytest
import torch

from abft_kernels import attention, available_backends, functional, mass_attention, merge_masses, row_mass
from abft_kernels.masking import Reach
from abft_kernels.triton import launch
from abft_kernels.triton.launch import GPU, family_of, launch_config, refusal, row_splits, serves
from abft_kernels.triton.launch_table import TABLE, Entry, Launch

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
    with pytest.raises(
        NotImplementedError, match="head_dim 513 is over 512, the most of the forward kernel in 16 bits"
    ):
        attention(*(torch.randn(1, 1, 4, 513, dtype=torch.bfloat16) for _ in range(3)), backend="triton")
    with pytest.raises(NotImplementedError, match="no forward launch for head tiles of 1024"):
        launch_config("forward", 1024, 2, 2, torch.device("cpu"))


# Bytes of shared memory of one program.
GPUS = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_103": 227 << 10, "sm_120": 99 << 10, "sm_121": 99 << 10, "gfx90a": 64 << 10, "gfx942": 64 << 10,
    "gfx950": 160 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def on(monkeypatch):
    """Return a function that makes every device a GPU of this name."""

    def choose(name, shared_memory=None):
        of_name = GPU(name, family_of(name), shared_memory or GPUS.get(name, 64 << 10))
        monkeypatch.setattr(launch, "gpu_of", lambda device: of_name)

    return choose


def widest(kernel, element_size, groups):
    """Return the widest head tile that a kernel serves on the chosen GPU."""
    tiles = [tile for tile in (16, 32, 64, 128, 256, 512, 1024) if serves(kernel, tile, element_size, groups, CPU)]
    return max(tiles, default=0)


@pytest.mark.parametrize("name", GPUS)
def test_the_launch_table_serves_what_the_docs_promise(name, on):
    on(name)
    fused = {
        (size, groups): min(widest(kernel, size, groups) for kernel in ("forward", "backward_kv", "backward_q"))
        for size, groups in ((2, 2), (2, 16), (4, 2), (4, 16))
    }
    rows = {size: widest("rows", size, 16) for size in (2, 4)}
    assert (fused, rows) == {
        "sm_80": ({(2, 2): 512, (2, 16): 256, (4, 2): 64, (4, 16): 64}, {2: 512, 4: 512}),
        "sm_90": ({(2, 2): 512, (2, 16): 512, (4, 2): 128, (4, 16): 128}, {2: 512, 4: 512}),
        "sm_100": ({(2, 2): 512, (2, 16): 512, (4, 2): 128, (4, 16): 128}, {2: 512, 4: 512}),
        "cdna": ({(2, 2): 512, (2, 16): 512, (4, 2): 0, (4, 16): 0}, {2: 512, 4: 0}),
        "rdna": ({(2, 2): 128, (2, 16): 128, (4, 2): 0, (4, 16): 0}, {2: 128, 4: 0}),
    }[family_of(name)]


@pytest.mark.parametrize("name", GPUS)
def test_every_launch_fits_the_gpu(name, on):
    """Each entry names the bytes that it was compiled with, and every call that is served gets one that fits."""
    on(name)
    for (kernel, element_size, family), entries in TABLE.items():
        if family != family_of(name):
            continue
        for entry in entries:
            assert entry.shared_memory > 0, (kernel, element_size, family, entry)
            found = launch_config(kernel, entry.head_tile, element_size, entry.groups, CPU)
            fitting = [one.shared_memory for one in entries if one.launch == found]
            assert min(fitting) <= GPUS[name]


@pytest.mark.parametrize("name", ["sm_120", "sm_121", "sm_86", "sm_130", "sm_200"])
def test_small_and_unknown_cards_fit_99_kib(name, on):
    """What is newer than the table takes the entries of sm_80, none of which needs more than 101,376 bytes."""
    on(name, 99 << 10)
    assert family_of(name) == "sm_80"
    for (kernel, element_size, family), entries in TABLE.items():
        if family == "sm_80":
            assert all(0 < entry.shared_memory <= 101_376 for entry in entries), (kernel, element_size)
    assert refusal("fused", 128, 2, 16, CPU) is None
    assert refusal("rows", 512, 4, 16, CPU) is None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sm_70", None), ("sm_75", None), ("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"),
        ("sm_100", "sm_100"), ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_120", "sm_80"), ("sm_130", "sm_80"),
        ("gfx906", None), ("gfx908", None), ("gfx1030", None), ("gfx90a", "cdna"), ("gfx942", "cdna"),
        ("gfx950", "cdna"), ("gfx1100", "rdna"), ("gfx1201", "rdna"), ("gfx1301", "rdna"),
    ],
)  # fmt: skip
def test_families(name, family):
    assert family_of(name) == family


@pytest.mark.parametrize(
    ("name", "oldest"),
    [("sm_75", "sm_80"), ("gfx906", "gfx90a .CDNA 2. or gfx1100 .RDNA 3."), ("gfx1030", "gfx90a .CDNA 2. or gfx1100")],
)
def test_old_gpus_are_refused_with_the_reason(name, oldest, on, monkeypatch):
    on(name)
    reason = f"this GPU is {name}; the kernels need {oldest}"
    assert refusal("rows", 64, 2, 1, CPU) == refusal("fused", 64, 4, 16, CPU)
    q, k, v, groups, g = (x.bfloat16() if isinstance(x, torch.Tensor) and x.dim() == 4 else x
                          for x in _arguments().values())  # fmt: skip
    with pytest.raises(NotImplementedError, match=f"cannot run this: {reason}.*; backend='torch' can"):
        mass_attention(q, k, v, groups, g, backend="triton")
    assert available_backends("cpu")["triton"].startswith(f"this GPU is {name}; the kernels need ")
    # "auto" asks on a GPU alone.
    functional._warn_once.cache_clear()
    on_gpu = _OnGPU(q)
    with pytest.warns(RuntimeWarning, match=f"backend 'auto' takes PyTorch, not Triton: {reason}"):
        assert functional._choose("auto", on_gpu, None, "rows", 2) == "torch"


class _OnGPU:
    """What `auto` looks at of a tensor on a GPU."""

    def __init__(self, x):
        self.device, self.dtype, self.shape = torch.device("cuda", 0), x.dtype, x.shape


def test_smaller_shared_memory_takes_the_next_smaller_entry(on, monkeypatch):
    large, small = Launch(128, 64, 8, 3), Launch(64, 32, 4, 2)
    entries = [Entry(64, 16, large, 120_000), Entry(64, 16, small, 60_000)]
    monkeypatch.setitem(TABLE, ("forward", 2, "sm_80"), entries)
    on("sm_80")
    assert launch_config("forward", 64, 2, 2, CPU) == large
    on("sm_86")
    assert launch_config("forward", 64, 2, 2, CPU) == small
    on("sm_86", 48 << 10)
    assert not serves("forward", 64, 2, 2, CPU)
    with pytest.raises(NotImplementedError, match="no forward launch for head tiles of 64 on sm_86"):
        launch_config("forward", 64, 2, 2, CPU)
    assert "is over 0, the most of the forward kernel in 16 bits" in (refusal("fused", 64, 2, 2, CPU) or "")


def test_calls_without_mass_take_their_own_entry(on, monkeypatch):
    own, shared = Launch(128, 128, 8, 2), Launch(64, 32, 4, 2)
    monkeypatch.setitem(TABLE, ("forward", 2, "sm_90"), [Entry(64, 0, own, 100_000), Entry(64, 16, shared, 60_000)])
    on("sm_90")
    assert launch_config("forward", 64, 2, 0, CPU) == own
    assert launch_config("forward", 64, 2, 2, CPU) == shared


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
