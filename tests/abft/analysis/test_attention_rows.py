"""Whole last rows equal the last rows of eager attention, under windows, soft caps and sinks too."""

import pytest
import torch
from tiny_models import tiny

from abft.analysis.attention_rows import last_rows
from abft.models.attention import enable


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_oss", "mistral_window"])
def test_rows_equal_eager_attention(kind, toy_prompts):
    model = tiny(kind).eval()
    samples = [prompt for prompt in toy_prompts if prompt.length % 16][:2]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = [model(torch.tensor([s.input_ids]), output_attentions=True).attentions for s in samples]
    got = last_rows(enable(model), samples, progress=False)
    assert len(got) == 2
    for sample, rows, layers in zip(samples, got, want, strict=True):
        expected = torch.stack([layer[0, :, -1, : sample.length] for layer in layers])
        assert rows.shape == expected.shape
        torch.testing.assert_close(rows, expected, atol=2e-6, rtol=1e-4)


def test_other_attention_is_refused(toy_prompts):
    with pytest.raises(ValueError, match=r"call abft\.enable"):
        last_rows(tiny("llama"), toy_prompts[:1])
