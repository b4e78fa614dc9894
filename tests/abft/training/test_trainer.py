"""The trainer: equivalent configurations follow one trajectory, resume continues it, and only W_Q and W_K move."""

import itertools
import json
import os
import warnings

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny
from trainers import LABEL_LOOKERS, arguments, assert_same_trajectory, losses, state_of, trained, trainer_of
from transformers import TrainerCallback

from abft.losses import abft_loss
from abft.models.attention import is_enabled
from abft.models.bounds import token_mask
from abft.models.masses import attention_mass
from abft.models.projections import find_qk
from abft.models.weights import load_trained
from abft.prompts.collation import Collator
from abft.training.config import ABFTConfig
from abft.training.trainer import ABFTTrainer


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# --- one trajectory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["abft", "e2e"])
def test_accumulation_and_padding_do_not_matter(method, toy_prompts, toy_builder, tmp_path):
    runs = [
        trained(
            tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, method=method,
            per_device_train_batch_size=size, num_train_epochs=2,
        )
        for size in (8, 1, 32)
    ]  # fmt: skip
    first = runs[0]
    assert first.state.global_step == 4
    assert len(set(losses(first))) == 4
    for other in runs[1:]:
        assert_same_trajectory(first, other)


def test_the_side_of_the_padding_does_not_matter(toy_prompts, toy_builder, tmp_path):
    def run(side):
        trainer = trainer_of(tiny("gpt2", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, num_train_epochs=2)
        trainer.data_collator = Collator(padding_side=side)
        trainer.train()
        return trainer

    assert_same_trajectory(run("right"), run("left"))


def test_gradient_checkpointing_does_not_matter(toy_prompts, toy_builder, tmp_path):
    runs = [
        trained(
            tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, num_train_epochs=1,
            gradient_checkpointing=on,
        )
        for on in (False, True)
    ]  # fmt: skip
    assert_same_trajectory(*runs)


def single_gradients(prompts, builder):
    """Gradients of each prompt alone, by the loss itself and no trainer."""
    model = tiny("llama", **LABEL_LOOKERS)
    model.set_attn_implementation("abft")
    collate = Collator()
    total: dict[str, torch.Tensor] = {}
    for prompt in prompts:
        batch = collate([prompt])
        masses = attention_mass(
            model, batch["input_ids"], batch["key_groups"], query_positions=batch["query_positions"]
        )
        model.zero_grad()
        counts = [batch[name] for name in ("correct_demonstrations", "demonstrations", "prompt_lengths")]
        abft_loss(masses, *counts, row_weights=batch["row_weights"]).loss.backward()
        for item in find_qk(model):
            gradient = dict(model.named_parameters())[item.name].grad
            total[item.name] = total.get(item.name, 0) + gradient / len(prompts)
    return total


@pytest.mark.parametrize("count", [32, 18])
def test_a_step_is_the_mean_of_its_prompts(count, toy_prompts, toy_builder, tmp_path):
    """A whole pseudo-batch, and an uneven last one of 8 + 8 + 2."""
    seen = Gradients()
    trainer = trained(
        tiny("llama", **LABEL_LOOKERS), toy_prompts[:count], toy_builder, tmp_path, callbacks=[seen], num_train_epochs=1
    )
    assert trainer.state.global_step == len(seen.steps) == 1
    want = single_gradients(toy_prompts[:count], toy_builder)
    assert seen.steps[0].keys() == want.keys()
    for name, gradient in seen.steps[0].items():
        assert gradient.abs().max() > 1e-4
        assert (gradient - want[name]).abs().max() < 1e-5 * want[name].abs().max(), name


def test_uneven_last_pseudo_batch(toy_prompts, toy_builder, tmp_path):
    runs = [
        trained(
            tiny("llama", **LABEL_LOOKERS), toy_prompts[:50], toy_builder, tmp_path, num_train_epochs=2,
            per_device_train_batch_size=size,
        )
        for size in (8, 1)
    ]  # fmt: skip
    assert runs[0].state.global_step == 4
    assert_same_trajectory(*runs)


def test_logged_loss_is_the_mean_over_the_prompts(toy_prompts, toy_builder, tmp_path):
    prompts = toy_prompts[:18]
    trainer = trained(
        tiny("llama", **LABEL_LOOKERS), prompts, toy_builder, tmp_path, num_train_epochs=1, wrong_penalty=0.7
    )
    batch = Collator()(prompts)
    model = tiny("llama", **LABEL_LOOKERS)
    model.set_attn_implementation("abft")
    masses = attention_mass(
        model,
        batch["input_ids"],
        batch["key_groups"],
        seq_lens=batch["seq_lens"],
        query_positions=batch["query_positions"],
    )
    want = abft_loss(
        masses,
        batch["correct_demonstrations"],
        batch["demonstrations"],
        batch["prompt_lengths"],
        wrong_penalty=0.7,
        row_weights=batch["row_weights"],
    )
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < want.selected.float().mean() < 1, "the filter passes all heads or none"
    assert entry["loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    assert entry["induction_heads"] == pytest.approx(want.head_counts.float().mean().item())
    assert entry["mass_correct"] == pytest.approx(want.mass_correct.item(), rel=1e-5)
    assert entry["mass_wrong"] == pytest.approx(want.mass_wrong.item(), rel=1e-5)
    assert entry["wrong_penalty"] == 0.7


def test_the_penalty_follows_the_controller(toy_prompts, toy_builder, tmp_path):
    trainer = trained(
        tiny("llama", **LABEL_LOOKERS),
        toy_prompts,
        toy_builder,
        tmp_path,
        learning_rate=1e-2,
        adaption="P",
        pid_proportional=0.5,
    )
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    counts = [entry["induction_heads"] for entry in entries]
    assert counts == pytest.approx(trainer.objective.controller.head_counts)
    penalties = [0.5, 0.5, 0.5]
    for last, now in itertools.pairwise(counts[1:]):
        penalties.append(max(0.0, penalties[-1] + 0.5 * (now - last)))
    assert len(set(penalties)) > 3
    # The count of a step sets the penalty of the next one.
    assert [entry["wrong_penalty"] for entry in entries] == pytest.approx(penalties[:-1])
    assert trainer.objective.controller.weight == pytest.approx(penalties[-1])


def test_the_loss_takes_the_adapted_penalty(toy_prompts, toy_builder, tmp_path):
    batch = Collator()(toy_prompts[:8])

    def loss(penalty, adapted=None):
        model = tiny("llama", **LABEL_LOOKERS)
        trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path, wrong_penalty=penalty)
        trainer.objective.controller.weight = penalty if adapted is None else adapted
        return trainer.compute_loss(model, batch).item()

    assert loss(0.5, adapted=2.0) == loss(2.0)
    assert loss(2.0) > loss(0.5)


def test_a_model_that_scales_no_loss_itself_is_not_scaled_twice(toy_prompts, toy_builder, tmp_path):
    runs = []
    for accepts in (True, False):
        model = tiny("llama", **LABEL_LOOKERS)
        model.accepts_loss_kwargs = accepts
        runs.append(trained(model, toy_prompts, toy_builder, tmp_path, num_train_epochs=1))
    assert_same_trajectory(*runs, tolerance=1e-9)


# --- what is saved ---------------------------------------------------------------------------------------


def test_checkpoint_holds_the_trained_part_alone(toy_prompts, toy_builder, tmp_path):
    trainer = trained(
        tiny("llama"), toy_prompts, toy_builder, tmp_path, save_strategy="epoch", num_train_epochs=1, seed=7
    )
    names = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"abft_config.json", "qk_weights.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    config = json.loads((tmp_path / "checkpoint-2" / "abft_config.json").read_text())
    assert (config["method"], config["seed"], config["learning_rate"]) == ("abft", 7, 1e-3)
    trainer.save_model(tmp_path / "final")
    loaded = load_trained(tiny("llama"), tmp_path / "final")
    assert all(torch.equal(p, state_of(trainer)[name]) for name, p in loaded.named_parameters())


def test_lora_saves_an_adapter(toy_prompts, toy_builder, tmp_path):
    trainer = trained(tiny("llama"), toy_prompts, toy_builder, tmp_path, lora=True, num_train_epochs=1)
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model(tmp_path / "final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "final"))
    loaded = load_trained(tiny("llama"), tmp_path / "final")
    ids = torch.tensor([toy_prompts[0].input_ids])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


# --- what is trained --------------------------------------------------------------------------------------


UNFILTERED = {"abft": {"head_filter": False}, "share": {"head_filter": False}}  # random models have few heads to train


@pytest.mark.parametrize("method", ["abft", "share", "e2e_qk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_only_query_and_key_move(kind, method, toy_prompts, toy_builder, tmp_path):
    model = tiny(kind, **LABEL_LOOKERS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    items = {item.name: item for item in find_qk(model)}
    trained(model, toy_prompts, toy_builder, tmp_path, method=method, num_train_epochs=2, **UNFILTERED.get(method, {}))
    assert is_enabled(model)
    for name, tensor in model.state_dict().items():
        moved = tensor != before[name]
        if name in items:
            assert items[name].view(moved).float().mean() > 0.5, name
            assert moved.sum() == items[name].view(moved).sum(), f"{name}: v moved"
        else:
            assert not moved.any(), name


def test_lora_moves_the_adapter_alone(toy_prompts, toy_builder, tmp_path):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trained(model, toy_prompts, toy_builder, tmp_path, lora=True, head_filter=False, num_train_epochs=2)
    for name, tensor in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace("base_layer.", "")]), name
        elif "lora_B" in name:
            assert tensor.count_nonzero() > 0, name


def masses_of(model, prompts, builder):
    batch = Collator()(prompts)
    names = ("input_ids", "key_groups", "seq_lens", "query_positions")
    with torch.no_grad():
        masses = torch.stack(attention_mass(model.eval(), **{name: batch[name] for name in names}))
    return masses.double().mean(dim=(0, 1, 2, 3)).tolist()


def fine_tuned(prompts, builder, folder, **changes):
    """Mean masses on correct and wrong labels before and after 16 steps."""
    model = tiny("llama")
    trainer = trainer_of(
        model, prompts, builder, folder, head_filter=False, learning_rate=3e-3, num_train_epochs=8, **changes
    )
    before = masses_of(model, prompts, builder)
    trainer.train()
    assert trainer.state.global_step == 16
    return before, masses_of(model, prompts, builder)


def test_training_turns_attention_to_correct_labels(toy_prompts, toy_builder, tmp_path):
    (correct, wrong), (correct_after, wrong_after) = fine_tuned(toy_prompts, toy_builder, tmp_path)
    assert correct_after > 1.5 * correct
    # A random model can recognise correct labels only by the words next to them: the share moves a little.
    assert correct_after / (correct_after + wrong_after) > correct / (correct + wrong)


def test_each_term_does_its_part(toy_prompts, toy_builder, tmp_path):
    before, only_award = fine_tuned(toy_prompts, toy_builder, tmp_path, wrong_penalty=0.0, adaption="none")
    _, only_penalty = fine_tuned(toy_prompts, toy_builder, tmp_path, correct_award=0.0, adaption="none")
    assert only_award[0] > 1.5 * before[0]  # A = 0: more on the correct labels
    assert only_penalty[1] < before[1] / 1.5  # B = 0: less on the wrong ones
    assert only_penalty[0] < only_award[0]


@pytest.mark.parametrize("method", ["abft", "e2e"])
def test_models_with_dropout_train(method, toy_prompts, toy_builder, tmp_path):
    dropout = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    changes = {"method": method, "num_train_epochs": 2, **UNFILTERED.get(method, {})}
    trainer = trained(tiny("gpt2", **dropout), toy_prompts, toy_builder, tmp_path, **changes)
    assert torch.tensor(losses(trainer)).isfinite().all()
    other = trained(tiny("gpt2"), toy_prompts, toy_builder, tmp_path, **changes)
    assert losses(trainer) != pytest.approx(losses(other), rel=1e-4), "no dropout in training"


# --- E2E --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_e2e_is_cross_entropy_at_the_last_token(kind, side, toy_prompts, toy_builder, tmp_path):
    model = tiny(kind)
    trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path, method="e2e")
    batch = Collator(padding_side=side)(toy_prompts[:7])
    mask = token_mask(batch["seq_lens"], batch.get("seq_starts"), batch["input_ids"].shape[1])
    logits = model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
    last = logits[torch.arange(7), batch["query_positions"][:, 0]]
    want = torch.nn.functional.cross_entropy(last, batch["label_ids"])
    got = trainer.compute_loss(model, batch)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    computed = []
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: computed.append(logits.shape[1]))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=torch.tensor(14))
    hook.remove()
    torch.testing.assert_close(loss, want / 2, atol=1e-6, rtol=1e-6)
    assert outputs.shape == (7, logits.shape[2])
    assert computed[0] <= 7  # of the last positions alone


def test_e2e_without_logits_to_keep(toy_prompts, toy_builder, tmp_path, monkeypatch):
    """A model that does not know the argument gives every logit; the right ones must be taken."""
    model = tiny("llama")
    trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path, method="e2e")
    batch = Collator()(toy_prompts[:7])
    want = trainer.compute_loss(model, batch)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, logits_to_keep=None, **kwargs: forward(*args, **kwargs))
    torch.testing.assert_close(trainer.compute_loss(model, batch), want, atol=1e-6, rtol=1e-6)


# --- options, errors, warnings ----------------------------------------------------------------------------


def test_defaults_are_the_papers(tmp_path):
    args = ABFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.pseudo_batch_size, args.num_train_epochs) == (2e-5, 32, 2)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (32, 1)
    accumulating = ABFTConfig(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=4)
    assert accumulating.per_device_train_batch_size == 8
    assert (args.method, args.mass_award, args.adaption) == ("share", 0.1, "PID")
    assert (args.wrong_penalty, args.correct_award) == (0.5, 1.0)
    assert (args.pid_proportional, args.pid_integral, args.pid_derivative) == (0.03, 0.005, 0.005)
    assert (args.weight_decay, args.max_grad_norm, args.lora_r) == (0.0, 0.0, 16)
    assert args.head_filter
    assert not args.per_head_mean
    assert ABFTConfig(output_dir=str(tmp_path), use_cpu=True, lora=True).learning_rate == 1e-4
    assert ABFTConfig(output_dir=str(tmp_path), use_cpu=True, lora=True, learning_rate=3e-4).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "sft"}, "method must be 'share' or 'abft' or 'e2e' or 'e2e_qk' or 'metaicl', got 'sft'"),
        ({"wrong_penalty": -0.5, "method": "abft"}, "wrong_penalty must not be negative, got -0.5"),
        ({"wrong_penalty": 0.2, "method": "share"}, "wrong_penalty=0.2 has no effect with method='share'; leave"),
        ({"mass_award": 0.2, "method": "abft"}, "mass_award=0.2 has no effect with method='abft'; leave it at 0.1"),
        ({"head_filter": False, "method": "e2e"}, "head_filter=False has no effect with method='e2e'"),
        ({"correct_award": -1}, "correct_award must not be negative"),
        (
            {"pseudo_batch_size": 30, "per_device_train_batch_size": 8},
            "pseudo_batch_size=30 is no multiple of per_device_train_batch_size=8 × 1",
        ),
        ({"pseudo_batch_size": 4, "per_device_train_batch_size": 8}, "no multiple"),
        ({"pseudo_batch_size": 0}, "must be at least 1, got 0 and 8"),
        ({"restore_callback_states_from_checkpoint": True}, "leave restore_callback_states_from_checkpoint off"),
    ],
)
def test_options_outside_their_range(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **changes)


def test_trainer_errors(toy_prompts, toy_builder, tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        ABFTTrainer(tiny("llama"), arguments(tmp_path), [])
    decay = arguments(tmp_path, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1 would move the value part of .*c_attn.weight"):
        ABFTTrainer(tiny("gpt2"), decay, toy_prompts)
    ABFTTrainer(tiny("llama"), decay, toy_prompts)
    with pytest.raises(ValueError, match="adaption must be"):
        ABFTTrainer(tiny("llama"), arguments(tmp_path, adaption="D"), toy_prompts)
    with pytest.raises(ValueError, match="no eval_dataset"):
        ABFTTrainer(tiny("llama"), arguments(tmp_path), toy_prompts).evaluate()


def test_warns_once_of_no_heads_at_all(toy_prompts, toy_builder, tmp_path):
    model = tiny("llama", spread=0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, toy_prompts, toy_builder, tmp_path, num_train_epochs=1)
    with pytest.warns(UserWarning, match="no head passes the induction-head filter") as caught:
        trainer.train()
    assert sum("no head passes" in str(warning.message) for warning in caught) == 1
    assert losses(trainer) == [0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_warns_of_collapse(toy_prompts, toy_builder, tmp_path):
    trainer = trainer_of(tiny("llama"), toy_prompts, toy_builder, tmp_path)

    def step(heads):
        sums = {"heads": heads, "mass_correct": 8.0, "mass_wrong": 4.0}
        trainer.steps.add(torch.zeros(32), {name: torch.tensor(value) for name, value in sums.items()})
        trainer.steps.on_step_end(None, None, None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(320.0)
        step(64.0)
    with pytest.warns(
        UserWarning, match=r"step 3: induction heads per prompt fell from 10.00 to 0.50; .* \(now 0.001\)"
    ):
        step(16.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(16.0)  # said once


def test_evaluation_does_not_disturb_training(toy_prompts, toy_builder, tmp_path):
    plain = trained(tiny("llama", **LABEL_LOOKERS), toy_prompts, toy_builder, tmp_path, num_train_epochs=2)
    watched = trained(
        tiny("llama", **LABEL_LOOKERS),
        toy_prompts,
        toy_builder,
        tmp_path,
        num_train_epochs=2,
        eval_dataset=toy_prompts[:8],
        eval_strategy="steps",
        eval_steps=1,
    )
    assert_same_trajectory(plain, watched, tolerance=1e-9)
    entries = [entry for entry in watched.state.log_history if "eval_accuracy" in entry]
    assert len(entries) == 4
    assert entries[0]["eval_n"] == 8
    assert 0 <= entries[0]["eval_true_label_likelihood"] <= 1
    watched.model.eval()
    watched.compute_loss(watched.model, Collator()(toy_prompts[:2]))
    assert watched.steps.empty, "a loss outside of training was counted into a step"


def test_options_reach_the_loss(toy_prompts, toy_builder, tmp_path):
    batch = Collator()(toy_prompts[:8])

    def loss(**changes):
        model = tiny("llama", **LABEL_LOOKERS)
        return trainer_of(model, toy_prompts, toy_builder, tmp_path, **changes).compute_loss(model, batch).item()

    base = loss()
    assert loss(wrong_penalty=0.0) < base
    assert loss(correct_award=2.0) > base
    assert loss(head_filter=False) > base
    assert 0 < loss(per_head_mean=True) < base
    assert loss(correct_award=2.0, wrong_penalty=1.0) == pytest.approx(2 * base)


def test_out_of_memory_says_what_would_save_some(toy_prompts, toy_builder, tmp_path, monkeypatch):
    trainer = trainer_of(tiny("llama"), toy_prompts, toy_builder, tmp_path)

    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer, "compute_loss", too_much)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory in a pass of 8 prompts and \d+ tokens") as caught:
        trainer.train()
    message = str(caught.value)
    for advice in (
        "tokens_per_batch=",
        "restricted_gradient=True",
        "gradient_checkpointing=True",
        "abft plan",
        "20.00 GiB",
    ):
        assert advice in message


def test_a_checkpoint_of_another_method_is_refused(toy_prompts, toy_builder, tmp_path):
    trained(tiny("llama"), toy_prompts, toy_builder, tmp_path, save_strategy="epoch", num_train_epochs=1)
    with pytest.raises(ValueError, match="is of a run with method='abft', this one has 'e2e'"):
        trained(
            tiny("llama"),
            toy_prompts,
            toy_builder,
            tmp_path / "other",
            method="e2e",
            resume=str(tmp_path / "checkpoint-2"),
        )
