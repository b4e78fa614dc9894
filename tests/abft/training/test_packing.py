"""Packed prompts, token budgets and restricted gradients in the trainer."""

import pytest
import torch
from tiny_models import tiny
from trainers import LABEL_LOOKERS, assert_same_trajectory, losses, trained, trainer_of

from abft.models.bounds import token_mask
from abft.models.masses import layer_masses
from abft.prompts.collation import CORRECT_LABELS, NO_GROUP, Collator
from abft.training.config import ABFTConfig


def test_a_packed_batch_holds_the_padded_one(toy_prompts, toy_builder):
    prompts = toy_prompts[:5]
    padded, packed = Collator()(prompts), Collator(packing=True)(prompts)
    mask = token_mask(padded["seq_lens"], None, padded["input_ids"].shape[1])
    assert packed["cu_seqlens"].tolist() == [0, *torch.tensor([p.length for p in prompts]).cumsum(0).tolist()]
    for name in ("input_ids", "key_groups", "position_ids"):
        assert torch.equal(packed[name][0], padded[name][mask]), name
        assert packed[name].dtype == padded[name].dtype
    assert packed["query_positions"][:, 0].tolist() == [end - 1 for end in packed["cu_seqlens"][1:].tolist()]
    for name in ("prompt_lengths", "demonstrations", "correct_demonstrations", "labels", "label_ids"):
        assert torch.equal(packed[name], padded[name]), name
    assert "seq_lens" not in packed
    assert torch.equal(padded["correct_demonstrations"][:, 0], (padded["key_groups"] == CORRECT_LABELS).sum(1))
    assert (packed["key_groups"] != NO_GROUP).sum() == 4 * 5


def test_parts_keep_to_the_budget(toy_prompts, toy_builder):
    longest = max(prompt.length for prompt in toy_prompts)
    total = sum(prompt.length for prompt in toy_prompts)
    for budget in (longest, 2 * longest + 3, total):
        batch = Collator(packing=True, tokens_per_batch=budget)(toy_prompts)
        parts = batch.get("parts", [batch])
        assert all(part["input_ids"].shape[1] <= budget for part in parts)
        assert sum(len(part["labels"]) for part in parts) == len(toy_prompts)
        assert len(parts) <= 1.25 * total / budget + 1
        tokens = sorted(tuple(part["input_ids"][0].tolist()) for part in parts)
        assert sum(map(len, tokens)) == total
    with pytest.raises(ValueError, match=f"over tokens_per_batch={longest - 1}; raise it"):
        Collator(packing=True, tokens_per_batch=longest - 1)(toy_prompts)


def test_padded_parts_keep_to_the_budget(toy_prompts):
    longest = max(prompt.length for prompt in toy_prompts)
    for budget in (longest, 3 * longest + 1):
        parts = Collator(tokens_per_batch=budget)(toy_prompts)["parts"]
        assert all(part["input_ids"].numel() <= budget for part in parts)
        assert sum(len(part["labels"]) for part in parts) == len(toy_prompts)
        assert len(parts) <= len(toy_prompts) * longest / budget + 1
    with pytest.raises(ValueError, match=f"over tokens_per_batch={longest - 1}; raise it"):
        Collator(tokens_per_batch=longest - 1)(toy_prompts)


def test_one_sample_alone_needs_no_layout(toy_prompts):
    alone, plain = Collator(packing=True)(toy_prompts[:1]), Collator()(toy_prompts[:1])
    assert alone.keys() == plain.keys()
    assert "cu_seqlens" not in alone
    assert "seq_lens" not in alone


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "changes", [{}, {"method": "e2e"}, {"restricted_gradient": True}], ids=["full", "e2e", "restricted"]
)
def test_packing_and_budgets_do_not_matter(kind, changes, toy_prompts, toy_builder, tmp_path):
    """One by one, padded, packed, within a budget, and as the defaults choose: one trajectory."""
    longest = max(prompt.length for prompt in toy_prompts)
    batches = [
        {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 8, "packing": False},
        {"per_device_train_batch_size": 8, "packing": False, "tokens_per_batch": 2 * longest},
        {"per_device_train_batch_size": 32, "packing": True, "tokens_per_batch": None},
        {"per_device_train_batch_size": 32},
        {"per_device_train_batch_size": 32, "packing": True, "tokens_per_batch": 3 * longest},
    ]  # fmt: skip
    options = {**LABEL_LOOKERS, **({"sliding_window": 20} if kind == "mistral" else {})}
    runs = [
        trained(tiny(kind, **options), toy_prompts, toy_builder, tmp_path, num_train_epochs=2, **changes, **batch)
        for batch in batches
    ]
    assert len(set(losses(runs[0]))) == 4
    for other in runs[1:]:
        assert_same_trajectory(runs[0], other)


def test_restricted_gradients_equal_autograd(toy_prompts, toy_builder, tmp_path):
    """A step of the trainer against the summed loss on the detached graph."""
    model = tiny("llama", **LABEL_LOOKERS)
    trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path, restricted_gradient=True)
    batch = Collator(packing=True)(toy_prompts[:8])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    names = ("input_ids", "key_groups", "query_positions", "cu_seqlens")
    masses = layer_masses(model, **{name: batch[name] for name in names}, detach=True)
    trainer.objective.losses(masses, batch).per_sample.mean().backward()
    assert got.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in got.items():
        want = dict(model.named_parameters())[name].grad
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(gradient, want, atol=1e-7, rtol=1e-5)


def test_restricted_training_takes_another_way(toy_prompts, toy_builder, tmp_path):
    full, restricted = (
        trained(
            tiny("llama"),
            toy_prompts,
            toy_builder,
            tmp_path,
            restricted_gradient=on,
            head_filter=False,
            learning_rate=1e-2,
        )
        for on in (False, True)
    )
    assert losses(full)[0] == pytest.approx(losses(restricted)[0], rel=1e-6)
    assert losses(full)[-1] != pytest.approx(losses(restricted)[-1], rel=1e-3)
    assert losses(restricted)[-1] < losses(restricted)[0]


@pytest.mark.parametrize("restricted", [False, True])
def test_bfloat16_stays_near_float32(restricted, toy_prompts, toy_builder, tmp_path):
    exact, half = (
        trained(
            tiny("llama"),
            toy_prompts,
            toy_builder,
            tmp_path,
            restricted_gradient=restricted,
            head_filter=False,
            packing=True,
            bf16=bf16,
            learning_rate=1e-2,
        )
        for bf16 in (False, True)
    )
    assert losses(half) == pytest.approx(losses(exact), rel=5e-3)
    assert losses(half) != losses(exact)
    assert losses(half)[-1] < losses(half)[0]


def test_offloaded_activations_do_not_matter(toy_prompts, toy_builder, tmp_path):
    runs = [
        trained(
            tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, num_train_epochs=1,
            offload_activations=on,
        )
        for on in (False, True)
    ]  # fmt: skip
    assert_same_trajectory(*runs, tolerance=1e-9)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens_per_batch": "all"}, "tokens_per_batch='all' must be a number of tokens from 1 on, 'auto', or None"),
        ({"auto_find_batch_size": True}, "would change the pseudo-batch"),
        ({"tokens_per_batch": 0}, "tokens_per_batch=0"),
        ({"restricted_gradient": True, "method": "e2e"}, "method='e2e' has a loss at the last layer only"),
        ({"restricted_gradient": True, "per_head_mean": True}, "per_head_mean=True does not go with it"),
        ({"restricted_gradient": True, "gradient_checkpointing": True}, "gradient_checkpointing=True does not"),
    ],
)
def test_options_that_contradict_each_other(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        ABFTConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_prompts_that_do_not_fit_are_refused_first(toy_prompts, toy_builder, tmp_path):
    longest = max(prompt.length for prompt in toy_prompts)
    with pytest.raises(ValueError, match=f"the longest prompt has {longest} tokens, over tokens_per_batch=10"):
        trainer_of(tiny("llama"), toy_prompts, toy_builder, tmp_path, packing=True, tokens_per_batch=10)
    short = tiny("llama", max_position_embeddings=16)
    with pytest.raises(ValueError, match=f"the longest prompt has {longest} tokens, the model's context 16"):
        trainer_of(short, toy_prompts, toy_builder, tmp_path)
