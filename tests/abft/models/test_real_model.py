"""A real language model: masses, logits and gradients equal eager attention's, and a step of training is right."""

import copy

import pytest
import torch
from float32_comparison import check_mixed_precision
from parity import assert_equal, run
from tiny_models import packed, padded
from transformers import AutoModelForCausalLM

from abft.evaluation.classification import evaluate
from abft.models.loading import load_base, load_tokenizer
from abft.prompts.builder import PromptBuilder, sample_prompts
from abft.prompts.examples import Example
from abft.prompts.tasks import get_task

TEXTS = [
    ("a gorgeous, witty and moving film", 1), ("the plot goes nowhere and the jokes fall flat", 0),
    ("one of the year's best performances", 1), ("a tedious and clumsy mess", 0),
    ("warm, funny and full of life", 1), ("i wanted my two hours back", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(real_model):
    builder = PromptBuilder(load_tokenizer(real_model), get_task("SST2"))
    examples = [Example(text, label) for text, label in TEXTS]
    return sample_prompts(builder, examples, examples, 3, 0)


def batch_of(prompts, layout):
    ids = [torch.tensor(prompt.input_ids) for prompt in prompts]
    groups = []
    for prompt in prompts:
        group = torch.full((prompt.length,), -1, dtype=torch.int8)
        group[list(prompt.negative)], group[list(prompt.positive)] = 1, 0
        groups.append(group)
    return packed(ids, groups) if layout == "packed" else padded(ids, groups, layout)


@pytest.fixture(scope="module")
def model(real_model):
    return AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_equals_eager_attention(model, prompts, layout):
    """Of float32 to 1e-5, but gradients through 30 layers to 2e-5: eager attention's own rounding is 1.1e-5."""
    batch = batch_of(prompts[:3], layout)
    got, want = run(model, batch, "abft"), run(model, batch, "eager")
    assert_equal(got, want, batch, tolerance=2e-5)
    assert_equal((*got[:2], {"none": torch.ones(1)}), (*want[:2], {"none": torch.ones(1)}), batch)


def test_equals_eager_attention_in_float64(model, prompts):
    batch = batch_of(prompts[:2], "packed")
    double = copy.deepcopy(model).double()
    assert_equal(run(double, batch, "abft"), run(double, batch, "eager"), batch)


def test_it_reads_the_labels(real_model, prompts):
    """Six prompts of plain sentiment; a broken load would answer by chance and give likelihoods near ½."""
    found = evaluate(load_base(real_model, dtype="float32"), prompts, progress=False)
    assert found.accuracy >= 4 / 6
    assert found.true_label_likelihood > 0.55


def test_a_step_in_mixed_precision_equals_float32(real_model, prompts, tmp_path):
    """Two prompts: bfloat16 is slow on a CPU without instructions for it."""
    size = {"pseudo_batch_size": 2, "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 2e-5}
    check_mixed_precision(real_model, prompts[:2], tmp_path, rel=2e-2, head_filter=False, **size)
