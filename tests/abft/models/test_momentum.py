"""Momentum attention and the attention probe, against sums written out and eager attention with an N × N matrix."""

import itertools

import pytest
import torch
from parity import batch_of, loss_of, positions, query_key
from tiny_models import tiny
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from abft.evaluation.classification import evaluate, label_logits
from abft.models.attention import enable
from abft.models.bounds import Bounds
from abft.models.masses import forward, forward_with_mass, layer_masses
from abft.models.momentum import add_momentum, momentum_values
from abft.prompts.collation import Collator

ORACLE = "momentum_oracle"
ETA = 0.6


def oracle(module, query, key, value, attention_mask, scaling=None, momentum=None, **kwargs):
    """Eager attention plus momentum, by a matrix of η^{t−i} over the keys that the mask lets a row see."""
    rest = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(rest, dim=1), value.repeat_interleave(rest, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
    keys = torch.arange(key.shape[2])
    seen = rows >= keys if attention_mask is None else attention_mask > -1
    probabilities = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -1e30).softmax(-1)
    summed = seen if kwargs.get("sliding_window") is None else torch.tensor(True)  # without padding, that is
    weights = torch.where(summed & (rows > keys), momentum ** (rows - keys).float(), 0.0)
    return (probabilities @ value + weights @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(ORACLE, oracle)
AttentionMaskInterface.register(ORACLE, eager_mask)


def double_loop(value, eta, first, end):
    total = torch.zeros_like(value)
    for t in range(first, end):
        for i in range(first, t):
            total[:, :, t] += eta ** (t - i) * value[:, :, i]
    return total


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- the sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 21])
def test_equals_a_double_loop(length, eta):
    value = values(2, 3, length, 4)
    torch.testing.assert_close(momentum_values(value, eta), double_loop(value, eta, 0, length))


def test_padding_gives_nothing_and_gets_nothing():
    value = values(3, 2, 11, 4)
    value[0, :, 9:] = value[1, :, :4] = torch.nan  # padding may hold anything
    starts, lens = torch.tensor([0, 4, 2], dtype=torch.int32), torch.tensor([9, 7, 5], dtype=torch.int32)
    got = momentum_values(value, 0.7, Bounds(seq_starts=starts, seq_lens=lens))
    for sample, (first, n) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        one = value[sample : sample + 1]
        torch.testing.assert_close(got[sample : sample + 1], double_loop(one, 0.7, first, first + n))


def test_packed_sequences_do_not_reach_one_another():
    value, bounds = values(1, 2, 20, 4), [0, 1, 9, 12, 20]
    got = momentum_values(value, 0.9, Bounds(cu_seqlens=torch.tensor(bounds, dtype=torch.int32)))
    want = sum(double_loop(value, 0.9, first, end) for first, end in itertools.pairwise(bounds))
    torch.testing.assert_close(got, want)


def test_gradient_is_that_of_the_sum():
    value = values(1, 2, 9, 3).requires_grad_()
    padded = Bounds(seq_starts=torch.tensor([1]), seq_lens=torch.tensor([7]))
    assert torch.autograd.gradcheck(lambda v: momentum_values(v, 0.8, padded), value)
    packed = Bounds(cu_seqlens=torch.tensor([0, 4, 9]))
    assert torch.autograd.gradcheck(lambda v: momentum_values(v, 0.8, packed), value)


def test_query_heads_take_the_values_of_their_group():
    value, out = values(1, 2, 5, 3), values(1, 6, 5, 3)
    want = out + momentum_values(value, 0.5).repeat_interleave(3, dim=1)
    torch.testing.assert_close(add_momentum(out, value, 0.5), want)
    torch.testing.assert_close(add_momentum(out[:, :, -2:], value, 0.5), want[:, :, -2:])
    assert add_momentum(out.bfloat16(), value.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("eta", [0.0, 1.0, -0.5, float("nan")])
def test_eta_out_of_range_is_named(eta):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {eta}"):
        momentum_values(values(1, 1, 3, 2), eta)
    with pytest.raises(ValueError, match=f"between 0 and 1, got {eta}"):
        enable(tiny("llama"))(torch.tensor([[3, 4]]), momentum=eta)


def test_no_matrix_of_tokens_by_tokens(largest_tensor):
    value = torch.randn(1, 2, 4096, 4)
    with largest_tensor() as largest:
        momentum_values(value, 0.99, Bounds(cu_seqlens=torch.tensor([0, 1000, 4096])))
    assert largest.numel <= value.numel()


# --- in models --------------------------------------------------------------------------------------------


def outputs_of(model, batch, attention, **arguments):
    """Logits and gradients of a loss on the last rows; masses do not enter it."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    if attention == ORACLE:
        arguments = {"attention_mask": batch.get("attention_mask"), "position_ids": positions(batch), **arguments}
        logits = model(batch["input_ids"], use_cache=False, **arguments).logits
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "cu_seqlens") if name in batch}
        inputs.setdefault("position_ids", positions(batch))
        logits = forward(model, **inputs, **arguments).logits
    loss_of(logits, [], batch).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "side"),
    [*itertools.product(["llama", "gpt2", "qwen3"], ["none", "left", "right", "packed"]), ("mistral_window", "none")],
)
def test_models_equal_the_matrix(kind, side):
    model, batch = tiny(kind), batch_of(side)
    want, want_gradients = outputs_of(model, batch, ORACLE, momentum=ETA)
    got, gradients = outputs_of(model, batch, "abft", momentum=ETA)
    plain, _ = outputs_of(model, batch, "abft")
    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    assert (want - plain)[real].abs().max() > 0.1 * plain.abs().max(), "momentum too weak to be seen"
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want_gradients[name], atol=2e-5, rtol=1e-4, msg=name)
    assert all(gradients[name].count_nonzero() for name in query_key(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_equals_one_pass(kind):
    model = enable(tiny(kind))
    ids = torch.randint(3, 50, (2, 15), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = forward(model, input_ids=ids, attention_mask=mask, position_ids=places, momentum=ETA).logits
        cache, got = DynamicCache(config=model.config), []
        for part in (slice(0, 9), slice(9, 10), slice(10, 13), slice(13, 15)):
            outputs = model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=places[:, part],
                            past_key_values=cache, momentum=ETA)  # fmt: skip
            got.append(outputs.logits)
    torch.testing.assert_close(torch.cat(got, dim=1)[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-4)


def test_a_cache_that_has_let_go_of_values_is_refused():
    model = enable(tiny("mistral_window"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 50, (1, 12)), past_key_values=cache, momentum=ETA)
        with pytest.raises(NotImplementedError, match="momentum over a cache that has dropped"):
            model(torch.randint(3, 50, (1, 1)), past_key_values=cache, momentum=ETA)


def test_masses_of_later_layers_see_it():
    """With and without a collector, and in restricted gradients, the same hidden states."""
    model, batch = enable(tiny("llama")), batch_of("left")
    with torch.no_grad():
        want = forward_with_mass(model, **batch, momentum=ETA).attentions
        plain = layer_masses(model, **batch)
    torch.testing.assert_close(want[0], plain[0])  # momentum acts after the first layer's scores
    assert (want[1] - plain[1]).abs().max() > 0.01
    added = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "momentum": ETA}), with_kwargs=True
    )
    try:
        for detach in (False, True):
            for got, mass in zip(layer_masses(model, **batch, detach=detach), want, strict=True):
                torch.testing.assert_close(got, mass, atol=1e-6, rtol=1e-5)
    finally:
        added.remove()


def test_evaluation_with_momentum(toy_prompts, toy_builder):
    model = tiny("llama")
    with pytest.raises(ValueError, match="only the 'abft' attention knows momentum"):
        evaluate(model, toy_prompts, momentum=0.5, progress=False)
    got = evaluate(enable(model), toy_prompts, momentum=0.5, progress=False)
    model.set_attn_implementation(ORACLE)
    with torch.no_grad():
        logits = [model(torch.tensor([p.input_ids]), momentum=0.5).logits[0, -1] for p in toy_prompts]
    want = torch.stack(logits)[:, toy_builder.label_token_ids].softmax(-1)
    torch.testing.assert_close(got.probabilities, want, atol=1e-5, rtol=1e-4)
    plain = evaluate(enable(model), toy_prompts, progress=False)
    assert (got.probabilities - plain.probabilities).abs().max() > 0.01


# --- the probe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_probe_gets_what_gives_the_attention_matrix(kind, toy_prompts, toy_builder):
    model = tiny(kind, attention="eager")
    batch = Collator()(toy_prompts[:1])
    with torch.no_grad():
        want = model(batch["input_ids"], output_attentions=True).attentions
    seen = []

    def probe(module, query, key, value, scale):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(2, 3) * scale).masked_fill(future, float("-inf"))
        seen.append((module, scores.softmax(-1), value.shape))

    label_logits(enable(model), batch, toy_builder.label_token_ids, attention_probe=probe)
    assert [type(module).__name__ for module, _, _ in seen] == [
        {"llama": "LlamaAttention"}.get(kind, "GPT2Attention")
    ] * 2
    assert seen[0][0] is not seen[1][0]
    for (_, got, shape), attention in zip(seen, want, strict=True):
        torch.testing.assert_close(got, attention, atol=1e-6, rtol=1e-5)
        assert shape[1] == (2 if kind == "llama" else 4)
