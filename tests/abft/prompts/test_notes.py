"""Notes before a run: labels of several tokens, a chat template, no padding token."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from abft.prompts.builder import PromptBuilder
from abft.prompts.notes import prompt_notes
from abft.prompts.tasks import Task


@pytest.fixture
def tokenizer():
    """Bytes, and one word that is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<pad>", *alphabet, "Ġb", "ad", "Ġbad", "Ġad"]
    merges = [("Ġ", "b"), ("a", "d"), ("Ġb", "ad"), ("Ġ", "ad")]
    plain = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>")


def test_nothing_to_note(tokenizer):
    assert prompt_notes([PromptBuilder(tokenizer, Task("one", ("bad", "ad")))]) == []


def test_labels_of_several_tokens(tokenizer):
    builder = PromptBuilder(tokenizer, Task("odd", ("bad", "good")))
    assert [len(ids) for ids in builder.label_ids] == [1, 5]
    (note,) = prompt_notes([builder, builder])
    assert "task odd: the label 'good' has 5 tokens" in note
    assert "'Ġ'" in note


def test_chat_template_and_padding(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.pad_token = None
    notes = prompt_notes([PromptBuilder(tokenizer, Task("one", ("bad", "ad")))])
    assert len(notes) == 2
    assert "chat template" in notes[0]
    assert "padding token" in notes[1]


def test_labels_with_one_first_token_are_refused(tokenizer):
    with pytest.raises(ValueError, match="start with the same token"):
        PromptBuilder(tokenizer, Task("odd", ("good", "great")))
