"""Attention targets: what a batch of them holds, and that their loss is Eq. 1 of eager attention, row by row."""

import math

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny
from trainers import (
    LABEL_LOOKERS,
    arguments,
    assert_same_trajectory,
    assert_same_weights,
    losses,
    state_of,
    trained,
    trainer_of,
)

import abft
from abft.evaluation.classification import evaluate
from abft.evaluation.label_attention import head_statistics
from abft.losses import abft_loss
from abft.models.bounds import token_mask
from abft.models.masses import attention_mass, layer_masses
from abft.models.projections import find_qk
from abft.prompts.builder import PromptSet
from abft.prompts.collation import CORRECT_LABELS, MASS_INPUTS, NO_GROUP, WRONG_LABELS, Collator
from abft.prompts.targets import AttentionTarget
from abft.training.trainer import ABFTTrainer


def target(length, rows, positive, negative=None, seed=0, label_id=None):
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return AttentionTarget(ids, rows, positive, negative, label_id)


MIXED = [
    target(12, (9, 11), (2, 3), (5,), 0, 7),
    target(20, (19,), (4,), None, 1, 8),
    target(9, (5, 6, 8), (1,), (0, 2, 3), 2, 9),
    target(15, (12,), (10,), (), 3, 10),  # no row sees its last two tokens
]


def many(count, label_id=None):
    """Targets of one to three rows, half of them with every other token as negative."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(1000 + seed)
        length = int(torch.randint(10, 25, (1,), generator=generator))
        rows = list(range(length - 1 - seed % 3, length))
        keys = torch.randperm(rows[0], generator=generator).tolist()
        made.append(target(length, rows, keys[:2], None if seed % 2 else keys[2:5], seed, label_id))
    return made


def as_target(prompt, builder):
    """Return the plain target with the prompt's keys."""
    kinds = {True: [], False: []}
    for position, label in zip(prompt.label_positions, prompt.demonstration_labels, strict=True):
        kinds[label == prompt.query_label].append(position)
    gold = builder.label_token_ids[prompt.query_label]
    return AttentionTarget(prompt.input_ids, [prompt.length - 1], kinds[True], kinds[False], gold)


@pytest.fixture(scope="module")
def labelled_prompts(toy_prompts):
    """Those with a demonstration of the gold label: a target has a positive key."""
    return PromptSet(toy_prompts.builder, [prompt for prompt in toy_prompts if prompt.positive][:32])


def loss_of(batch, masses, **options):
    counts = [batch[name] for name in ("correct_demonstrations", "demonstrations", "prompt_lengths")]
    return abft_loss(masses, *counts, row_weights=batch["row_weights"], **options)


def by_hand(model, item, wrong_penalty, correct_award, head_filter):
    """Eq. 1 from eager attention, one row and head after the other; the loss and the number of heads that pass."""
    attentions = model(torch.tensor([item.input_ids]), output_attentions=True).attentions
    total, passed = 0.0, 0
    for row in item.query_positions:
        positive = list(item.positive)
        seen = [key for key in range(row + 1) if key not in positive]
        negative = seen if item.negative is None else list(item.negative)
        k, n = len(positive) + len(negative), row + 1
        for layer in attentions:
            for head in layer[0, :, row]:
                reached, missed = head[positive].sum(), head[negative].sum()
                if not head_filter or reached + missed > k / (k + math.log(n)):
                    passed += 1
                    total = total + wrong_penalty * missed + correct_award * (len(positive) - reached)
    return total / len(item.query_positions), passed / len(item.query_positions)


# --- batches ----------------------------------------------------------------------------------------------


def test_a_batch_by_hand():
    batch = Collator()(MIXED)
    assert batch["input_ids"].shape == (4, 20)
    ids = [[*item.input_ids[: item.length], *[0] * (20 - item.length)] for item in MIXED]
    assert batch["input_ids"].tolist() == ids
    assert [item.length for item in MIXED] == batch["seq_lens"].tolist() == [12, 20, 9, 13]
    assert batch["query_positions"].tolist() == [[9, 11, 11], [19, 19, 19], [5, 6, 8], [12, 12, 12]]
    assert batch["prompt_lengths"].tolist() == [[10, 12, 12], [20, 20, 20], [6, 7, 9], [13, 13, 13]]
    assert batch["demonstrations"].tolist() == [[3] * 3, [20] * 3, [4] * 3, [1] * 3]
    assert batch["correct_demonstrations"].tolist() == [[2] * 3, [1] * 3, [1] * 3, [1] * 3]
    weights = torch.tensor([[1 / 2, 1 / 2, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0]])
    assert torch.equal(batch["row_weights"], weights)
    assert batch["label_ids"].tolist() == batch["labels"].tolist() == [7, 8, 9, 10]
    groups = batch["key_groups"]
    assert groups.dtype == torch.int8
    assert (groups[0] == CORRECT_LABELS).nonzero().flatten().tolist() == [2, 3]
    assert (groups[0] == WRONG_LABELS).nonzero().flatten().tolist() == [5]
    assert (groups[1] == CORRECT_LABELS).nonzero().flatten().tolist() == [4]
    assert (groups[1] != NO_GROUP).all()
    assert (groups[2] == WRONG_LABELS).nonzero().flatten().tolist() == [0, 2, 3]
    assert (groups[3] != NO_GROUP).nonzero().flatten().tolist() == [10]


def test_no_label_is_ignored():
    assert Collator()([target(5, [4], [1])])["label_ids"].tolist() == [-100]


def test_left_padding_ends_in_one_column():
    batch = Collator(padding_side="left")(MIXED)
    assert batch["query_positions"][:, -1].tolist() == [19] * 4
    right = Collator()(MIXED)
    for name in ("input_ids", "key_groups", "position_ids"):
        padding = [token_mask(b["seq_lens"], b.get("seq_starts"), 20) for b in (batch, right)]
        assert torch.equal(batch[name][padding[0]], right[name][padding[1]]), name


def test_a_prompt_and_its_target_make_one_batch(labelled_prompts, toy_builder):
    targets = [as_target(prompt, toy_builder) for prompt in labelled_prompts]
    for layout in ({}, {"packing": True}):
        wanted, got = Collator(**layout)(labelled_prompts), Collator(**layout)(targets)
        assert wanted.keys() == got.keys()
        for name in wanted.keys() - {"labels"}:
            assert torch.equal(got[name], wanted[name]), name
            assert got[name].dtype == wanted[name].dtype, name
        assert wanted["labels"].tolist() == [prompt.query_label for prompt in labelled_prompts]
        assert torch.equal(got["labels"], wanted["label_ids"])
        assert torch.equal(got["row_weights"], torch.ones(len(targets), 1))


def test_packed_batches_and_budgets():
    padded, packed = Collator()(MIXED), Collator(packing=True)(MIXED)
    mask = token_mask(padded["seq_lens"], None, padded["input_ids"].shape[1])
    for name in ("input_ids", "key_groups", "position_ids"):
        assert torch.equal(packed[name][0], padded[name][mask]), name
    starts = packed["cu_seqlens"][:-1, None]
    assert torch.equal(packed["query_positions"] - starts, padded["query_positions"])
    parts = Collator(packing=True, tokens_per_batch=25)(MIXED)["parts"]
    assert sorted(part["input_ids"].shape[1] for part in parts) == [9, 20, 25]
    assert sorted(part["query_positions"].shape[1] for part in parts) == [1, 2, 3]  # rows are repeated within a part
    with pytest.raises(ValueError, match="a sample of 20 tokens is over tokens_per_batch=19; raise it"):
        Collator(packing=True, tokens_per_batch=19)(MIXED)


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("head_filter", [True, False])
@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_side": "left"}], ids=["right", "packed", "left"])
def test_loss_and_gradient_by_hand(kind, head_filter, layout):
    items = many(12) if head_filter else MIXED
    eager, ours = tiny(kind, attention="eager", **LABEL_LOOKERS), abft.enable(tiny(kind, **LABEL_LOOKERS))
    batch = Collator(**layout)(items)
    options = {"wrong_penalty": 0.7, "correct_award": 1.3, "head_filter": head_filter}
    got = loss_of(batch, layer_masses(ours, **{name: batch[name] for name in MASS_INPUTS if name in batch}), **options)
    wanted, counts = zip(*(by_hand(eager, item, **options) for item in items), strict=True)
    torch.testing.assert_close(got.per_prompt, torch.stack(wanted), atol=2e-5, rtol=1e-5)
    assert got.head_counts.tolist() == pytest.approx(counts)
    if head_filter:
        partial = [count for item, count in zip(items, counts, strict=True) if item.negative is not None]
        assert 0 < np.mean(partial) < 8, "the filter passes all heads or none"
        assert len({count % 1 for count in counts}) > 1, "no target whose rows differ in their heads"
    got.loss.backward()
    torch.stack(wanted).mean().backward()
    theirs = dict(eager.named_parameters())
    for item in find_qk(ours):
        mine, want = dict(ours.named_parameters())[item.name].grad, theirs[item.name].grad
        assert want.abs().max() > 1e-4
        assert (mine - want).abs().max() < 2e-5 * want.abs().max(), item.name


def test_the_filter_passes_every_head_where_all_tokens_are_keys():
    item = target(20, (17, 19), (4,))
    batch = Collator()([item])
    masses = layer_masses(abft.enable(tiny("llama")), **{name: batch[name] for name in MASS_INPUTS if name in batch})
    assert loss_of(batch, masses).selected.all()
    torch.testing.assert_close(torch.stack(masses).sum(-1), torch.ones(2, 1, 4, 2))


def test_per_head_mean_is_of_each_row():
    masses = torch.rand(3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) / 2
    counts = torch.tensor([[1, 1], [2, 2]]), torch.tensor([[3, 3], [4, 4]]), torch.tensor([[9, 10], [20, 30]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    got = abft_loss(masses, *counts, per_head_mean=True, row_weights=weights)
    rows = [abft_loss(masses[..., row, :], *(count[:, row] for count in counts), per_head_mean=True) for row in (0, 1)]
    wanted = sum(row.per_prompt * weights[:, index] for index, row in enumerate(rows))
    torch.testing.assert_close(got.per_prompt, wanted)
    assert torch.equal(got.selected, torch.stack([row.selected for row in rows], dim=-1))
    assert got.head_counts.tolist() == [
        (rows[0].head_counts[0] + rows[1].head_counts[0]).item() / 2, rows[0].head_counts[1].item(),
    ]  # fmt: skip
    kept = got.selected.float() * weights[:, None]
    torch.testing.assert_close(got.mass_correct, (masses[..., 0] * kept).sum() / kept.sum())
    torch.testing.assert_close(got.mass_wrong, (masses[..., 1] * kept).sum() / kept.sum())


def test_shapes_that_do_not_fit():
    masses, counts = torch.zeros(2, 3, 4, 2, 2), torch.ones(3, 2)
    abft_loss(masses, counts, counts, counts, row_weights=counts)
    for wrong in (masses[..., 0, :], masses[..., :1], masses[:, :2]):
        with pytest.raises(ValueError, match=r"with row_weights of shape \(3, 2\) masses must have shape"):
            abft_loss(wrong, counts, counts, counts, row_weights=counts)
    for place in range(3):
        given = [counts[:, 0] if place == index else counts for index in range(3)]
        with pytest.raises(ValueError, match=r"counts \(batch, rows\), got .*\(3,\)"):
            abft_loss(masses, *given, row_weights=counts)


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["abft", "e2e"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_target_that_is_a_prompt_trains_alike(kind, method, labelled_prompts, toy_builder, tmp_path):
    targets = [as_target(prompt, toy_builder) for prompt in labelled_prompts]
    options = {"method": method, "num_train_epochs": 2}
    by_prompts = trained(tiny(kind, **LABEL_LOOKERS), labelled_prompts, None, tmp_path, **options)
    by_targets = trained(tiny(kind, **LABEL_LOOKERS), targets, None, tmp_path, **options)
    assert losses(by_prompts) == losses(by_targets)
    assert_same_trajectory(by_prompts, by_targets, tolerance=0)


def test_prompts_and_targets_train_together(toy_prompts, tmp_path):
    items = [sample for pair in zip(many(64), toy_prompts, strict=True) for sample in pair]
    trainer = trainer_of(
        tiny("llama", **LABEL_LOOKERS), items, None, tmp_path, num_train_epochs=1, eval_dataset=toy_prompts
    )
    trainer.train()
    assert len(losses(trainer)) == 4
    assert "eval_macro_f1" in trainer.evaluate()
    assert "eval_best_head" in trainer.evaluate(many(5))


@pytest.mark.parametrize(
    "changes", [{}, {"method": "e2e"}, {"restricted_gradient": True}], ids=["full", "e2e", "restricted"]
)
def test_packing_and_rows_of_others_do_not_matter(changes, tmp_path):
    """One by one, where no row is repeated, padded, packed, and packed within a budget: one trajectory."""
    batches = [
        {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 32, "packing": True},
        {"per_device_train_batch_size": 32, "packing": True, "tokens_per_batch": 60},
    ]  # fmt: skip
    items = many(64, label_id=5)
    runs = [
        trained(tiny("llama", **LABEL_LOOKERS).double(), items, None, tmp_path, num_train_epochs=2, **changes, **batch)
        for batch in batches
    ]
    assert len(set(losses(runs[0]))) == 4
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)
        # Thirds of heads, which are counted in another order.
        counts = [run.objective.state_dict().get("head_counts", []) for run in (other, runs[0])]
        assert counts[0] == pytest.approx(counts[1], rel=1e-6)
        assert_same_weights(state_of(other), state_of(runs[0]), 1e-9)


def test_lora_trains_on_targets(tmp_path):
    trainer = trained(tiny("llama"), many(32), None, tmp_path, lora=True, num_train_epochs=8, learning_rate=1e-2)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.data_collator.pad_token_id == 0


@pytest.mark.parametrize("restricted", [False, True])
def test_training_raises_the_mass_on_positive_keys(restricted, tmp_path):
    """Return the word after the first occurrence of the last word, as induction heads do."""
    items = []
    for seed in range(64):
        ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:12].tolist()
        place = seed % 10
        items.append(AttentionTarget([*ids, ids[place]], [12], [place], None, ids[place + 1]))
    trainer = trainer_of(
        tiny("llama"),
        items[:48],
        None,
        tmp_path,
        eval_dataset=items[48:],
        learning_rate=1e-2,
        num_train_epochs=8,
        pseudo_batch_size=16,
        restricted_gradient=restricted,
    )
    before = evaluate(trainer.model, items[48:], progress=False)
    trainer.train()
    after = evaluate(trainer.model, items[48:], progress=False)
    assert after.positive_mass.max() > 3 * before.positive_mass.max()
    assert after.negative_mass.mean() < before.negative_mass.mean()
    metrics = trainer.evaluate()
    assert metrics["eval_best_head_positive_mass"] == pytest.approx(after.positive_mass.max().item())
    assert (metrics["eval_n"], metrics["eval_labelled"]) == (16, 16)
    assert (metrics["eval_best_layer"], metrics["eval_best_head"]) == after.best_head
    assert trainer.state.log_history[-1]["eval_accuracy"] == metrics["eval_accuracy"]


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_evaluation_by_hand(kind, batch_size):
    items = [*MIXED, *many(5)]
    eager = tiny(kind, attention="eager")
    model = abft.enable(tiny(kind)).train()
    made = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: made.append(logits.shape[:2].numel()))
    result = evaluate(model, items, batch_size=batch_size, progress=False)
    assert sum(made) == len(items), "logits of other rows than the last"
    assert model.training
    sums, predictions = torch.zeros(2, 2, 4), []
    for item in items:
        outputs = eager(torch.tensor([item.input_ids]), output_attentions=True)
        predictions.append(int(outputs.logits[0, item.query_positions[-1]].argmax()))
        for row in item.query_positions:
            seen = [key for key in range(row + 1) if key not in item.positive]
            negative = seen if item.negative is None else item.negative
            for layer, attention in enumerate(outputs.attentions):
                sums[0, layer] += attention[0, :, row, list(item.positive)].sum(-1) / len(item.query_positions)
                sums[1, layer] += attention[0, :, row, list(negative)].sum(-1) / len(item.query_positions)
    torch.testing.assert_close(result.positive_mass, sums[0] / len(items), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.negative_mass, sums[1] / len(items), atol=1e-5, rtol=1e-5)
    assert result.predictions.tolist() == predictions
    right = sum(p == item.label_id for p, item in zip(predictions, items, strict=True) if item.label_id is not None)
    assert (result.n, result.labelled, result.accuracy) == (9, 4, right / 4)
    layer, head = result.best_head
    assert result.positive_mass[layer, head] == result.positive_mass.max()


def test_accuracy_counts_labelled_targets_alone():
    model = abft.enable(tiny("llama"))
    items = many(6)
    said = evaluate(model, items, progress=False)
    assert said.accuracy is said.accuracy_stderr is None
    assert "accuracy" not in said.to_dict()
    labels = [*said.predictions[:3].tolist(), 0, None, None]
    labels[3] = (int(said.predictions[3]) + 1) % VOCABULARY
    marked = [
        AttentionTarget(t.input_ids, t.query_positions, t.positive, t.negative, label)
        for t, label in zip(items, labels, strict=True)
    ]
    result = evaluate(model, marked, progress=False)
    assert (result.labelled, result.accuracy) == (4, 0.75)
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result.to_dict()["accuracy"] == 0.75


def test_evaluation_errors():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"call abft\.enable"):
        evaluate(model, MIXED, progress=False)
    abft.enable(model)
    with pytest.raises(ValueError, match="no prompts or targets to evaluate; pass one or more"):
        evaluate(model, [], progress=False)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        evaluate(model, MIXED, batch_size=0, progress=False)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"logits of target \d are not finite"):
        evaluate(model, MIXED, progress=False)
    with pytest.raises(TypeError, match="momentum: evaluation of targets takes no such argument"):
        evaluate(model, MIXED, momentum=0.5)


def test_head_statistics_are_of_rows(labelled_prompts, toy_builder):
    model = abft.enable(tiny("llama", **LABEL_LOOKERS))
    targets = [as_target(prompt, toy_builder) for prompt in labelled_prompts]
    of_prompts, of_targets = (head_statistics(model, some, progress=False) for some in (labelled_prompts, targets))
    for name in ("induction_rate", "mass_correct", "mass_wrong"):
        assert torch.equal(getattr(of_prompts, name), getattr(of_targets, name)), name
    masses = evaluate(model, targets, progress=False)
    torch.testing.assert_close(masses.positive_mass, of_targets.mass_correct)
    items = many(12)
    batch = Collator()(items)
    found = loss_of(batch, layer_masses(model, **{name: batch[name] for name in MASS_INPUTS if name in batch}))
    weights = batch["row_weights"][:, None]
    rate = (found.selected * weights).sum(-1).mean(1)
    statistics = head_statistics(model, items, batch_size=5, progress=False)
    torch.testing.assert_close(statistics.induction_rate, rate)
    assert statistics.induction_heads == pytest.approx(found.head_counts.mean().item())


# --- bad input --------------------------------------------------------------------------------------------


def test_positions_of_any_integers_become_tuples():
    item = AttentionTarget(torch.arange(6), np.array([4, 5]), range(2), [3], np.int64(7))
    assert item == AttentionTarget((0, 1, 2, 3, 4, 5), (4, 5), (0, 1), (3,), 7)
    assert hash(item)
    assert item.length == 6
    assert AttentionTarget(range(9), [5], [5]).length == 6  # a row may attend to its own token


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"input_ids": []}, ValueError, "input_ids is empty"),
        ({"input_ids": [1.5] * 8}, TypeError, r"input_ids must be integers, got \[1.5"),
        ({"input_ids": [3, 4, -1, *range(5)]}, ValueError, "token ids are 0 or more, got -1"),
        ({"label_id": -100}, ValueError, "token ids are 0 or more, got -100"),
        ({"label_id": "yes"}, TypeError, "label_id must be integers"),
        ({"query_positions": []}, ValueError, "query_positions is empty"),
        ({"query_positions": [7, 6]}, ValueError, r"query_positions must rise, got \(7, 6\); sort"),
        ({"query_positions": [7, 7]}, ValueError, "query_positions must rise"),
        ({"query_positions": [8]}, ValueError, r"must be in 0 … 7, the tokens given, got \(8,\)"),
        ({"query_positions": [-1, 7]}, ValueError, "must be in 0 … 7"),
        ({"positive": []}, ValueError, "positive is empty"),
        ({"positive": [7]}, ValueError, "positive position 7 is not in 0 … 6"),
        ({"positive": [-1]}, ValueError, "positive position -1 is not in"),
        ({"positive": [2, 2]}, ValueError, "positive positions must differ"),
        ({"negative": [7]}, ValueError, "negative position 7 is not in 0 … 6"),
        ({"negative": [4, 4]}, ValueError, "negative positions must differ"),
        ({"negative": [4, 1]}, ValueError, "position 1 is both positive and negative"),
    ],
)
def test_targets_that_make_no_sense(changes, error, match):
    sound = {"input_ids": range(8), "query_positions": [6, 7], "positive": [1], "negative": [3]}
    AttentionTarget(**sound)
    with pytest.raises(error, match=match):
        AttentionTarget(**{**sound, **changes})


def test_what_the_collator_and_the_trainer_refuse(toy_prompts, toy_builder, tmp_path):
    with pytest.raises(ValueError, match="empty list of samples"):
        Collator()([])
    with pytest.raises(ValueError, match="padding_side must be"):
        Collator(padding_side="top")
    model, args = tiny("llama"), arguments(tmp_path)
    with pytest.raises(TypeError, match="sample 0 is AttentionTarget, not a Prompt"):
        PromptSet(toy_builder, MIXED)
    with pytest.raises(TypeError, match="sample 0 is a Prompt in a list"):
        ABFTTrainer(model, args, MIXED, eval_dataset=list(toy_prompts)).evaluate()
    with pytest.raises(ValueError, match="target 4 has no label_id"):
        ABFTTrainer(model, arguments(tmp_path, method="e2e"), [*MIXED, target(9, [8], [1])])
    with pytest.raises(ValueError, match="the longest prompt has 129 tokens, the model's context 128"):
        ABFTTrainer(model, args, [target(129, [128], [1])])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        ABFTTrainer(model, args, [])


def test_rows_that_attention_mass_gives():
    """A target's rows are those of `attention_mass`, in their order."""
    model, batch = abft.enable(tiny("llama")), Collator()(MIXED)
    arguments = {name: batch[name] for name in MASS_INPUTS if name in batch}
    every = attention_mass(model, **{**arguments, "query_positions": None})
    rows = batch["query_positions"][:, None, :, None]
    for mass, full in zip(layer_masses(model, **arguments), every, strict=True):
        torch.testing.assert_close(mass, full.take_along_dim(rows, dim=2))
