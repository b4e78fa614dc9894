"""Fixtures of the tests of `abft`: prompts of a toy task, the demo model, and an experiment that is small enough."""

from __future__ import annotations

import csv
import json
import os
import random
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abft.demo.corpus import DEMO_TASK, mixed_text
from abft.demo.run import MODEL
from abft.evaluation.staicc import TaskData
from abft.evaluation.suites import TESTS
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.models import gguf
from abft.models.loading import load_base
from abft.prompts.builder import PromptBuilder, PromptSet, sample_prompts
from abft.prompts.examples import Example
from abft.prompts.tasks import Task, Template

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_builder() -> PromptBuilder:
    """Two classes, labels of one token, a tokenizer of whole words."""
    words = ["text", ":", "topic", "music", "war", *(f"w{i}" for i in range(VOCABULARY - 7)), "<pad>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return PromptBuilder(fast, Task("toy", ("music", "war"), Template("text:", "topic:")))


@pytest.fixture(scope="session")
def toy_prompts(toy_builder: PromptBuilder) -> PromptSet:
    """64 prompts of 4 demonstrations, 3 to 9 words each."""
    rng = random.Random(0)

    def example() -> Example:
        label = rng.randint(0, 1)
        first = 20 * label
        return Example(" ".join(f"w{rng.randint(first, first + 22)}" for _ in range(rng.randint(3, 9))), label)

    examples = [example() for _ in range(200)]
    return sample_prompts(toy_builder, examples[:64], examples[64:], 4, 0)


TOPICS = {"music": "guitar melody singer chorus piano", "food": "bread soup butter cheese rice"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    words = [":", "text", "topic", "note", *TOPICS, *" ".join(TOPICS.values()).split(), "<pad>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """train.jsonl, test.csv and all.csv with labels as words."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows = []
    for index in range(120):
        topic = rng.choice(sorted(TOPICS))
        rows.append({"text": f"{' '.join(rng.choices(TOPICS[topic].split(), k=3))} note {index}", "label": topic})
    with open(folder / "train.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:80])
    for name, some in (("test.csv", rows[80:]), ("all.csv", rows)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(some)
    return folder


@pytest.fixture(scope="session")
def real_model() -> str:
    """SmolLM2-135M-Instruct as a folder; the test is skipped without the package that holds it."""
    try:
        return gguf.model_folder(gguf.SMOLLM2)
    except (OSError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def demo_model():
    return load_base(str(MODEL), dtype="float32")


@pytest.fixture(scope="session")
def small_data() -> TaskData:
    """40 to train on, 60 demonstrations, 16 queries of the demo's task."""
    rng = random.Random(1)

    def example() -> Example:
        label = rng.randrange(4)
        return Example(mixed_text(rng, DEMO_TASK.labels[label], "happy"), label)

    examples = [example() for _ in range(116)]
    return TaskData(DEMO_TASK, examples[:40], examples[40:100], examples[100:])


@pytest.fixture(scope="session")
def experiment_options(tmp_path_factory) -> ExperimentOptions:
    """Two tasks of the demo, every test, few prompts."""
    return ExperimentOptions(
        model="demo",
        data="demo",
        tasks=["topics", "moods"],
        methods=["vanilla", "calibration", "abft", "e2e"],
        tests=list(TESTS),
        generalization=True,
        k=4,
        num_prompts=[32],
        seeds=[0, 1],
        limit=6,
        learning_rate=5e-4,
        num_train_epochs=1,
        batch_size=16,
        output_dir=str(tmp_path_factory.mktemp("experiments") / "small"),
        quiet=True,
    )


@pytest.fixture(scope="session")
def one_task_options(experiment_options) -> ExperimentOptions:
    """One task, one seed, one test, 16 prompts in steps of 8."""
    return replace(
        experiment_options, tasks=["topics"], tests=["Normal"], seeds=[0], generalization=False, num_prompts=[16],
        pseudo_batch_size=8, batch_size=8,
    )  # fmt: skip


@pytest.fixture(scope="session")
def experiment_folder(experiment_options) -> Path:
    """The experiment, run."""
    Experiment(experiment_options).run()
    return Path(experiment_options.output_dir)
