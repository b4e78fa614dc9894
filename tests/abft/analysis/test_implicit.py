"""ICL against fine-tuning on its demonstrations: by hand one query at a time, in known cases, and on the demo model."""

import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import kendalltau
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft.analysis.fine_tuning import KeyValueUpdate, fine_tune
from abft.analysis.implicit import _Totals, compare_with_fine_tuning
from abft.analysis.momentum_gain import momentum_gain
from abft.analysis.observing import Observation, common_ending
from abft.analysis.query_vectors import QueryVectors
from abft.analysis.ranks import agreement, top_count
from abft.demo.corpus import DEMO_K, DEMO_TASK, demo_splits
from abft.demo.run import MODEL
from abft.evaluation.classification import evaluate, label_logits
from abft.models.attention import enable
from abft.models.projections import find_kv, find_parts
from abft.prompts.builder import Prompt, PromptBuilder, sample_prompts
from abft.prompts.examples import Example

RANKS = tuple(f"{name}_{level}" for name in ("kendall", "recall") for level in ("token", "example"))
LAYERWISE = ("sim_aou", "sim_aou_random", "sim_am_before", "sim_am", "sim_am_random")


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(1)
    labels = [rng.randint(0, 1) for _ in range(12)]
    return [Example(" ".join(f"w{rng.randint(0, 42)}" for _ in range(rng.randint(3, 9))), label) for label in labels]


def compare(model, builder, examples, **options):
    options = {"learning_rate": 0.05, "progress": False, "random_draws": 1, **options}
    return compare_with_fine_tuning(model, builder, examples[:3], examples[3:], **options)


# --- fine-tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["label", "all"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_fine_tuning_is_sgd_on_keys_and_values(kind, form, toy_builder, examples):
    """The two last have biases, which are trained too."""
    model = tiny(kind)
    before = copy.deepcopy(model.state_dict())
    tuned, _, losses = fine_tune(
        model, toy_builder, examples[:3], form=form, learning_rate=0.1, epochs=2, progress=False
    )

    want = tiny(kind)
    trained = [p for name, p in want.named_parameters() if name.rsplit(".", 2)[-2] in ("k_proj", "v_proj")]
    assert any(p.dim() == 1 for p in trained) == (kind != "llama")
    optimizer, want_losses = torch.optim.SGD(trained, lr=0.1), []
    for example in examples[:3] * 2:
        ids = [*toy_builder.build([], example).input_ids, toy_builder.label_token_ids[example.label]]
        token_losses = -want(torch.tensor([ids])).logits[0, :-1].log_softmax(1)[range(len(ids) - 1), ids[1:]]
        loss = token_losses.mean() if form == "all" else token_losses[-1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want_losses.append(loss.item())
    assert losses == pytest.approx(want_losses, rel=1e-4)
    moved = 0
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[name], atol=1e-6, rtol=1e-4, msg=name)
        trainable = name.rsplit(".", 2)[-2] in ("k_proj", "v_proj")
        assert trainable or tensor.equal(before[name]), name
        moved += not tensor.equal(before[name])
    # Scores do not depend on a bias of all keys, so its gradient may be exactly 0.
    assert moved >= len(trained) - (0 if kind == "llama" else 2)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "phi3"])
def test_only_keys_and_values_are_found(kind, toy_builder, toy_prompts):
    """Set to zero, they take keys and values away and leave the queries of the first layer as they are."""
    model = enable(tiny(kind))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    batch = {"input_ids": torch.tensor([toy_prompts[0].input_ids])}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]),
              "position_ids": torch.arange(toy_prompts[0].length)[None],
              "query_positions": torch.tensor([[toy_prompts[0].length - 1]])}  # fmt: skip
    seen = []

    def probe(module, query, key, value, scale):
        seen.append((query, key, value))

    ask = lambda: label_logits(model, batch, toy_builder.label_token_ids, attention_probe=probe)  # noqa: E731
    ask()
    update = KeyValueUpdate(model)
    update.deltas = [-item.view(model.get_parameter(item.name)).detach().clone() for item in update.parts]
    update.write()
    ask()
    before, after = seen[0], seen[2]
    assert before[1].abs().min() > 0
    assert after[0].equal(before[0])
    for zero in (*after[1:], *seen[3][1:]):
        assert zero.count_nonzero() == 0
    update.deltas = [torch.zeros_like(delta) for delta in update.deltas]
    update.write()
    ask()
    assert all(x.equal(y) for x, y in zip(seen[4], before, strict=True))


def test_what_has_no_keys_and_values_of_its_own_is_refused(toy_builder, examples):
    with pytest.raises(NotImplementedError, match="DeepseekV3Attention has no W_K and W_V of its own"):
        find_kv(tiny("deepseek_v3"))
    lora = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="merge the adapter"):
        fine_tune(lora, toy_builder, examples[:3])


def test_updates_of_a_16_bit_model_add_up(toy_builder, examples):
    """Steps too small for bfloat16 one at a time are not lost."""
    model = tiny("llama").bfloat16()

    def moved_by(steps):
        tuned = fine_tune(model, toy_builder, examples[:1] * steps, learning_rate=1e-4, progress=False)[0]
        pairs = zip(tuned.state_dict().values(), model.state_dict().values(), strict=True)
        return sum(int((a != b).sum()) for a, b in pairs)

    assert moved_by(60) > 10 * max(moved_by(1), 1)


def test_random_update_has_the_size_of_the_real_one(toy_builder, examples):
    _, update, _ = fine_tune(tiny("gpt2"), toy_builder, examples[:3], learning_rate=0.1, progress=False)
    other = update.random_like(torch.Generator().manual_seed(0))
    assert [tuple(delta.shape) for delta in update.deltas] == [(32, 64), (32, 64), (64,), (64,)]
    for mine, random_one in zip(update.deltas, other.deltas, strict=True):
        assert mine.shape == random_one.shape
        assert random_one.norm().item() == pytest.approx(mine.norm().item(), rel=1e-5)
        assert abs(torch.cosine_similarity(mine.flatten(), random_one.flatten(), dim=0)) < 5 / mine.numel() ** 0.5


# --- the comparison ---------------------------------------------------------------------------------------


def looked_into(model, prompt, own):
    """GPT-2's attention outputs `(L, width)`, last token's scores `(L, H, own)` and all queries, from plain hooks."""
    kept = []
    handles = []
    for block in model.transformer.h:
        for module in (block.attn.c_attn, block.attn.c_proj):
            handles.append(module.register_forward_hook(lambda module, inputs, output: kept.append(output[0])))
    with torch.no_grad():
        logits = model(torch.tensor([prompt.input_ids])).logits[0, -1]
    for handle in handles:
        handle.remove()
    outputs = torch.stack([hidden[-1] / hidden[-1].norm() for hidden in kept[1::2]])
    scores, queries = [], []
    for qkv in kept[::2]:
        q, k, _ = qkv.view(-1, 3, 4, 8).unbind(1)
        scores.append(torch.einsum("hd,nhd->hn", q[-1], k[-own:]) / math.sqrt(8))
        queries.append(q.flatten(1) / math.sqrt(8))
    return logits, outputs, torch.stack(scores), torch.stack(queries)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_similarities_equal_those_by_hand(batch_size, toy_builder, examples):
    model = enable(tiny("gpt2"))
    got = compare(model, toy_builder, examples, batch_size=batch_size, seed=5)
    tuned, update, losses = fine_tune(model, toy_builder, examples[:3], learning_rate=0.05, progress=False)
    randomly = copy.deepcopy(tuned)
    noise = update.random_like(torch.Generator().manual_seed(5))
    for item, delta in zip(update.parts, noise.deltas, strict=True):
        randomly.get_parameter(item.name).data[..., 32:] = model.get_parameter(item.name)[..., 32:] + delta

    want = {name: [] for name in LAYERWISE}
    right = {name: [] for name in got.accuracy}
    cosine = torch.nn.functional.cosine_similarity
    for query in examples[3:]:
        alone = toy_builder.build([], query)
        settings = {
            "zero-shot": looked_into(model, alone, alone.length),
            "icl": looked_into(model, toy_builder.build(examples[:3], query), alone.length),
            "fine-tuned": looked_into(tuned, alone, alone.length),
            "random update": looked_into(randomly, alone, alone.length),
        }
        for name, (logits, *_) in settings.items():
            right[name].append(int(logits[toy_builder.label_token_ids].argmax()) == query.label)
        h = {name: outputs for name, (_, outputs, *_) in settings.items()}
        m = {name: scores for name, (_, _, scores, _) in settings.items()}
        icl = h["icl"] - h["zero-shot"]
        want["sim_aou"].append(cosine(icl, h["fine-tuned"] - h["zero-shot"], dim=-1))
        want["sim_aou_random"].append(cosine(icl, h["random update"] - h["zero-shot"], dim=-1))
        for name, other in (
            ("sim_am_before", "zero-shot"),
            ("sim_am", "fine-tuned"),
            ("sim_am_random", "random update"),
        ):
            want[name].append(cosine(m["icl"], m[other], dim=-1).mean(1))
    for name, values in want.items():
        torch.testing.assert_close(getattr(got, name), torch.stack(values).mean(0), atol=2e-4, rtol=1e-3, msg=name)
        assert got.to_dict()[f"{name}_mean"] == pytest.approx(torch.stack(values).mean().item(), abs=2e-4)
    for name, hits in right.items():
        assert got.accuracy[name] == pytest.approx(sum(hits) / 9), name
    assert got.losses == losses
    assert got.n == 9


def test_queries_batched_with_padding_are_as_alone(toy_builder, examples):
    """Grouped-query attention, right padding, own tokens of different lengths."""
    model = enable(tiny("llama"))
    one, many = (compare(model, toy_builder, examples, batch_size=size) for size in (1, 9))
    for name in LAYERWISE:
        torch.testing.assert_close(getattr(one, name), getattr(many, name), atol=2e-4, rtol=1e-3)
    assert one.accuracy == many.accuracy


def test_no_fine_tuning_leaves_zero_shot(toy_builder, examples):
    """A learning rate that moves no weight: no output moves, attention stays, nothing is recovered."""
    found = compare(enable(tiny("llama")), toy_builder, examples, learning_rate=1e-30)
    assert found.sim_aou.tolist() == found.sim_aou_random.tolist() == [0, 0]
    torch.testing.assert_close(found.sim_am, found.sim_am_before, atol=0, rtol=0)
    assert found.recovered == 0
    assert found.rec2ftp is None
    assert found.accuracy["fine-tuned"] == found.accuracy["zero-shot"]
    assert json.loads(json.dumps(found.to_dict()))["rec2ftp"] is None


@pytest.mark.parametrize("form", ["label", "all"])
def test_attention_to_demonstrations_equals_that_by_hand(form, toy_builder, examples):
    """Kendall's τ and recall of the published definition, with queries from the steps of fine-tuning."""
    model = enable(tiny("gpt2"))
    shown = examples[:4]
    got = compare_with_fine_tuning(
        model, toy_builder, shown, examples[4:7], form=form, learning_rate=0.5, progress=False, random_draws=2
    )
    keys, sizes = [], []
    for number, example in enumerate(shown):
        state = (
            fine_tune(model, toy_builder, shown[:number], form=form, learning_rate=0.5, progress=False)[0]
            if number
            else model
        )
        ids = [*toy_builder.build([], example).input_ids, toy_builder.label_token_ids[example.label]]
        keys.append(looked_into(state, Prompt(ids, (), (), 0), 1)[3])
        sizes.append(len(ids))
    keys = torch.cat(keys, dim=1)
    tuned = fine_tune(model, toy_builder, shown, form=form, learning_rate=0.5, progress=False)[0]
    want = {name: [] for name in RANKS}
    for query in examples[4:7]:
        alone, prompt = toy_builder.build([], query), toy_builder.build(shown, query)
        last = looked_into(tuned, alone, 1)[3][:, -1]
        scores = looked_into(model, prompt, prompt.length)[2][..., : sum(sizes)]
        maps = {
            "token": [scores.sum(1).softmax(-1), torch.einsum("lnd,ld->ln", keys, last).softmax(-1)],
        }
        maps["example"] = [torch.stack([p.sum(-1) for p in x.split(sizes, -1)], -1) for x in maps["token"]]
        for level, pair in maps.items():
            top = {"token": min(100, sum(sizes) // 2), "example": 2}[level]
            best = [[set(row.argsort(descending=True)[:top].tolist()) for row in x] for x in pair]
            want[f"recall_{level}"].append([len(a & b) / top for a, b in zip(*best, strict=True)])
            want[f"kendall_{level}"].append([kendalltau(a, b).statistic for a, b in zip(*pair, strict=True)])
    for name, values in want.items():
        torch.testing.assert_close(
            getattr(got, name), torch.tensor(values, dtype=torch.float32).mean(0), atol=5e-3, rtol=0, msg=name
        )
    assert got.chance == {"token": min(100, sum(sizes) // 2) / sum(sizes), "example": 0.5}
    assert got.demonstrations == 4
    assert got.kendall_random_token.abs().max() < 0.3


def test_agreement_of_known_orders():
    icl = torch.tensor([[[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]]])
    found = {
        name: agreement(icl, other, [2, 2, 2], np.random.default_rng(0), 100)
        for name, other in (("same", 7 * icl), ("reverse", -icl), ("equal", 0 * icl))
    }
    assert found["same"]["token"].kendall.item() == found["same"]["example"].kendall.item() == 1
    assert found["same"]["token"].recall.item() == found["same"]["example"].recall.item() == 1
    assert found["reverse"]["token"].kendall.item() == -1
    assert found["reverse"]["token"].recall.item() == found["reverse"]["example"].recall.item() == 0
    assert found["equal"]["token"].kendall.item() == 0  # no order at all
    assert abs(found["same"]["token"].kendall_random.item()) < 0.15
    assert [top_count("token", n) for n in (1, 6, 1000)] == [1, 3, 100]


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_query_vectors_are_the_outputs_of_w_q(kind, toy_prompts):
    model = tiny(kind).eval()
    ids = torch.tensor([toy_prompts[0].input_ids])
    recorder = QueryVectors(model)
    with torch.no_grad(), recorder.recording():
        hidden = model(ids, output_hidden_states=True).hidden_states
    got = recorder.vectors()
    assert got.shape == (2, 1, ids.shape[1], 32)
    for part, vectors, states in zip(find_parts(model, ("q",)), got, hidden[:2], strict=True):
        name, _, _ = part.name.partition(".self_attn" if kind in ("phi3", "llama") else ".att")
        block = model.get_submodule(name)
        norm = getattr(block, "ln_1", None) or block.input_layernorm
        weight = part.view(model.get_parameter(part.name).detach())
        weight = weight.T if kind == "gpt2" else weight.flatten(0, -2)
        bias_of = model.get_submodule(part.name.rpartition(".")[0]).bias
        bias = 0 if bias_of is None else replace(part, dim=0).view(bias_of.detach()).flatten()
        torch.testing.assert_close(vectors, (norm(states) @ weight.T + bias) / math.sqrt(8), atol=1e-5, rtol=1e-4)


def observed(predictions, outputs=None, scores=None):
    n = len(predictions)
    outputs = torch.eye(4)[:n][None] if outputs is None else outputs
    return Observation(torch.tensor(predictions), outputs, torch.ones(1, n, 1, 3) if scores is None else scores)


COUNTS = {"token": 6, "example": 2}


def ranks(batch):
    scores = torch.rand(1, batch, 6, generator=torch.Generator().manual_seed(0))
    return agreement(scores, scores, [3, 3], np.random.default_rng(0), 1)


def test_recovered_predictions_are_counted_from_the_definition():
    """Labels 1 1 1 1: zero-shot has the first; fine-tuning the first three; ICL the second and the fourth."""
    totals = _Totals()
    totals.add(torch.ones(4, dtype=torch.long), observed([0, 1, 0, 1]), observed([1, 0, 0, 0]), observed([1, 1, 1, 0]),
               [observed([0, 0, 0, 0]), observed([1, 1, 0, 0])], ranks(4))  # fmt: skip
    found = totals.result(4, (), COUNTS)
    assert (found.recovered, found.rec2ftp, found.rec2ftp_control) == (2, 0.5, pytest.approx(2 / 3))
    assert found.accuracy == {"zero-shot": 0.25, "icl": 0.5, "fine-tuned": 0.75, "random update": 0.25}


def test_similarities_of_known_directions():
    x, y = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
    origin, s = torch.zeros(1, 1, 3), torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]]).transpose(1, 2)
    same, half, other = s, torch.tensor([[[[3.0, 0.0], [1.0, 0.0]]]]), s.flip(-1)
    totals = _Totals()
    totals.add(torch.tensor([0]), observed([0], x, same), observed([0], origin, half), observed([0], x + y, same * 3),
               [observed([0], y, other), observed([0], x, same)], ranks(1))  # fmt: skip
    found = totals.result(1, (), COUNTS)
    assert found.sim_aou.item() == pytest.approx(math.sqrt(0.5))
    assert found.sim_aou_random.item() == pytest.approx(0.5)  # mean of a right angle and the same direction
    assert found.sim_am_before.item() == pytest.approx(0.5)  # one head as before, one at a right angle
    assert found.sim_am.item() == pytest.approx(1)
    assert found.sim_am_random.item() == pytest.approx(0.5)


def test_own_tokens_are_the_common_ending():
    assert common_ending((1, 7, 8, 9, 2, 5, 6), (1, 5, 6)) == 2  # BOS stays out
    assert common_ending((7, 8, 5, 6), (5, 6)) == 2
    assert common_ending((7, 8, 4, 6), (3, 6)) == 1  # a first word that is spelt differently inside


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate finite and over 0, got 1 and 0"),
        ({"learning_rate": float("nan")}, "learning_rate finite and over 0, got 1 and nan"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"learning_rate": 1e38}, r"loss nan in step 2 of fine-tuning; lower learning_rate=1e\+38"),
        ({"learning_rate": 1e36}, "logits that are not finite.*lower the learning rate"),
        ({"batch_size": 0}, "batch_size and random_draws must be 1 or more"),
        ({"random_draws": 0}, "batch_size and random_draws must be 1 or more"),
        ({"form": "labels"}, "form must be one of all, label, got 'labels'"),
    ],
)
def test_refusals(changes, message, toy_builder, examples):
    with pytest.raises(ValueError, match=message):
        compare(enable(tiny("llama")), toy_builder, examples, **changes)


def test_what_is_missing_is_named(toy_builder, toy_prompts, examples):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"call abft\.enable"):
        compare(model, toy_builder, examples)
    enable(model)
    with pytest.raises(ValueError, match="no queries"):
        compare(model, toy_builder, examples[:3])
    with pytest.raises(ValueError, match="no demonstrations"):
        compare_with_fine_tuning(model, toy_builder, [], examples)
    with pytest.raises(ValueError, match="no etas"):
        momentum_gain(model, toy_prompts, [])
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        momentum_gain(model, toy_prompts, [0.1, 1.5])


# --- the demo model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="abft")
    return model, PromptBuilder(AutoTokenizer.from_pretrained(MODEL), DEMO_TASK), demo_splits()


def test_fine_tuning_of_the_demo_model_moves_as_icl_does(demo):
    model, builder, splits = demo
    demonstrations = splits.demonstrations[:DEMO_K]
    before = copy.deepcopy(model.state_dict())
    found = compare_with_fine_tuning(
        model, builder, demonstrations, splits.test[:128], learning_rate=0.01, epochs=4, progress=False
    )
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert found.losses[-1] < found.losses[0]
    assert found.accuracy["icl"] > found.accuracy["zero-shot"] + 0.1
    assert found.accuracy["fine-tuned"] > found.accuracy["zero-shot"] + 0.1
    assert found.sim_aou.mean() > 0.25
    assert found.sim_aou_random.mean().abs() < 0.15
    assert found.recovered >= 20
    assert found.rec2ftp > 0.5


def test_momentum_gain_is_that_of_evaluate(demo):
    model, builder, splits = demo
    prompts = sample_prompts(builder, splits.test[:64], splits.demonstrations, DEMO_K, seed=0)
    found = momentum_gain(model, prompts, [0.1, 0.5], progress=False)
    assert found.plain == evaluate(model, prompts, progress=False).accuracy
    assert found.accuracy[0.5] == evaluate(model, prompts, progress=False, momentum=0.5).accuracy
    assert found.accuracy[0.5] < found.plain  # a sum that is as large as the attention destroys this model's
    assert list(found.accuracy) == [0.1, 0.5]
    assert found.to_dict()["gains"][1]["gain"] == pytest.approx(found.accuracy[0.5] - found.plain)
