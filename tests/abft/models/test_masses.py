"""The pass that training takes: masses from the decoder alone, and restricted gradients, against whole models."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import packed, padded, random_prompts, tiny

from abft.losses import abft_loss
from abft.models.attention import enable
from abft.models.masses import attention_mass, forward, layer_masses
from abft.models.projections import train_parameters

KINDS = ["llama", "gpt2", "mistral_window", "gemma2", "gpt_oss", "deepseek_v3", "gpt_neox", "phi3"]
LENGTHS = (20, 13, 17)


def batch_of(side: str) -> dict[str, torch.Tensor]:
    prompts, groups = random_prompts(LENGTHS)
    return packed(prompts, groups) if side == "packed" else padded(prompts, groups, side)


def gradients(model, masses):
    model.zero_grad()
    weighted = [(mass * torch.linspace(-1, 2, mass.numel()).view_as(mass)).sum() for mass in masses]
    sum((i + 1) * term for i, term in enumerate(weighted)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, f"{name}: {error:.1e}"


class Run(Exception):
    pass


@pytest.mark.parametrize("side", ["left", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_model(kind, side):
    model, batch = enable(tiny(kind)), batch_of(side)
    whole = attention_mass(model, **batch)
    want = gradients(model, whole)
    alone = layer_masses(model, **batch)
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert_close(gradients(model, alone), want)


def test_all_rows_equal_the_whole_model():
    model, batch = enable(tiny("llama")), batch_of("left")
    del batch["query_positions"]
    whole = attention_mass(model, **batch)
    want = gradients(model, whole)
    alone = layer_masses(model, **batch)
    torch.testing.assert_close(torch.stack(alone), torch.stack(whole), atol=1e-6, rtol=1e-5)
    assert_close(gradients(model, alone), want)


def test_nothing_after_the_last_scores_runs():
    model, batch = enable(tiny("llama")), batch_of("left")

    def ran(*_: Any) -> None:
        raise Run

    for module in (
        model.lm_head,
        model.model.norm,
        model.model.layers[-1].mlp,
        model.model.layers[-1].self_attn.o_proj,
    ):
        module.register_forward_pre_hook(ran)
    assert len(layer_masses(model, **batch)) == 2
    with pytest.raises(Run):
        attention_mass(model, **batch)


def test_checkpointing_gives_the_same():
    model, batch = enable(tiny("llama")), batch_of("left")
    want = gradients(model, layer_masses(model, **batch))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_close(gradients(model, layer_masses(model, **batch)), want, 1e-6)


def restricted_by_hooks(model, batch, loss_of):
    """Gradients of the summed loss with every layer's input detached, in eager attention, by autograd alone."""
    model.set_attn_implementation("eager")
    handles = [
        layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        for layer in model.base_model.get_submodule("h" if model.config.model_type == "gpt2" else "layers")
    ]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    outputs = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions, output_attentions=True
    )
    indicator = torch.stack([(batch["key_groups"] == g).float() for g in (0, 1)], dim=-1)
    rows = batch["query_positions"][:, None, :, None]
    masses = [a.take_along_dim(rows, dim=2) @ indicator[:, None] for a in outputs.attentions]
    model.zero_grad()
    loss_of(masses).backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral_window", "phi3"])
def test_restricted_gradients_equal_autograd_on_the_detached_graph(kind):
    model, batch = tiny(kind), batch_of("left")
    train_parameters(model)

    def loss_of(masses):
        k, lengths = torch.full((3,), 4), torch.tensor(LENGTHS)
        return abft_loss(masses, torch.tensor([2, 1, 3]), k, lengths, head_filter=False).per_prompt.sum()

    want = restricted_by_hooks(model, batch, loss_of)
    enable(model).zero_grad()

    def backward(mass):
        loss_of([mass]).backward()
        return mass.detach()

    masses = layer_masses(model, **batch, detach=True, on_mass=backward)
    assert not any(mass.requires_grad for mass in masses)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(got, want)
    # Left to autograd, the same: nothing but the detaching restricts them.
    model.zero_grad()
    loss_of(layer_masses(model, **batch, detach=True)).backward()
    assert_close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want)


def test_restricted_gradients_differ_from_full_ones():
    model, batch = enable(tiny("llama")), batch_of("left")
    train_parameters(model)
    full = gradients(model, layer_masses(model, **batch))
    restricted = gradients(model, layer_masses(model, **batch, detach=True))
    last, first = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(restricted[last], full[last])
    assert (restricted[first] - full[first]).norm() > 0.1 * full[first].norm()


def test_restricted_gradients_of_lora():
    batch = batch_of("packed")
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(enable(tiny("llama")), config)
    got = gradients(model, layer_masses(model, **batch, detach=True))
    assert len(got) == 2 * 2 * 2
    assert all("lora_" in name for name in got)


def test_no_graph_outlives_its_layer():
    """With the gradient taken in the pass, what a layer kept is gone when the next one begins."""
    model, batch = enable(tiny("llama")), batch_of("left")
    train_parameters(model)
    alive = []

    def pack(tensor):
        alive.append(None)
        return tensor

    def unpack(tensor):
        return tensor

    kept = []

    def backward(mass):
        mass.sum().backward()
        kept.append(len(alive))
        assert mass.grad_fn.next_functions[0][0] is not None
        with pytest.raises(RuntimeError, match="second time"):
            mass.sum().backward()
        return mass.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        layer_masses(model, **batch, detach=True, on_mass=backward)
    assert kept == [len(alive) // 2, len(alive)]  # the same for each layer, and nothing after the last one


def test_refusals():
    model, batch = enable(tiny("llama")), batch_of("left")
    with pytest.raises(ValueError, match="unwrap the model first"):
        layer_masses(torch.compile(model, backend="eager"), **batch, detach=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing has nothing to save"):
        layer_masses(model, **batch, detach=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_packed_forward_equals_padded(kind):
    model = enable(tiny(kind))
    together, apart = batch_of("packed"), batch_of("right")
    logits = forward(model, input_ids=together["input_ids"], cu_seqlens=together["cu_seqlens"]).logits[0]
    mask = apart["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = forward(model, input_ids=apart["input_ids"], attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits, want[mask.bool()], atol=1e-5, rtol=1e-5)
