"""The dtype that a model is loaded in."""

import pytest
import torch
from tiny_models import tiny

from abft.models import loading
from abft.models.loading import load_base, loading_arguments


@pytest.fixture
def half(tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("quick", "want"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_float32_where_bfloat16_is_slow(half, monkeypatch, quick, want):
    monkeypatch.setattr(loading, "computes_bfloat16", lambda: quick)
    assert load_base(half).dtype == want
    assert load_base(half, dtype="bfloat16").dtype == torch.bfloat16
    assert load_base(half, dtype="float32").dtype == torch.float32


def test_it_depends_on_the_device(monkeypatch):
    monkeypatch.setattr(loading, "default_device", lambda: "cuda")
    assert loading_arguments() == {"dtype": "auto"}
    monkeypatch.setattr(loading, "default_device", lambda: "cpu")
    assert loading.computes_bfloat16() is torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'half'"):
        loading_arguments("half")
