"""The Hugging Face adapter against eager attention: logits, masses, gradients; and what it must refuse."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, SERVED, packed, padded, random_prompts, tiny
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import abft.attention as adapter
from abft.attention import enable, is_enabled
from abft.masses import attention_mass, forward_with_mass
from abft_kernels.triton.common import INTERPRETED

TRITON_RUNS = INTERPRETED or torch.cuda.is_available()
OLD = Version(transformers.__version__) < Version("5.3")
LENGTHS = (20, 13, 17)
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "opt" and OLD, reason="OPT makes a mask of its own before 5.3"))
    for kind in SERVED
]


def batch_of(side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    prompts, groups = random_prompts((20, 20) if side == "none" else LENGTHS, seed)
    return packed(prompts, groups) if side == "packed" else padded(prompts, groups, side)


def positions(batch):
    if "cu_seqlens" in batch:
        return torch.cat([torch.arange(n) for n in batch["cu_seqlens"].diff().tolist()])[None]
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def last_rows(batch, x):
    """Of `(B, H, N, …)` the last row of each prompt, `(prompts, H, 1, …)`."""
    rows = batch["query_positions"]
    if "cu_seqlens" in batch:
        return x[0][:, rows].movedim(1, 0)
    return x.take_along_dim(rows[:, None, :, None], dim=2)


def query_key(model):
    """The parameters that hold W_Q and W_K, v too where the three are one."""
    names = ("q_proj.weight", "k_proj.weight", "c_attn.weight", "qkv_proj.weight", "query_key_value.weight", "sinks",
             "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")  # fmt: skip
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(names)}


def eager_masses(attentions, batch, all_rows=False):
    groups = batch["key_groups"]
    indicator = torch.stack([(groups == g).float() for g in (0, 1)], dim=-1)
    masses = [probabilities @ indicator[:, None] for probabilities in attentions]
    return masses if all_rows else [last_rows(batch, mass) for mass in masses]


def loss_of(logits, masses, batch):
    """Cross-entropy at the last tokens and both masses, all weighted differently."""
    last = last_rows(batch, logits[:, None])[:, 0, 0]
    loss = torch.nn.functional.cross_entropy(last, torch.arange(len(last)) + 5)
    for layer, mass in enumerate(masses):
        weights = torch.linspace(-1, 2, mass[0].numel()).view(mass.shape[1:])
        loss = loss + (layer + 1) * (weights * mass).sum()
    return loss


def run(model, batch, attention, **options):
    """Logits, masses and gradients of a loss on both, by eager attention or by the adapter."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if attention == "eager":
        # With a cache transformers does not look for packed sequences.
        outputs = model(**arguments, position_ids=positions(batch), output_attentions=True, use_cache=False)
        masses = eager_masses(outputs.attentions, batch)
    else:
        options = {name: batch[name] for name in ("query_positions", "cu_seqlens") if name in batch} | options
        arguments = {"attention_mask": None, **arguments, **options}
        outputs = forward_with_mass(model, **arguments, key_groups=batch["key_groups"], logits_to_keep=0)
        masses = outputs.attentions
    loss_of(outputs.logits, masses, batch).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in query_key(model).items()}
    return outputs.logits.detach(), [mass.detach() for mass in masses], gradients


def assert_equal(got, want, batch, tolerance=1e-5):
    """Relative to the largest entry, at real tokens."""

    def close(a, b, what):
        error = (a - b).abs().max() / b.abs().max()
        assert a.shape == b.shape, what
        assert error < tolerance, f"{what}: {error:.1e}"

    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    close(got[0][real], want[0][real], "logits")
    for layer, (a, b) in enumerate(zip(got[1], want[1], strict=True)):
        close(a, b, f"mass of layer {layer}")
    assert got[2].keys() == want[2].keys()
    assert got[2]
    for name, gradient in got[2].items():
        close(gradient, want[2][name], name)


# --- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_eager(kind, side):
    model, batch = tiny(kind), batch_of(side)
    if side == "packed" and kind in ("gpt_oss", "opt"):
        # transformers' eager attention lets their packed prompts see one another: the mask is not told of positions.
        together = run(model, batch, "abft")
        prompts, groups = random_prompts(LENGTHS)
        single = [run(model, packed([p], [g]), "eager") for p, g in zip(prompts, groups, strict=True)]
        torch.testing.assert_close(together[0], torch.cat([s[0] for s in single], dim=1), atol=1e-5, rtol=1e-5)
        for layer, mass in enumerate(together[1]):
            torch.testing.assert_close(mass, torch.cat([s[1][layer] for s in single]), atol=1e-5, rtol=1e-5)
        return
    want = run(model, batch, "eager")
    assert want[1][0].std() > 0.02, "attention too uniform to tell keys apart"
    assert_equal(run(model, batch, "abft"), want, batch)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_equal_eager(backend, side):
    model, batch = tiny("llama"), batch_of(side)
    got = run(model, batch, "abft", attention_backend=backend)
    assert_equal(got, run(model, batch, "eager"), batch)


@pytest.mark.skipif(not TRITON_RUNS, reason="needs CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("side", ["left", "right"])
def test_triton_equals_eager(side):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = tiny("llama").to(device), {name: value.to(device) for name, value in batch_of(side).items()}
    got = run(model, batch, "abft", attention_backend="triton")
    assert_equal(got, run(model, batch, "eager"), batch, tolerance=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_does_not_matter(kind):
    model = enable(tiny(kind))
    prompts, groups = random_prompts(LENGTHS)

    def masses(prompts, groups, side):
        batch = padded(prompts, groups, side)
        return torch.stack(attention_mass(model, **batch))  # (L, B, H, 1, G)

    left, right = masses(prompts, groups, "left"), masses(prompts, groups, "right")
    single = torch.cat([masses([p], [g], "left") for p, g in zip(prompts, groups, strict=True)], dim=1)
    torch.testing.assert_close(left, single, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(right, single, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_rows_equal_eager_and_the_selected_ones(side):
    model, batch = tiny("llama", attention="eager"), batch_of(side)
    outputs = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=positions(batch),
        output_attentions=True,
    )
    want = eager_masses(outputs.attentions, batch, all_rows=True)
    enable(model)
    selected = attention_mass(model, **batch)
    del batch["query_positions"]
    everything = attention_mass(model, **batch)
    real = batch["attention_mask"].bool()
    rows = batch_of(side)["query_positions"][:, None, :, None]
    for a, b, c in zip(everything, want, selected, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-6, rtol=1e-5)
        assert a.transpose(1, 2)[~real].count_nonzero() == 0  # padding has no mass
        torch.testing.assert_close(a.take_along_dim(rows, dim=2), c, atol=1e-6, rtol=1e-5)


def test_several_rows_and_other_numbers_of_groups():
    model, batch = enable(tiny("llama")), batch_of("right")
    batch["query_positions"] = torch.tensor([[0, 7, 12]] * 3)
    everything = torch.stack(attention_mass(model, **{**batch, "query_positions": None}, num_groups=3))
    some = torch.stack(attention_mass(model, **batch, num_groups=3))
    assert some.shape == (2, 3, 4, 3, 3)
    torch.testing.assert_close(some, everything[:, :, :, [0, 7, 12]], atol=1e-6, rtol=1e-5)
    assert some[..., 2].count_nonzero() == 0
    only_wrong = torch.where(batch["key_groups"] == 1, 0, -1)
    one = torch.stack(attention_mass(model, **{**batch, "key_groups": only_wrong}, num_groups=1))
    torch.testing.assert_close(one[..., 0], some[..., 1])


def test_masses_follow_their_keys():
    """One key to a group: the mass is the probability of that key, in the group that was asked for."""
    model, batch = tiny("llama", attention="eager"), batch_of("none")
    probabilities = model(batch["input_ids"], output_attentions=True).attentions[1][:, :, -1]
    enable(model)
    groups = torch.full((2, 20), -1)
    groups[:, 4], groups[:, 11] = 0, 1
    mass = attention_mass(model, batch["input_ids"], groups, query_positions=torch.full((2, 1), 19))[1][:, :, 0]
    torch.testing.assert_close(mass, probabilities[..., [4, 11]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_prompts_equal_single_ones(kind):
    model = enable(tiny(kind))
    prompts, groups = random_prompts(LENGTHS)
    together = torch.stack(attention_mass(model, **packed(prompts, groups)))
    single = [torch.stack(attention_mass(model, **packed([p], [g]))) for p, g in zip(prompts, groups, strict=True)]
    torch.testing.assert_close(together, torch.cat(single, dim=1), atol=1e-6, rtol=1e-5)


def test_packing_as_transformers_collators_tell_it():
    """By position_ids alone, and with flash attention's arguments beside them; the rows counted over the packed row."""
    model, batch = enable(tiny("llama")), batch_of("packed")
    want = attention_mass(model, **batch)
    bounds = batch.pop("cu_seqlens").to(torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 20, "max_length_k": 20}
    for arguments in ({}, flash):
        for a, b in zip(
            attention_mass(model, **batch, position_ids=positions({"cu_seqlens": bounds}), **arguments),
            want,
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing(kind):
    model, batch = tiny(kind), batch_of("left")
    want = run(model, batch, "abft")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_equal(run(model, batch, "abft"), want, batch, tolerance=1e-6)


def test_compiled_forward():
    model, batch = tiny("llama"), batch_of("left")
    want = run(model, batch, "abft")
    compiled = torch.compile(model, backend="aot_eager")
    outputs = forward_with_mass(compiled, **batch, logits_to_keep=0)
    model.zero_grad()
    loss_of(outputs.logits, outputs.attentions, batch).backward()
    gradients = {name: parameter.grad for name, parameter in query_key(model).items()}
    assert_equal((outputs.logits, outputs.attentions, gradients), want, batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_autocast(kind):
    """In bfloat16 autocast as far from float32 as eager attention is."""
    model, batch = tiny(kind), batch_of("left")
    exact = run(model, batch, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = run(model, batch, "eager"), run(model, batch, "abft")

    def distance(a, b):
        return max(((x.float() - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))

    for part in (1, 2):  # masses, gradients
        values = [list(r[part].values()) if part == 2 else r[part] for r in (ours, eager, exact)]
        assert distance(values[0], values[2]) < 1.5 * distance(values[1], values[2]) + 1e-3
    assert ours[1][0].dtype == torch.float32


def test_dropout_acts_on_the_output_and_not_on_mass():
    model, batch = enable(tiny("gpt2", attn_pdrop=0.5)), batch_of("left")
    quiet = forward_with_mass(model, **batch)
    model.train()
    torch.manual_seed(0)
    noisy = forward_with_mass(model, **batch)
    torch.testing.assert_close(noisy.attentions[0], quiet.attentions[0])  # before any dropout
    assert not torch.allclose(noisy.logits, quiet.logits)


def test_peft_model():
    model, batch = tiny("llama"), batch_of("left")
    want = [mass.detach() for mass in attention_mass(enable(model), **batch)]
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    assert is_enabled(wrapped)
    outputs = forward_with_mass(wrapped, **batch)
    assert not torch.allclose(outputs.attentions[0], want[0])
    with wrapped.disable_adapter():
        for a, b in zip(attention_mass(wrapped, **batch), want, strict=True):
            torch.testing.assert_close(a, b)
    torch.stack(outputs.attentions).sum().backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)


def test_decoder_without_a_head():
    model, batch = tiny("llama"), batch_of("left")
    want = attention_mass(enable(model), **batch)
    for a, b in zip(attention_mass(model.model, **batch), want, strict=True):
        assert torch.equal(a, b)


# --- plain use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_groups_it_is_plain_attention(kind, side):
    model, batch = tiny(kind), batch_of(side)
    arguments = {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions(batch)
    }  # fmt: skip
    want = model(**arguments).logits
    got = enable(model)(**arguments).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mistral_window", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_with_a_cache(kind, side):
    model, batch = tiny(kind, spread=0.3), batch_of(side)

    def generate():
        return model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12, do_sample=False,
            pad_token_id=0, eos_token_id=49, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    want = generate()
    enable(model)
    got = generate()
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(OLD, reason="heads hand arguments down from transformers 5.3 on")
def test_mass_over_a_cache():
    model, batch = enable(tiny("llama")), batch_of("none")
    ids, groups = batch["input_ids"], batch["key_groups"]
    want = torch.stack(attention_mass(model, ids, groups))
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    outputs = model(ids[:, 12:], past_key_values=cache, key_groups=groups, output_attentions=True)
    torch.testing.assert_close(torch.stack(outputs.attentions), want[:, :, :, 12:], atol=1e-6, rtol=1e-5)
    cache.crop(-1)
    outputs = model(
        ids[:, 19:], past_key_values=cache, key_groups=groups, query_positions=torch.full((2, 1), 19),
        output_attentions=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(outputs.attentions), want[:, :, :, 19:], atol=1e-6, rtol=1e-5)


def test_switched_on_and_off():
    model = tiny("llama")
    assert not is_enabled(model)
    assert enable(model) is model
    assert is_enabled(model)
    assert is_enabled(enable(model))
    model.set_attn_implementation("sdpa")
    assert not is_enabled(model)
    batch = batch_of("left")
    outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(
        outputs.logits, tiny("llama")(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, atol=0, rtol=0
    )


def test_loaded_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="abft")
    assert is_enabled(model)
    batch = batch_of("left")
    want = attention_mass(enable(tiny("llama")), **batch)
    assert all(torch.equal(a, b) for a, b in zip(attention_mass(model, **batch), want, strict=True))


def test_import_changes_two_registries_and_nothing_else():
    code = """
import torch, transformers.masking_utils as masks, transformers.modeling_utils as models
from transformers import LlamaForCausalLM, Trainer
from transformers.models.llama import modeling_llama as llama
names = lambda: (set(models.ALL_ATTENTION_FUNCTIONS.keys()), set(masks.ALL_MASK_ATTENTION_FUNCTIONS.keys()))
def contents():
    spaces = (models, masks, llama, LlamaForCausalLM, llama.LlamaAttention, models.PreTrainedModel, Trainer)
    return [dict(vars(s)) for s in spaces] + [dict(vars(torch.nn.Module)), dict(vars(torch.nn.functional))]
before, inside = names(), contents()
import abft.attention, abft.training, abft.weights
after = names()
assert [a - b for a, b in zip(after, before)] == [{"abft"}, {"abft"}], after
assert [b - a for a, b in zip(after, before)] == [set(), set()]
for old, new in zip(inside, contents()):
    changed = [k for k in old if old[k] is not new.get(k) and k != "__warningregistry__"]
    assert not changed, changed
print("unpatched")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "unpatched", result.stderr


# --- refusals ---------------------------------------------------------------------------------------------


def mass_of(model, batch=None, **options: Any):
    return attention_mass(model, **{**(batch or batch_of("none")), **options})


NOT_CAUSAL = "serves causal masks with padding"


def test_a_window_that_the_mask_lacks_is_refused():
    """Which of the two is right cannot be told: transformers' own kernels differ."""
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
    """Releases before 5.3 take OpenAI-GPT for a model that goes through the interface; it gives (B, H, N, N)."""
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
        ({"indices": torch.zeros(1, 6, 2)}, "a choice of keys"),
        ({"relative_bias": torch.zeros(2, 6, 6)}, "argument 'relative_bias' that is not known"),
        ({"is_causal": False}, "bidirectional or cross attention"),
        ({"attention_mask": adapter.Bounds(served=False)}, "serves causal masks with padding"),
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
    """Before 5.3 GPT-2 keeps these to its eager code; whatever is given must be eager's."""
    model, batch = tiny("gpt2", **change), batch_of("none")
    want = run(model, batch, "eager")
    if not OLD:
        assert_equal(run(model, batch, "abft"), want, batch)
        return
    with pytest.raises(NotImplementedError, match="a scale of the scores"):
        run(model, batch, "abft")


def test_bounds_stand_for_a_causal_mask_whatever_the_module_says():
    bounds = adapter.Bounds(seq_lens=torch.tensor([6], dtype=torch.int32))
    arguments = forward_arguments(attention_mask=bounds, is_causal=False)
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
    result = adapter._mask(2, 12, mask_function=MASKS[name], attention_mask=mask, q_length=12)
    if name == "causal":
        assert (result is None) != padding
        assert not padding or result.seq_lens.tolist() == [12, 9]
        return
    assert not result.served
    with pytest.raises(NotImplementedError, match=NOT_CAUSAL):
        adapter._attention_forward(**forward_arguments(attention_mask=result))


@pytest.mark.parametrize("name", MASKS)
def test_windows_are_told_from_what_is_none(name):
    """transformers names a local size for windows and for chunks."""
    result = adapter._mask(2, 12, mask_function=MASKS[name], q_length=12, local_size=5)
    if name == "causal":
        assert result is None
    elif name == "window":
        assert result == adapter.Bounds(window=5)
    else:
        assert not result.served
    assert adapter._mask(2, 12, mask_function=MASKS["window of 11"], q_length=12, local_size=11).window == 11


def packing(bounds, window=99):
    of = torch.tensor([s for s, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(a, b)])
    return lambda b, h, q, k: (k <= q) & (of[q] == of[k]) & (k > q - window)


def test_packed_sequences_are_read_from_the_mask():
    bounds = [0, 4, 5, 12]
    result = adapter._mask(1, 12, mask_function=packing(bounds), q_length=12)
    assert result.served
    assert result.cu_seqlens.tolist() == bounds
    result = adapter._mask(1, 12, mask_function=packing(bounds, window=3), q_length=12, local_size=3)
    assert (result.window, result.cu_seqlens.tolist()) == (3, bounds)
    for strange in (
        lambda b, h, q, k: packing(bounds)(b, h, q, k) | ((k == 0) & (q == 8)),
        lambda b, h, q, k: packing(bounds)(b, h, q, k) & ~((q == 11) & (k == 7)),
    ):
        assert not adapter._mask(1, 12, mask_function=strange, q_length=12).served
    assert not adapter._mask(2, 12, mask_function=packing(bounds), q_length=12).served


def test_chunks_that_end_in_the_padding_are_no_matter():
    # As Llama 4 makes them: chunks counted from each sample's first token.
    def chunks(b, h, q, k):
        start = torch.tensor([0, 4])[b]
        return (k <= q) & ((k - start) // 8192 == (q - start) // 8192)

    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :4] = False
    bounds = adapter._mask(2, 12, mask_function=chunks, attention_mask=mask, q_length=12)
    assert (bounds.seq_lens.tolist(), bounds.seq_starts.tolist()) == ([12, 8], [0, 4])


def test_mask_by_cache_position_as_older_releases_give_it():
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, :2] = False
    new = adapter._mask(1, 12, attention_mask=mask, q_length=3, q_offset=9)
    old = adapter._mask(1, 12, attention_mask=mask, cache_position=torch.arange(9, 12))
    assert [x.tolist() for x in new[:2]] == [x.tolist() for x in old[:2]] == [[10], [2]]
    with pytest.raises(TypeError, match="neither q_length nor cache_position"):
        adapter._mask(1, 12)


def test_mask_that_may_not_be_skipped_is_not_skipped():
    assert adapter._mask(2, 6, q_length=6) is None
    assert adapter._mask(2, 6, q_length=6, allow_is_causal_skip=False) == adapter.Bounds()


def test_sample_without_tokens():
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    assert adapter._mask(2, 6, attention_mask=mask, q_length=6).seq_lens.tolist() == [6, 0]
