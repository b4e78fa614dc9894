"""Induction and retrieval scores against eager attention matrices, and values known from the definition."""

import json

import pytest
import torch
from tiny_models import tiny
from transformers import AutoModelForCausalLM

from abft.analysis.heads import HeadScores, induction_scores, retrieval_scores
from abft.demo.run import MODEL
from abft.models.attention import enable


def eager_attention(model, ids):
    """`(L, H, N, N)`."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(model(ids[None], output_attentions=True, use_cache=False).attentions)


def looking_everywhere_alike(kind="llama"):
    model = enable(tiny(kind))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model


def inputs_seen_by(model, call):
    """Return the result of `call`, and the token ids that reached the model meanwhile."""
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    try:
        return call(), seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "length", "repeats"), [("llama", 30, 2), ("llama", 41, 3), ("gpt2", 30, 2)])
def test_induction_scores_equal_eager_attention(kind, length, repeats):
    model = enable(tiny(kind))
    options = {"length": length, "repeats": repeats, "rows": 5, "samples": 3, "vocabulary": range(10, 30)}
    got, inputs = inputs_seen_by(model, lambda: induction_scores(model, **options, progress=False))
    assert len(inputs) == 3
    assert not inputs[0].equal(inputs[1])
    block, want = length // repeats, []
    for ids in inputs:
        assert ids.view(repeats, block).eq(ids[:block]).all()
        assert 10 <= ids.min() <= ids.max() < 30
        attention = eager_attention(model, ids)
        first, last = block * (repeats - 1), block * repeats - 2
        for row in (first, *(round(first + (last - first) * i / 4) for i in (1, 2, 3)), last):
            keys = [row + 1 - block * back for back in range(1, repeats)]
            assert all(ids[key - 1] == ids[row] for key in keys)
            want.append(attention[:, :, row, keys].sum(-1))
    torch.testing.assert_close(got, torch.stack(want).mean(0), atol=1e-6, rtol=1e-5)


def test_a_head_that_looks_everywhere_alike_has_a_known_score():
    model = looking_everywhere_alike()
    rows = torch.arange(20, 30)  # of 32 tokens in 3 copies of 10, and not the last
    want = (2 / (rows[:9] + 1)).mean().expand(2, 4)
    got = induction_scores(model, length=32, repeats=3, rows=9, samples=1, progress=False)
    torch.testing.assert_close(got, want)
    needle, question, haystack = range(3), range(3, 5), torch.arange(40)
    got = retrieval_scores(model, haystack, needle, question, depths=[0, 0.3, 1], prefix_ids=[1], progress=False)
    torch.testing.assert_close(got, torch.full((3, 2, 4), 3 / 46))


def test_the_demo_model_has_induction_heads():
    """It was pre-trained on random sequences that repeat; before training there are none."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="abft")
    options = {"length": 64, "vocabulary": range(3, model.config.vocab_size), "progress": False}
    trained = induction_scores(model, **options)
    torch.manual_seed(0)
    untrained = induction_scores(AutoModelForCausalLM.from_config(model.config, attn_implementation="abft"), **options)
    ((layer, head, score),) = HeadScores(trained).top(1)
    assert score > 0.5
    assert layer >= 1, "an induction head needs a head before it that looks one token back"
    assert score == trained[layer, head]
    assert untrained.max() < 0.1
    assert induction_scores(model, **options).equal(trained)
    assert not induction_scores(model, **options, seed=1).equal(trained)


def test_retrieval_scores_equal_eager_attention():
    model = enable(tiny("llama"))
    generator = torch.Generator().manual_seed(0)
    haystack, needle, question = (torch.randint(3, 50, (n,), generator=generator) for n in (30, 4, 6))
    depths = [0.0, 0.5, 1.0]
    got, inputs = inputs_seen_by(
        model,
        lambda: retrieval_scores(
            model, haystack.tolist(), needle.tolist(), question.tolist(), depths=depths, prefix_ids=[1], progress=False
        ),
    )
    for scores, ids, start in zip(got, inputs, (1, 16, 31), strict=True):
        assert ids[0] == 1
        assert ids[start : start + 4].equal(needle)
        assert torch.cat([ids[1:start], ids[start + 4 : 35]]).equal(haystack)
        assert ids[35:].equal(question)
        want = eager_attention(model, ids)[:, :, -1, start : start + 4].sum(-1)
        torch.testing.assert_close(scores, want, atol=1e-6, rtol=1e-5)


def test_no_matrix_of_tokens_by_tokens(largest_tensor):
    model, length = tiny("llama", max_position_embeddings=2048), 2048
    with largest_tensor() as eager:
        eager_attention(model, torch.zeros(length, dtype=torch.long))
    assert eager.numel >= length**2
    enable(model)
    with largest_tensor() as largest:
        induction_scores(model, length=length, samples=1, progress=False)
        retrieval_scores(model, [5] * (length - 8), [6] * 4, [7] * 4, depths=[0.5], progress=False)
    assert largest.numel < length**2 // 8


def test_modules_go_back_to_training():
    model = enable(tiny("llama")).train()
    induction_scores(model, length=40, samples=1, progress=False)
    retrieval_scores(model, [5] * 10, [6], [7], depths=[0], progress=False)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 130}, "130 tokens are beyond the model's context of 128"),
        ({"length": 33}, "length=33 in 2 copies leaves 16 tokens to a block.*a length of 34 or more"),
        ({"rows": 17}, "rows must be 1 to 16.*got 17"),
        ({"rows": 0}, "rows must be 1 to 16.*got 0"),
        ({"repeats": 1}, "repeats must be 2 or more"),
        ({"samples": 0}, "samples 1 or more"),
        ({"vocabulary": []}, "vocabulary must hold token ids from 0 to 49"),
        ({"vocabulary": [3, 50]}, "vocabulary must hold token ids from 0 to 49"),
    ],
)
def test_induction_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        induction_scores(enable(tiny("llama")), **{"length": 64, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"haystack_ids": [3] * 126}, "129 tokens are beyond the model's context of 128"),
        ({"needle_ids": []}, "needle_ids must be one or more token ids"),
        ({"question_ids": []}, "question_ids must be one or more token ids"),
        ({"haystack_ids": [[3, 4]]}, r"haystack_ids must be .* got shape \(1, 2\)"),
        ({"prefix_ids": [50]}, "prefix_ids must lie from 0 to 49, got 50 to 50"),
        ({"depths": []}, "depths must be one or more"),
        ({"depths": [0.5, 1.1]}, "depths must be one or more numbers from 0 to 1"),
    ],
)
def test_retrieval_refusals(changes, message):
    arguments = {"haystack_ids": [3] * 20, "needle_ids": [4, 5], "question_ids": [6], "depths": [0.5], **changes}
    with pytest.raises(ValueError, match=message):
        retrieval_scores(enable(tiny("llama")), **arguments)


def test_another_attention_is_named():
    for call in (
        lambda model: induction_scores(model, length=40, progress=False),
        lambda model: retrieval_scores(model, [3], [4], [5], depths=[0], progress=False),
    ):
        with pytest.raises(ValueError, match=r"call abft\.enable"):
            call(tiny("llama"))


def test_ranking():
    scores = HeadScores(torch.tensor([[0.125, 0.5, 0.0], [0.75, 0.25, 0.0]]))
    assert scores.top(3) == [(1, 0, 0.75), (0, 1, 0.5), (1, 1, 0.25)]
    assert len(scores.top(100)) == 6
    written = json.loads(json.dumps(scores.to_dict()))
    assert written["scores"] == [[0.125, 0.5, 0.0], [0.75, 0.25, 0.0]]
    assert written["top"][0] == {"layer": 1, "head": 0, "score": 0.75}
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        scores.top(0)
    with pytest.raises(ValueError, match=r"got shape \(3, 2, 4\)"):
        HeadScores(torch.zeros(3, 2, 4))
