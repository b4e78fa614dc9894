"""Models, masks and arguments that the adapter must refuse, and masks that it must distinguish."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from parity import assert_equal, batch_of, run
from tiny_models import CONFIGS, tiny
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import and_masks, chunked_causal_mask_function

import abft.models.attention as adapter
from abft.models.attention import enable
from abft.models.bounds import Bounds
from abft.models.layer_mask import LayerMask, layer_mask
from abft.models.masses import attention_mass


def mass_of(model, batch=None, **options: Any):
    return attention_mass(model, **{**(batch or batch_of("none")), **options})


NOT_CAUSAL = "serves causal masks with padding"


def test_a_window_that_the_mask_lacks_is_refused():
    """Neither of the two can be called right: transformers' own kernels differ."""
    with pytest.raises(NotImplementedError, match="a sliding window of 5 tokens over 6 keys that its mask lacks"):
        adapter._attention_forward(**forward_arguments(sliding_window=5))


def make(name: str, **changes: Any):
    """A tiny model of a kind that is refused or special."""
    config = getattr(transformers, name)(**changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


LLAMA = CONFIGS["llama"][1]


def test_refuses_hybrid_models():
    changes = {
        **LLAMA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    model = enable(make("Qwen3NextConfig", **changes))
    with pytest.raises(NotImplementedError, match="gave a mass for 1 of 2 layers"):
        mass_of(model)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BloomConfig", dict(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)),
        ("FalconConfig", dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)),
    ],
)
def test_refuses_attention_code_of_its_own(name, changes):
    model = make(name, **changes)
    with pytest.raises(NotImplementedError, match="code of its own and not through transformers' AttentionInterface"):
        enable(model)
    # The name can also be forced into the config; its own attention matrices must not pass for masses.
    model.config._attn_implementation_internal = "abft"
    with pytest.raises(NotImplementedError, match="code of its own"):
        mass_of(model)


def test_attention_matrices_do_not_pass_for_masses():
    """OpenAI-GPT gives (B, H, N, N)."""
    model = make("OpenAIGPTConfig", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(NotImplementedError, match="through transformers' AttentionInterface"):
        mass_of(enable(model))


def test_layers_that_give_no_mass_are_counted(monkeypatch):
    model, batch = enable(tiny("llama")), batch_of("none")
    forward = model.forward

    def with_attentions(change):
        def changed(*args, **kwargs):
            outputs = forward(*args, **kwargs)
            outputs.attentions = change(outputs.attentions)
            return outputs

        return changed

    square = torch.zeros(2, 4, 20, 20)
    for change in (
        lambda masses: None, lambda masses: masses[:1], lambda masses: (masses[0], None),
        lambda masses: (*masses, masses[0]), lambda masses: (masses[0], square),
    ):  # fmt: skip
        monkeypatch.setattr(model, "forward", with_attentions(change))
        with pytest.raises(NotImplementedError, match=r"gave a mass for \d of 2 layers"):
            mass_of(model, batch)


def test_refuses_encoder_decoders():
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        enable(transformers.T5ForConditionalGeneration(config))


def test_refuses_bidirectional_models():
    model = enable(make("BertConfig", **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}))
    for side in ("none", "left"):
        with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
            mass_of(model, batch_of(side), position_ids=None)


def test_refuses_what_packing_excludes():
    model, batch = enable(tiny("llama")), batch_of("packed")
    with pytest.raises(ValueError, match="cu_seqlens and attention_mask exclude each other"):
        mass_of(model, batch, attention_mask=torch.ones(1, 50))
    with pytest.raises(ValueError, match="cu_seqlens ends at 50; input_ids must be one packed row"):
        mass_of(model, {**batch, "input_ids": batch["input_ids"][:, 1:]})
    with pytest.raises(ValueError, match=r"row_positions must have shape \(batch=3, rows\)"):
        mass_of(model, {**batch, "query_positions": batch["query_positions"][:2]})
    several = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    with pytest.raises(NotImplementedError, match="several samples packed by position_ids"):
        mass_of(model, batch_of("none"), attention_mask=None, position_ids=several)
    batch = batch_of("left")
    with pytest.raises(ValueError, match="cu_seq_lens_q and an attention_mask with padding exclude each other"):
        mass_of(model, batch, cu_seq_lens_q=torch.tensor([0, 12, 20]))


def test_refuses_reentrant_checkpointing():
    model = enable(tiny("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant gradient checkpointing loses the gradients of the masses"):
        mass_of(model)
    with torch.no_grad():
        mass_of(model)


@pytest.mark.parametrize("hole", [5, 18])
def test_refuses_a_hole_in_the_mask(hole):
    batch = batch_of("none")
    batch["attention_mask"][1, hole] = 0
    with pytest.raises(ValueError, match="attention_mask of sample 1 has a hole"):
        mass_of(enable(tiny("llama")), batch)


def test_refuses_a_mask_of_four_dimensions():
    model, batch = enable(tiny("llama")), batch_of("none")
    mask = torch.ones(20, 20).tril()[None, None].expand(2, 1, -1, -1)
    for dtype in (torch.bool, torch.float32, torch.int32):
        with pytest.raises(NotImplementedError, match="an attention mask of its own"):
            model(batch["input_ids"], attention_mask=mask.to(dtype))


def test_refuses_a_mask_shorter_than_the_keys():
    model, batch = enable(tiny("llama")), batch_of("none")
    cache = DynamicCache(config=model.config)
    model(batch["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match="does not cover the 24 keys"):
        model(batch["input_ids"][:, :4], past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1, 1]] * 2))


def test_refuses_a_static_cache():
    model, batch = enable(tiny("llama")), batch_of("none")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="use the default DynamicCache"):
        model(batch["input_ids"], past_key_values=cache)


def test_refuses_a_model_on_another_attention():
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'; call abft.enable\(model\) first"):
        mass_of(tiny("llama"))


def test_refuses_what_is_no_transformers_model():
    with pytest.raises(TypeError, match="expected a transformers model, possibly wrapped by PEFT, got Linear"):
        enable(torch.nn.Linear(2, 2))


def test_refuses_groups_that_do_not_cover_the_keys():
    batch = batch_of("none")
    with pytest.raises(ValueError, match="key_groups"):
        mass_of(enable(tiny("llama")), batch, key_groups=batch["key_groups"][:, :-1])


def forward_arguments(**changes):
    module = torch.nn.Module()
    q = torch.randn(1, 2, 6, 8)
    groups = torch.zeros(1, 6, dtype=torch.long)
    return {"module": module, "query": q, "key": q, "value": q, "attention_mask": None, "key_groups": groups, **changes}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alibi": torch.zeros(2, 1, 6)}, "additive position bias"),
        ({"position_bias": torch.zeros(2, 6, 6)}, "additive position bias"),
        ({"head_mask": torch.ones(2)}, "a head mask"),
        ({"indices": torch.zeros(1, 6, 2)}, "a custom key selection"),
        ({"relative_bias": torch.zeros(2, 6, 6)}, "argument 'relative_bias' that is not known"),
        ({"is_causal": False}, "bidirectional or cross attention"),
        ({"attention_mask": layer_mask(1, 6, 6, mask_function=lambda b, h, q, k: k < q)}, "serves causal masks with"),
        ({"attention_mask": torch.zeros(1, 6, dtype=torch.int32)}, "an attention mask of its own"),
        ({"attention_mask": torch.ones(1, 1)}, "an attention mask of its own"),
    ],
)
def test_attention_refuses_arguments_that_change_the_scores(changes, match):
    with pytest.raises(NotImplementedError, match=match):
        adapter._attention_forward(**forward_arguments(**changes))


def test_attention_takes_arguments_that_do_not_matter():
    want = adapter._attention_forward(**forward_arguments())[1].shape
    harmless = {
        "softcap": None, "sliding_window": 6, "s_aux": None, "use_cache": False, "position_ids": torch.arange(6)[None],
        "output_router_logits": True, "deterministic": False,
    }  # fmt: skip
    assert adapter._attention_forward(**forward_arguments(**harmless))[1].shape == want


@pytest.mark.parametrize("change", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_scales_of_gpt2_are_served_or_refused(change):
    """GPT-2 passes its scale on; a module that does not is refused."""
    model, batch = tiny("gpt2", **change), batch_of("none")
    assert_equal(run(model, batch, "abft"), run(model, batch, "eager"), batch)
    module = torch.nn.Module()
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(NotImplementedError, match="a scale of the scores"):
        adapter._attention_forward(**forward_arguments(module=module))


def test_a_layer_mask_stands_for_a_causal_mask_whatever_the_module_says():
    mask = layer_mask(1, 6, 6, attention_mask=torch.ones(1, 6, dtype=torch.bool))
    arguments = forward_arguments(attention_mask=mask, is_causal=False)
    mass = adapter._attention_forward(**arguments)[1]
    want = adapter._attention_forward(**forward_arguments(**{k: arguments[k] for k in ("query", "key", "value")}))[1]
    assert torch.equal(mass, want)


# Rows of 12 queries, keys they see: all but the first are not causal.
MASKS = {
    "causal": lambda b, h, q, k: k <= q,
    "window": lambda b, h, q, k: (k <= q) & (k > q - 5),
    "window of 11": lambda b, h, q, k: (k <= q) & (k > q - 11),
    "prefix and window": lambda b, h, q, k: (k <= q) & ((k > q - 5) | (k < 3)),
    "chunks": lambda b, h, q, k: (k <= q) & (k // 4 == q // 4),
    "not itself": lambda b, h, q, k: k < q,
    "look-ahead": lambda b, h, q, k: k <= q + 1,
    "bidirectional": lambda b, h, q, k: q >= 0,
    "block ahead": lambda b, h, q, k: (k <= q) | ((k // 3 == q // 3) & (q > 2)),
    "bidirectional prefix": lambda b, h, q, k: (k <= q) | (k < 5),
    "hole": lambda b, h, q, k: (k <= q) & (k != 7),
    "hole in one row": lambda b, h, q, k: (k <= q) & ~((q == 8) & (k == 4)),
    "sees the end": lambda b, h, q, k: (k <= q) | (k == 11),
    "second sample only": lambda b, h, q, k: (k <= q) & ((b == 0) | (k > q - 4)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("padding", [False, True])
def test_mask_functions_that_are_not_causal_are_seen_through(name, padding):
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = not padding
    result = layer_mask(2, 12, 12, mask_function=MASKS[name], attention_mask=mask)
    layout = Bounds(seq_lens=torch.tensor([12, 9 if padding else 12]))
    if name == "causal":
        lengths = result.bounds().seq_lens
        assert lengths.tolist() == [12, 9] if padding else lengths is None
        assert result.bounds(layout) == layout
        return
    with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
        adapter._attention_forward(**forward_arguments(attention_mask=result))
    with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
        result.bounds(layout)


@pytest.mark.parametrize("name", MASKS)
def test_windows_are_told_from_what_is_none(name):
    """transformers names a local size for windows and for chunks."""
    result = layer_mask(2, 12, 12, mask_function=MASKS[name], local_size=5)
    if name == "causal":
        assert result.bounds() == Bounds()
    elif name == "window":
        assert result.bounds() == Bounds(window=5)
    else:
        with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
            result.bounds()
    assert layer_mask(2, 12, 12, mask_function=MASKS["window of 11"], local_size=11).bounds().window == 11


def packing(bounds, window=99):
    of = torch.tensor([s for s, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(a, b)])
    return lambda b, h, q, k: (k <= q) & (of[q] == of[k]) & (k > q - window)


def test_packed_sequences_are_read_from_the_mask():
    bounds = [0, 4, 5, 12]
    result = layer_mask(1, 12, 12, mask_function=packing(bounds)).bounds()
    assert result.cu_seqlens.tolist() == bounds
    result = layer_mask(1, 12, 12, mask_function=packing(bounds, window=3), local_size=3).bounds()
    assert (result.window, result.cu_seqlens.tolist()) == (3, bounds)
    for strange in (
        lambda b, h, q, k: packing(bounds)(b, h, q, k) | ((k == 0) & (q == 8)),
        lambda b, h, q, k: packing(bounds)(b, h, q, k) & ~((q == 11) & (k == 7)),
    ):
        with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
            layer_mask(1, 12, 12, mask_function=strange).bounds()
    with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
        layer_mask(2, 12, 12, mask_function=packing(bounds)).bounds()


def test_blocks_by_numbers_alone_are_packed_sequences_of_one_sample():
    def blocks(b, h, q, k):
        return (k <= q) & (k // size == q // size)

    size = 5
    mask = layer_mask(1, 12, 12, mask_function=blocks)
    assert mask.bounds().cu_seqlens.tolist() == mask.bounds(Bounds()).cu_seqlens.tolist() == [0, 5, 10, 12]
    with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
        mask.bounds(Bounds(seq_lens=torch.tensor([9])))


def test_chunks_that_end_in_the_padding_are_no_matter():
    # As Llama 4 makes them: chunks counted from each sample's first token.
    starts = torch.tensor([0, 4])

    def chunks(b, h, q, k):
        start = starts[b]
        return (k <= q) & ((k - start) // 8192 == (q - start) // 8192)

    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :4] = False
    bounds = layer_mask(2, 12, 12, mask_function=chunks, attention_mask=mask).bounds()
    assert (bounds.seq_lens.tolist(), bounds.seq_starts.tolist()) == ([12, 8], [0, 4])
    layout = Bounds(seq_lens=torch.tensor([12, 8]), seq_starts=torch.tensor([0, 4]))
    assert layer_mask(2, 12, 12, mask_function=chunks).bounds(layout) == layout


def test_chunks_are_recognised_without_a_look_at_the_left_padding():
    """A tensor on "meta" has no values to read."""
    function = chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long, device="meta"))
    layout = Bounds(seq_lens=torch.tensor([12, 9]), seq_starts=torch.tensor([0, 3]))
    mask = layer_mask(2, 12, 12, mask_function=function, local_size=5)
    assert mask.bounds(layout) == layout._replace(chunk=5)
    assert mask.bounds(Bounds()) == Bounds(chunk=5)
    packed = Bounds(cu_seqlens=torch.tensor([0, 7, 12]))
    assert layer_mask(1, 12, 12, mask_function=function, local_size=5).bounds(packed) == packed._replace(chunk=5)
    for strange in (lambda b, h, q, k: k != 7, lambda b, h, q, k: k > q - 3):
        mask = layer_mask(2, 12, 12, mask_function=and_masks(function, strange), local_size=5)
        with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
            mask.bounds(layout)


@pytest.mark.parametrize(("padding", "served"), [((0, 0), True), ((5, 0), True), ((0, 3), False)])
def test_chunks_over_a_cache_that_has_dropped_keys(padding, served):
    """The last of 15 tokens sees all 5 kept keys if its chunk begins with them."""
    function = chunked_causal_mask_function(5, torch.tensor(padding))
    mask = layer_mask(2, 1, 5, q_offset=14, kv_offset=10, mask_function=function, local_size=5)
    if served:
        assert mask.bounds() == Bounds()
    else:
        with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
            mask.bounds()


def test_rows_after_a_cache():
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, :2] = False
    bounds = layer_mask(1, 3, 12, q_offset=9, attention_mask=mask).bounds()
    assert (bounds.seq_lens.tolist(), bounds.seq_starts.tolist()) == ([10], [2])
    dropped = layer_mask(1, 3, 8, q_offset=9, kv_offset=4, attention_mask=mask)
    assert (dropped.dropped, dropped.bounds()) == (4, Bounds())
    with pytest.raises(NotImplementedError, match="seq_lens over a cache that has dropped keys"):
        dropped.bounds(Bounds(seq_lens=torch.tensor([10])))


def test_mask_that_may_not_be_skipped_is_not_skipped():
    assert layer_mask(2, 6, 6) is None
    assert layer_mask(2, 6, 6, allow_is_causal_skip=False).bounds() == Bounds()


def test_sample_without_tokens():
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    result = layer_mask(2, 6, 6, attention_mask=mask, mask_function=MASKS["window"], local_size=5).bounds()
    assert (result.seq_lens.tolist(), result.seq_starts, result.window) == ([6, 0], None, 5)


def test_a_padding_mask_is_read_once():
    class Counted(torch.Tensor):
        reads = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.reads += function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__)
            return super().__torch_function__(function, types, args, kwargs)

    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, 4:] = False
    mask = layer_mask(2, 6, 6, attention_mask=padding.as_subclass(Counted))
    assert mask.bounds(Bounds(seq_lens=torch.tensor([6, 4]))).seq_lens.tolist() == [6, 4]
    assert Counted.reads == 0
    for _ in range(3):
        assert isinstance(mask, LayerMask)
        mask.bounds()
    assert Counted.reads == 1
