"""Shared by the tests of the thin layer: prompts of a toy task."""

from __future__ import annotations

import os
import random

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from abft.data import Example
from abft.prompts import Prompt, PromptBuilder, sample_prompts
from abft.tasks import Task, Template

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
def toy_prompts(toy_builder: PromptBuilder) -> list[Prompt]:
    """64 prompts of 4 demonstrations, 3 to 9 words each."""
    rng = random.Random(0)

    def example() -> Example:
        label = rng.randint(0, 1)
        first = 20 * label
        return Example(" ".join(f"w{rng.randint(first, first + 22)}" for _ in range(rng.randint(3, 9))), label)

    examples = [example() for _ in range(200)]
    return sample_prompts(toy_builder, examples[:64], examples[64:], 4, 0)
