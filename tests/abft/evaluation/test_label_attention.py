"""Head statistics against eager attention matrices, and what reports make of them."""

import random

import pytest
import torch
from rich.console import Console
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import LABEL_LOOKERS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abft.evaluation.batching import evaluation_mode, length_sorted_batches
from abft.evaluation.classification import evaluate, evaluate_with_heads
from abft.evaluation.label_attention import HeadStatistics, head_statistics
from abft.files import save_figure
from abft.losses import induction_threshold
from abft.models.attention import enable, transformer_of
from abft.models.projections import lora_qk
from abft.plots import accuracy_figure, head_figure, metrics_table, training_figure
from abft.prompts.builder import PromptBuilder, sample_prompts
from abft.prompts.collation import Collator
from abft.prompts.examples import Example
from abft.prompts.tasks import Task, Template

WORDS = [":", "text", "topic", "music", "food", *(f"w{i}" for i in range(20)), "<pad>", "<unk>"]


@pytest.fixture(scope="module")
def builder():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return PromptBuilder(wrapped, Task("topics", ("music", "food"), Template("text:", "topic:")))


@pytest.fixture(scope="module")
def prompts(builder):
    rng = random.Random(0)
    examples = [Example(" ".join(rng.choices(WORDS[5:25], k=rng.randint(2, 7))), rng.randrange(2)) for _ in range(60)]
    return sample_prompts(builder, examples[:11], examples[11:], 3, seed=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(config)


def test_statistics_equal_those_of_eager_attention_one_prompt_at_a_time(model, prompts):
    model.set_attn_implementation("eager")
    passed, correct, wrong = (torch.zeros(3, 4) for _ in range(3))
    for prompt in prompts:
        with torch.no_grad():
            attentions = model(torch.tensor([prompt.input_ids]), output_attentions=True).attentions
        last = torch.stack(attentions)[:, 0, :, -1]  # [L, H, N]
        right = [label == prompt.query_label for label in prompt.demonstration_labels]
        positions = torch.tensor(prompt.label_positions)
        m_correct = last[..., positions[torch.tensor(right)]].sum(-1)
        m_wrong = last[..., positions[~torch.tensor(right)]].sum(-1)
        threshold = induction_threshold(torch.tensor([3]), torch.tensor([prompt.length]))
        passed += m_correct + m_wrong > threshold
        correct += m_correct
        wrong += m_wrong
    found = head_statistics(enable(model), prompts, batch_size=4, progress=False)
    n = len(prompts)
    torch.testing.assert_close(found.mass_correct, correct / n)
    torch.testing.assert_close(found.mass_wrong, wrong / n)
    torch.testing.assert_close(found.induction_rate, passed / n)
    assert found.induction_heads == pytest.approx((passed.sum() / n).item())


def test_share_and_strongest_head():
    rate = torch.tensor([[0.1, 0.9], [0.9, 0.0]])
    correct, wrong = torch.tensor([[0.2, 0.1], [0.6, 0.0]]), torch.tensor([[0.2, 0.3], [0.2, 0.0]])
    found = HeadStatistics(rate, correct, wrong, 1.9)
    torch.testing.assert_close(found.correct_share, torch.tensor([[0.5, 0.25], [0.75, 0.0]]))
    assert found.strongest_head() == (1, 0)  # ties in the rate go to the larger mass on labels
    assert found.to_dict()["correct_share"][1] == [pytest.approx(0.75), 0.0]


def test_no_prompts_and_bad_batch_size_are_named(model, prompts):
    with pytest.raises(ValueError, match="no prompts"):
        head_statistics(enable(model), prompts[:0])
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        next(length_sorted_batches(prompts, Collator(), 0, "", False))


def test_every_prompt_is_batched_once_longest_first(prompts):
    seen, widths = [], []
    for indices, batch in length_sorted_batches(prompts, Collator(), 4, "", False):
        seen += indices
        widths.append(batch["input_ids"].shape[1])
    assert sorted(seen) == list(range(len(prompts)))
    assert widths == sorted(widths, reverse=True)


def test_evaluation_mode_restores_each_module_even_after_an_error(model):
    model.train()
    model.lm_head.eval()

    def stop():
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert model.training
    assert not model.lm_head.training
    assert not torch.is_inference_mode_enabled()
    model.eval()


def test_table_shows_every_run_and_metric():
    rows = {"vanilla": {"accuracy": 0.5123, "ece": 0.1}, "abft": {"accuracy": 0.75, "ece": 0.05}}
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115 (closed at exit)
    console.print(metrics_table(rows, "title"))
    text = console.export_text()
    assert "51.2%" in text
    assert "75.0%" in text
    assert "0.050" in text
    assert "macro-F1" not in text  # a metric that no run has


def test_figures_show_the_numbers(tmp_path):
    bars = accuracy_figure(0.5, {"ABFT": [0.6, 0.7], "E2E": [0.55, 0.6]}, n=100).axes[0]
    assert [patch.get_height() for patch in bars.patches[:2]] == [pytest.approx(65), pytest.approx(57.5)]
    assert "50.0" in bars.get_legend().get_texts()[0].get_text()

    statistics = [
        HeadStatistics(torch.tensor([[0.9, 0.1]]), torch.tensor([[x, 0.1]]), torch.tensor([[0.5, 0.1]]), 1.0)
        for x in (0.5, 1.5)
    ]
    panels = head_figure(statistics[0], statistics[1]).axes
    assert panels[1].images[0].get_array()[0, 0] == pytest.approx(0.75)

    history = [{"step": i, "loss": 3.0 - i, "induction_heads": 2.0, "wrong_penalty": 0.5, "mass_correct": 0.1 * i,
                "mass_wrong": 0.2} for i in range(1, 4)]  # fmt: skip
    figure = training_figure([*history, {"train_runtime": 1.0}])
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0, 1.0, 0.0]
    assert len(figure.axes) == 3
    assert len(training_figure([{"step": 1, "loss": 1.0}]).axes) == 1  # E2E logs no heads
    save_figure(figure, tmp_path / "a" / "figure.png")
    assert (tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "adapters"])
def test_heads_come_with_the_evaluation(kind, toy_prompts):
    """One pass gives what an evaluation and a reading of the heads give, on a decoder without its head too."""
    model = enable(tiny("llama" if kind == "adapters" else kind, **LABEL_LOOKERS))
    if kind == "adapters":
        model = lora_qk(model)
    passes = []
    transformer_of(model).base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    found, heads = evaluate_with_heads(model, toy_prompts, batch_size=16, progress=False)
    assert len(passes) == -(-len(toy_prompts) // 16)
    torch.testing.assert_close(
        found.probabilities, evaluate(model, toy_prompts, progress=False).probabilities, atol=1e-5, rtol=1e-5
    )
    alone = head_statistics(model, toy_prompts, progress=False)
    for name in ("induction_rate", "mass_correct", "mass_wrong"):
        torch.testing.assert_close(getattr(heads, name), getattr(alone, name), atol=1e-5, rtol=1e-5)
    assert heads.mass_wrong.sum() > 0.1


def test_heads_need_the_attention(toy_prompts):
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'; call abft\.enable"):
        evaluate_with_heads(tiny("llama"), toy_prompts, progress=False)
