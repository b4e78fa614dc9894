"""The Hugging Face adapter against eager attention: logits, masses, gradients."""

import subprocess
import sys

import pytest
import torch
from parity import (
    KINDS,
    LENGTHS,
    TRITON_RUNS,
    assert_equal,
    batch_of,
    eager_masses,
    loss_of,
    positions,
    query_key,
    run,
)
from peft import LoraConfig, get_peft_model
from tiny_models import packed, padded, random_prompts, tiny
from transformers import AutoModelForCausalLM, DynamicCache, masking_utils

from abft.models.attention import enable, is_enabled
from abft.models.masses import attention_mass, forward_with_mass

# --- parity -----------------------------------------------------------------------------------------------

# Their packed prompts see one another in transformers' eager attention: the mask is not told of positions. Before
# transformers recounted positions for packed prompts, chunks too went on from one prompt to the next.
TOGETHER_IN_EAGER = {"gpt_oss", "opt"}
if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
    TOGETHER_IN_EAGER.add("llama4")


@pytest.mark.parametrize("side", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_eager(kind, side):
    model, batch = tiny(kind), batch_of(side)
    if side == "packed" and kind in TOGETHER_IN_EAGER:
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
    """Packed by position_ids alone, and with flash attention's arguments too; row positions count the packed tokens."""
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
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=49,
            output_logits=True,
            return_dict_in_generate=True,
        )

    want = generate()
    enable(model)
    got = generate()
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)


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
        ids[:, 19:],
        past_key_values=cache,
        key_groups=groups,
        query_positions=torch.full((2, 1), 19),
        output_attentions=True,
    )
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
import abft.models.attention, abft.training.trainer, abft.models.weights
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
