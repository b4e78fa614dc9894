"""Label logits against the full model, and metrics against hand-computed values and scikit-learn."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from abft.evaluation.classification import Evaluation, evaluate, label_logits
from abft.prompts.builder import PromptBuilder, PromptSet, sample_prompts
from abft.prompts.collation import Collator
from abft.prompts.examples import Example
from abft.prompts.tasks import Task

WORDS = [
    "<unk>",
    "sentence",
    "sentiment",
    ":",
    "negative",
    "neutral",
    "positive",
    *(f"w{i}" for i in range(20)),
]
TASK = Task("mine", ("negative", "neutral", "positive"))

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Large weights give large logits, which a logit transform then visibly changes.
    "initializer_range": 0.3,
}
GPT2_SIZES = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(**GPT2_SIZES, initializer_range=0.3),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=5.0),
    # A head with a bias, and positions from the attention mask alone (ALiBi).
    "gptj": GPTJConfig(**GPT2_SIZES, rotary_dim=4, initializer_range=0.3),
    "bloom": BloomConfig(vocab_size=len(WORDS), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}


def make_model(config, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    if (head := model.get_output_embeddings()).bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PromptBuilder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), TASK)


@pytest.fixture(scope="module")
def prompts(builder):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (24,), generator=generator).tolist()
    words = [torch.randint(0, 20, (n,), generator=generator).tolist() for n in lengths]
    pool = [Example(" ".join(f"w{j}" for j in w), i % 3) for i, w in enumerate(words)]
    return sample_prompts(builder, pool[:7], pool, k=3, seed=0)


def reference(model, prompts, label_token_ids):
    """Full logits, one unpadded prompt at a time."""
    with torch.no_grad():
        rows = [model(torch.tensor([p.input_ids])).logits[0, -1, label_token_ids] for p in prompts]
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_label_logits_equal_the_models_own_unpadded(name, side, builder, prompts):
    attention = "eager" if name in ("gemma2", "gptj", "bloom") else "sdpa"
    model = make_model(CONFIGS[name], attention)
    expected = reference(model, prompts, builder.label_token_ids)
    assert len({p.length for p in prompts}) > 1
    assert expected.std() > 0.01
    batch = Collator(padding_side=side)(prompts)
    found = label_logits(model, batch, builder.label_token_ids)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_bf16_model_gives_logits_that_are_not_rounded_to_bf16(builder, prompts):
    model = make_model(CONFIGS["llama"]).to(torch.bfloat16)
    found = label_logits(model, Collator()(prompts), builder.label_token_ids)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).any()
    expected = reference(model, prompts, builder.label_token_ids).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_peft_model_is_unwrapped_with_its_adapter(builder, prompts):
    model = get_peft_model(make_model(CONFIGS["llama"]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    batch = Collator()(prompts)
    found = label_logits(model, batch, builder.label_token_ids)
    torch.testing.assert_close(found, reference(model, prompts, builder.label_token_ids), rtol=2e-5, atol=2e-5)
    with model.disable_adapter():
        assert not torch.allclose(found, label_logits(model, batch, builder.label_token_ids), atol=1e-3)


def tiny_bert():
    return BertLMHeadModel(BertConfig(**{**SIZES, "num_key_value_heads": None}, is_decoder=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_bert, r"BertLMHeadModel does not consist of one decoder and an LM head, but of bert, cls"),
        (lambda: LlamaModel(CONFIGS["llama"]), r"LM head of LlamaModel is NoneType, not a plain nn\.Linear"),
        (
            lambda: get_peft_model(
                make_model(CONFIGS["llama"]), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
            ),
            r"LM head of LlamaForCausalLM is Linear, not a plain nn\.Linear; .* merge the adapter",
        ),
        (
            lambda: get_peft_model(
                make_model(CONFIGS["llama"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            r"adds prompt tokens",
        ),
        (
            lambda: make_model(HyperCLOVAXConfig(**SIZES, logits_scaling=2.0)),
            r"logits_scaling=2\.0: its effect on the logits of model type 'hyperclovax'",
        ),
    ],
    ids=["bert", "no-head", "lora-head", "prompt-tuning", "unknown-scaling"],
)
def test_models_that_would_be_scored_wrongly_are_refused(make, message, builder, prompts):
    with pytest.raises(NotImplementedError, match=message):
        label_logits(make().eval(), Collator()(prompts), builder.label_token_ids)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_evaluate_keeps_the_order_of_the_prompts(batch_size, prompts):
    model = make_model(CONFIGS["llama"])
    found = evaluate(model, prompts, batch_size=batch_size, progress=False)
    expected = reference(model, prompts, prompts.label_token_ids).softmax(-1)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [p.query_label for p in prompts]
    assert found.predictions.tolist() == expected.argmax(-1).tolist()
    assert found.n == len(prompts)


@pytest.mark.parametrize("fail", [False, True])
def test_evaluate_restores_every_modules_mode(fail, prompts):
    model = make_model(CONFIGS["llama"]).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(any(m.training for m in model.modules())))
    if fail:
        model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, prompts, progress=False)
    else:
        evaluate(model, prompts, progress=False)
    assert seen == [False]
    assert [module.training for module in model.modules()] == before


def test_logits_that_are_not_finite_are_an_error(builder, prompts):
    model = make_model(CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight[builder.label_token_ids[1]] = torch.nan
    with pytest.raises(ValueError, match=r"7 of 7 prompts are not finite, first prompt 0: \[.*nan.*bfloat16"):
        evaluate(model, prompts, progress=False)


def test_evaluate_refuses_bad_arguments(prompts):
    model = make_model(CONFIGS["llama"])
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(model, prompts[:0])
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        evaluate(model, prompts, batch_size=0)
    with pytest.raises(TypeError, match=r"sample 0 is a Prompt in a list.*PromptSet\(builder, prompts\)"):
        evaluate(model, list(prompts))


def test_a_builder_makes_a_set_of_any_prompts(builder, prompts):
    model = make_model(CONFIGS["llama"])
    result = evaluate(model, prompts, progress=False)
    again = evaluate(model, PromptSet(builder, list(prompts)), progress=False)
    assert torch.equal(again.probabilities, result.probabilities)


def test_progress_bar_is_shown_only_when_asked_for(prompts, capsys):
    evaluate(make_model(CONFIGS["llama"]), prompts, progress=False)
    assert capsys.readouterr().out == ""
    evaluate(make_model(CONFIGS["llama"]), prompts)
    assert "Evaluating" in capsys.readouterr().out


def test_metrics_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    result = Evaluation.from_probabilities(probabilities, torch.tensor([0, 1, 1, 0]), bins=10)
    assert result.predictions.tolist() == [0, 0, 1, 0]
    assert result.accuracy == 0.75
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    # class 0: 2 true, 1 false positive: F1 = 4/5; class 1: 1 true, 1 missed: F1 = 2/3.
    assert result.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert result.true_label_likelihood == pytest.approx((0.9 + 0.4 + 0.8 + 0.7) / 4)
    # Each prediction is alone in its bin: |1 - 0.9|, |0 - 0.6|, |1 - 0.8|, |1 - 0.7|.
    assert result.ece == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    assert json.loads(json.dumps(result.to_dict())) == {
        "n": 4,
        "accuracy": result.accuracy,
        "accuracy_stderr": result.accuracy_stderr,
        "macro_f1": result.macro_f1,
        "true_label_likelihood": result.true_label_likelihood,
        "ece": result.ece,
    }


def test_calibration_error_counts_confidence_one():
    # Half of the certain predictions are wrong.
    certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert Evaluation.from_probabilities(certain, torch.tensor([0, 1])).ece == pytest.approx(0.5)


def test_calibration_bins_are_closed_on_the_right():
    # 1.0 (wrong) and 0.96 (right) share the last of 15 bins: |1 - 1.96| / 2. Apart: (1 + 0.04) / 2.
    probabilities = torch.tensor([[1.0, 0.0], [0.96, 0.04]])
    assert Evaluation.from_probabilities(probabilities, torch.tensor([1, 0])).ece == pytest.approx(0.48)
    # 0.5 (right) closes the first of two bins and 0.75 (wrong) is alone in the second.
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    assert Evaluation.from_probabilities(probabilities, torch.tensor([0, 1]), bins=2).ece == pytest.approx(0.625)


def test_calibration_error_of_confidence_zero_is_finite():
    result = Evaluation.from_probabilities(torch.zeros(1, 2), torch.tensor([1]))
    assert result.ece == 0
    assert result.accuracy == 0


def test_macro_f1_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 6):
        probabilities = torch.rand(40, classes, generator=generator).softmax(-1)
        # The last class is never gold, and in one draw or another never predicted.
        labels = torch.randint(0, classes - 1, (40,), generator=generator)
        result = Evaluation.from_probabilities(probabilities, labels)
        assert result.macro_f1 == pytest.approx(f1_score(labels, result.predictions, average="macro"))
    absent = Evaluation.from_probabilities(torch.tensor([[0.8, 0.2, 0.0]]), torch.tensor([0]))
    assert absent.macro_f1 == 1


@pytest.mark.parametrize(("shape", "n"), [((0, 2), 0), ((3, 2), 2), ((3,), 3)])
def test_metrics_refuse_shapes_that_do_not_fit(shape, n):
    with pytest.raises(ValueError, match="probabilities must be"):
        Evaluation.from_probabilities(torch.zeros(shape), torch.zeros(n, dtype=torch.long))
