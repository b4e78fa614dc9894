"""Only W_Q and W_K are trained: which parameters they are, and that nothing else moves."""

import pytest
import torch
import transformers
from tiny_models import random_prompts, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from abft.models.projections import (
    ARCHITECTURES,
    Architecture,
    Projection,
    TrainedParameter,
    find_kv,
    find_qk,
    lora_qk,
    train_parameters,
)

# Two layers, width 32, 4 heads of 8, 2 key-value heads where they are grouped.
SPLIT = [(f"model.layers.{i}.self_attn.{p}_proj.weight", None, None) for i in (0, 1) for p in "qk"]
EXPECTED = {
    "llama": SPLIT,
    "qwen2": SPLIT,
    "phi3": [(f"model.layers.{i}.self_attn.qkv_proj.weight", 0, 32 + 16) for i in (0, 1)],
    "gpt2": [(f"transformer.h.{i}.attn.c_attn.weight", 1, 64) for i in (0, 1)],
    "gpt_neox": [(f"gpt_neox.layers.{i}.attention.query_key_value.weight", 0, 16) for i in (0, 1)],
    "deepseek_v3": [
        (f"model.layers.{i}.self_attn.{name}.weight", dim, length)
        for i in (0, 1)
        for name, dim, length in (
            ("q_a_proj", None, None),
            ("q_b_proj", None, None),
            ("kv_a_proj_with_mqa", 0, 8),
            ("kv_b_proj", 0, 8),
        )
    ],
}


def step(model, optimizer):
    ids = torch.stack(random_prompts((12, 12))[0])
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", EXPECTED)
def test_finds_query_and_key(kind):
    assert [(p.name, p.dim, p.length) for p in find_qk(tiny(kind))] == EXPECTED[kind]
    assert [p.fused for p in find_qk(tiny(kind))] == [dim is not None for _, dim, _ in EXPECTED[kind]]


@pytest.mark.parametrize("kind", EXPECTED)
def test_only_query_and_key_move(kind):
    model = tiny(kind)
    trained = {item.name: item for item in train_parameters(model)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        step(model, optimizer)
    for name, tensor in model.state_dict().items():
        if name not in trained:
            assert torch.equal(tensor, before[name]), name
            continue
        item = trained[name]
        moved = tensor != before[name]
        assert item.view(moved).float().mean() > 0.9, name
        assert moved.sum() == item.view(moved).sum(), f"{name}: v moved"


def test_fused_parts_are_query_and_key():
    """The first part of the projection is what the model splits off as q and k."""
    model = tiny("gpt2", seed=1)
    item = find_qk(model)[0]
    x = torch.randn(3, 32)
    layer = model.transformer.h[0].attn.c_attn
    q, k, v = layer(x).split(32, dim=1)
    with torch.no_grad():
        item.view(layer.weight).zero_()
    assert torch.equal(layer(x)[:, 64:], v)
    assert not torch.equal(layer(x)[:, :32], q)
    assert not torch.equal(layer(x)[:, 32:64], k)

    phi = tiny("phi3", seed=1)
    item, weight = find_qk(phi)[0], phi.model.layers[0].self_attn.qkv_proj.weight
    assert item.view(weight).shape == (48, 32)
    assert torch.equal(item.view(weight), weight[:48])


def test_parts_of_heads_are_query_and_key():
    """Zeroing the trained part leaves the values of each head, and of the latent attention the latent."""
    neox = tiny("gpt_neox", seed=1)
    attention = neox.gpt_neox.layers[0].attention
    x = torch.randn(3, 32)
    before = attention.query_key_value(x).view(3, 4, 3, 8)
    with torch.no_grad():
        find_qk(neox)[0].view(attention.query_key_value.weight).zero_()
    after = (attention.query_key_value(x) - attention.query_key_value.bias).view(3, 4, 3, 8)
    assert after[:, :, :2].count_nonzero() == 0
    torch.testing.assert_close(after[:, :, 2], before[:, :, 2])

    latent = tiny("deepseek_v3", seed=1)
    attention, items = latent.model.layers[0].self_attn, {p.name.split(".")[-2]: p for p in find_qk(latent)}
    a, b = attention.kv_a_proj_with_mqa, attention.kv_b_proj
    before_a, before_b = a(x), b(x[:, :8]).view(3, 4, 20)
    with torch.no_grad():
        items["kv_a_proj_with_mqa"].view(a.weight).zero_()
        items["kv_b_proj"].view(b.weight).zero_()
    assert torch.equal(a(x)[:, :8], before_a[:, :8])
    assert a(x)[:, 8:].count_nonzero() == 0
    assert torch.equal(b(x[:, :8]).view(3, 4, 20)[..., 8:], before_b[..., 8:])
    assert b(x[:, :8]).view(3, 4, 20)[..., :8].count_nonzero() == 0


def test_view_shares_memory():
    tensor = torch.zeros(4, 6)
    TrainedParameter("x", 1, 2).view(tensor).fill_(1)
    assert tensor.sum() == 8
    assert TrainedParameter("x").view(tensor) is tensor


def test_gradient_of_the_value_part_is_zero_over_accumulation():
    model = tiny("gpt2")
    (item, _) = train_parameters(model)
    weight = dict(model.named_parameters())[item.name]
    ids = torch.stack(random_prompts((12, 12))[0])
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    assert weight.grad[:, 64:].count_nonzero() == 0
    reference = tiny("gpt2")
    for _ in range(2):
        reference(ids, labels=ids).loss.backward()
    torch.testing.assert_close(weight.grad[:, :64], dict(reference.named_parameters())[item.name].grad[:, :64])


def codegen():
    config = transformers.CodeGenConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    return AutoModelForCausalLM.from_config(config)


def test_unknown_projections_raise():
    model = codegen()
    with pytest.raises(ValueError, match="found q and k projections in 0 of 2 layers of"):
        find_qk(model)
    with pytest.raises(ValueError, match="lora_target_modules"):
        train_parameters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_new_architecture_is_one_row(monkeypatch):
    """CodeGen stores q, v and k of a quarter of the heads in each of four blocks."""
    row = Architecture(
        "CodeGen's qkv_proj",
        lambda module, children: type(module).__name__ == "CodeGenAttention",
        lambda module, children: (
            Projection("qkv_proj", dict.fromkeys("qvk", children["qkv_proj"].in_features // 4), blocks=4),
        ),
    )
    monkeypatch.setattr("abft.models.projections.ARCHITECTURES", (*ARCHITECTURES, row))
    model = codegen()
    name = "transformer.h.0.attn.qkv_proj.weight"
    assert find_kv(model)[0] == TrainedParameter(name, dim=0, length=16, start=8, blocks=4)
    with pytest.raises(ValueError, match="q, k are not side by side in q, v, k"):
        find_qk(model)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", [("self_attn.k_proj", None, 0, 1), ("self_attn.v_proj", None, 0, 1)]),
        ("gpt2", [("attn.c_attn", 64, 32, 1)]),
        ("gpt_neox", [("attention.query_key_value", 16, 8, 4)]),
        ("phi3", [("self_attn.qkv_proj", 32, 32, 1)]),
    ],
)
def test_finds_key_and_value(kind, parts):
    found = [(item.name, item.length, item.start, item.blocks) for item in find_kv(tiny(kind)) if ".0." in item.name]
    assert [(name.split(".0.")[1].removesuffix(".weight"), *rest) for name, *rest in found] == parts


def test_missing_layer_raises():
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj = None
    with pytest.raises(ValueError, match="in 1 of 2 layers"):
        find_qk(model)


def test_projection_of_another_layout_is_not_taken_for_phi3():
    class LightningAttention(nn.Module):  # q, k and v of each head side by side, as in MiniMax
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.qkv_proj = nn.Linear(32, 96, bias=False)

    model = tiny("phi3")
    model.model.layers[0].self_attn = LightningAttention(model.config)
    with pytest.raises(ValueError, match="in 1 of 2 layers"):
        find_qk(model)


def test_quantized_weights_raise():
    model = tiny("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj.weight is quantized to torch.uint8; train it with LoRA"):
        train_parameters(model)


def test_lora_trains_its_own_tensors_on_query_and_key():
    model = tiny("llama")
    wrapped = lora_qk(model, r=3, alpha=6)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "k_proj" in name) for name in trained)
    assert {p.shape[0] if "lora_A" in n else p.shape[1] for n, p in wrapped.named_parameters() if n in trained} == {3}
    assert wrapped.peft_config["default"].lora_alpha == 6
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    step(wrapped, torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3))
    moved = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in trained if "lora_B" in name}  # A moves once B is not 0


def test_lora_with_named_targets_on_an_unknown_model():
    wrapped = lora_qk(codegen(), target_modules=["qkv_proj"])
    assert any("qkv_proj.lora_A" in name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_lora_errors():
    with pytest.raises(ValueError, match="LoRA rank must be at least 1, got 0"):
        lora_qk(tiny("llama"), r=0)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module named query, key_proj|key_proj, query"):
        lora_qk(tiny("llama"), target_modules=["query", "key_proj", "q_proj"])
    for kind, name in (("gpt2", "c_attn"), ("phi3", "qkv_proj")):
        with pytest.raises(ValueError, match=rf"q, k and v in one projection \(.*{name}.weight\); LoRA"):
            lora_qk(tiny(kind))
