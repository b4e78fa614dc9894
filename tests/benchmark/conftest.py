"""Shared by the tests of the evaluation: a task small enough to run whole, and the demo model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from abft.benchmark.experiment import Experiment, ExperimentOptions
from abft.benchmark.staicc import TaskData
from abft.benchmark.suites import TESTS
from abft.data import Example
from abft.demo.corpus import DEMO_TASK, mixed_text
from abft.demo.run import MODEL
from abft.loading import load_base


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
        model="demo", data="demo", tasks=["topics", "moods"], methods=["vanilla", "calibration", "abft", "e2e"],
        tests=list(TESTS), generalization=True, k=4, num_prompts=[32], seeds=[0, 1], limit=6, learning_rate=5e-4,
        num_train_epochs=1, batch_size=16, output_dir=str(tmp_path_factory.mktemp("experiments") / "small"), quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def experiment_folder(experiment_options) -> Path:
    """The experiment, run."""
    Experiment(experiment_options).run()
    return Path(experiment_options.output_dir)
