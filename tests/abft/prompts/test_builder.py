"""Prompts in every family of tokenizer, their sampling and their batches."""

import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from abft.prompts.builder import Prompt, PromptBuilder, PromptSet, sample_prompts
from abft.prompts.collation import Collator, padding_id
from abft.prompts.examples import Example
from abft.prompts.targets import AttentionTarget
from abft.prompts.tasks import Task, Template

SST2 = Task("SST2", ("negative", "positive"))
EXAMPLES = [
    Example("a great movie", 1),
    Example("dull, slow and far too long", 0),
    Example("I loved it!", 1),
    Example("the plot makes no sense", 0),
]
CORPUS = [f"sentence: {e.text} sentiment: {SST2.labels[e.label]}\n" for e in EXAMPLES] * 8 + [
    "note:\n",
    "a : 1",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>"]

# The pre-tokenizer of Llama-3 and Qwen2, which joins punctuation to the newlines after it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(split: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_bpe(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Llama-2 has no token across a newline; splitting the training text at newlines makes none here.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=["\n"], show_progress=False)
    tokenizer.train_from_iterator((line.strip() for line in CORPUS), trainer)
    return tokenizer


def unigram() -> Tokenizer:
    # As in T5 and XLNet: the normalizer turns a newline into the space that Metaspace then marks.
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", " "), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


FAMILIES = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA3_SPLIT),
    "metaspace-always": lambda: metaspace_bpe("always"),
    "metaspace-first": lambda: metaspace_bpe("first"),
    "unigram": unigram,
    "wordlevel": word_level,
    "wordpiece": word_piece,
}


def wrap(tokenizer: Tokenizer, bos: bool = False, eos: bool = False, **kwargs) -> PreTrainedTokenizerFast:
    layout = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(layout),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request) -> Tokenizer:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(wrap(byte_level(), bos=True, pad_token="</s>"), SST2)


def full_text(demonstrations, query, task=SST2) -> str:
    template = task.template
    return "".join(
        [
            template.text_segment(d.text)
            + template.label_prefix_segment
            + template.label_segment(task.labels[d.label])
            + template.separator
            for d in demonstrations
        ]
        + [template.text_segment(query.text), template.label_prefix_segment]
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_prompt_is_the_text_in_every_tokenizer(family, k, bos):
    tokenizer = wrap(family, bos=bos, eos=True)
    built = PromptBuilder(tokenizer, SST2)
    demonstrations, query = EXAMPLES[:k], EXAMPLES[3]
    prompt = built.build(demonstrations, query)

    ids = list(prompt.input_ids)
    bos_id, eos_id = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert ids.count(bos_id) == bos
    assert ids[0] == bos_id or not bos
    assert eos_id not in ids
    text = full_text(demonstrations, query)
    # Compared with the decoded ids of the whole text where the tokenizer itself drops spaces or capitals.
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.decode(ids, skip_special_tokens=True) == whole
    if isinstance(family.model, models.BPE):
        assert whole == text

    assert prompt.demonstration_labels == tuple(d.label for d in demonstrations)
    assert prompt.query_label == 0
    for position, label in zip(prompt.label_positions, prompt.demonstration_labels, strict=True):
        assert ids[position] == built.label_token_ids[label]
        assert tokenizer.decode(ids[:position]).replace(" ", "").endswith("sentiment:")
    assert tokenizer.decode(ids[-1]).endswith(":")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "unigram", "wordlevel", "wordpiece"])
def test_segments_give_the_tokens_of_the_whole_text(name):
    tokenizer = wrap(FAMILIES[name](), bos=True)
    prompt = PromptBuilder(tokenizer, SST2).build(EXAMPLES[:3], EXAMPLES[3])
    assert list(prompt.input_ids) == tokenizer.encode(full_text(EXAMPLES[:3], EXAMPLES[3]))


def test_no_spurious_space_after_the_separator_with_metaspace():
    tokenizer = wrap(metaspace_bpe("always"))
    tokens = tokenizer.convert_ids_to_tokens(PromptBuilder(tokenizer, SST2).build(EXAMPLES[:1], EXAMPLES[1]).input_ids)
    newline = tokens.index("\n")
    assert tokens[0].startswith("▁")
    assert tokens[newline - 1].endswith("positive")
    assert not tokens[newline + 1].startswith("▁")


def test_separator_that_the_tokenizer_drops_takes_no_token():
    tokenizer = wrap(word_level())
    prompt = PromptBuilder(tokenizer, SST2).build(EXAMPLES[:1], EXAMPLES[2])
    words = [
        "sentence",
        ":",
        "a",
        "great",
        "movie",
        "sentiment",
        ":",
        "positive",
        "sentence",
        ":",
        "I",
        "loved",
        "it",
        "!",
        "sentiment",
        ":",
    ]
    assert tokenizer.convert_ids_to_tokens(prompt.input_ids) == words
    assert prompt.label_positions == (7,)


@pytest.mark.parametrize(
    "template",
    [
        Template(separator="\n\n"),
        Template(separator=" "),
        Template(separator=" ||| "),
        Template(separator=""),
        Template(text_prefix=""),
        Template(text_prefix="Review (short)", label_prefix="=>"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_templates_of_ones_own_are_exact(name, template):
    task = Task("mine", SST2.labels, template)
    tokenizer = wrap(FAMILIES[name]())
    built = PromptBuilder(tokenizer, task)
    prompt = built.build(EXAMPLES[:3], EXAMPLES[3])
    assert tokenizer.decode(list(prompt.input_ids)) == full_text(EXAMPLES[:3], EXAMPLES[3], task)
    for position, label in zip(prompt.label_positions, prompt.demonstration_labels, strict=True):
        assert prompt.input_ids[position] == built.label_token_ids[label]
        assert tokenizer.decode(prompt.input_ids[:position]).endswith(template.label_prefix)


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(st.lists(st.tuples(text, st.integers(0, 1)), max_size=4), text)
@settings(max_examples=100, deadline=None)
def test_any_text_decodes_to_itself_in_byte_level_bpe(builder, demonstrations, query):
    examples = [Example(*pair) for pair in demonstrations]
    prompt = builder.build(examples, Example(query, 0))
    ids = list(prompt.input_ids)
    assert builder.tokenizer.decode(ids[1:]) == full_text(examples, Example(query, 0))
    assert [ids[p] for p in prompt.label_positions] == [builder.label_token_ids[e.label] for e in examples]


def test_labels_with_one_first_token_are_refused():
    task = Task("mine", ("plotting", "plot"))
    with pytest.raises(ValueError, match=r"labels 'plotting' and 'plot' start with the same token 'Ġplot' .*choose"):
        PromptBuilder(wrap(byte_level()), task)


def test_unknown_and_vanishing_labels_are_refused():
    with pytest.raises(ValueError, match=r"label 'zebra' starts with the unknown token '<unk>'.*choose"):
        PromptBuilder(wrap(word_level()), Task("mine", ("positive", "zebra")))
    tokenizer = word_level()
    tokenizer.normalizer = normalizers.Replace("negative", "")
    with pytest.raises(ValueError, match=r"label 'negative' yields no token"):
        PromptBuilder(wrap(tokenizer), SST2)


def test_max_length_names_length_limit_and_remedy():
    tokenizer = wrap(word_level())
    length = PromptBuilder(tokenizer, SST2).build(EXAMPLES[:1], EXAMPLES[3]).length
    assert PromptBuilder(tokenizer, SST2, max_length=length).build(EXAMPLES[:1], EXAMPLES[3]).length == length
    with pytest.raises(ValueError, match=rf"prompt of {length} tokens exceeds max_length={length - 1}; use fewer"):
        PromptBuilder(tokenizer, SST2, max_length=length - 1).build(EXAMPLES[:1], EXAMPLES[3])


@pytest.mark.parametrize("label", [-1, 2])
def test_label_outside_the_task_is_refused(builder, label):
    with pytest.raises(ValueError, match=r"none of the 2 classes of task 'SST2'"):
        builder.build([Example("x", label)], EXAMPLES[0])


POOL = [Example(f"text {i}", i % 2) for i in range(12)]


def texts(builder: PromptBuilder, prompts: list[Prompt]) -> list[list[str]]:
    decoded = [builder.tokenizer.decode(p.input_ids, skip_special_tokens=True) for p in prompts]
    return [[line.split(" sentiment:")[0].removeprefix("sentence: ") for line in d.split("\n")] for d in decoded]


def test_sampling_is_seeded_without_replacement_and_without_the_query(builder):
    prompts = sample_prompts(builder, POOL, POOL, k=11, seed=3)
    for query, found in zip(POOL, texts(builder, prompts), strict=True):
        assert found[-1] == query.text
        assert sorted(found[:-1]) == sorted(e.text for e in POOL if e != query)
    assert prompts == sample_prompts(builder, POOL, POOL, k=11, seed=3)
    assert prompts != sample_prompts(builder, POOL, POOL, k=11, seed=4)


def test_sampling_leaves_out_every_copy_of_the_query(builder):
    pool = [Example("same", 0), Example("same", 1), Example("same", 0), Example("other", 1)]
    (prompt,) = sample_prompts(builder, [Example("same", 0)], pool, k=1, seed=0)
    assert texts(builder, [prompt]) == [["other", "same"]]
    with pytest.raises(ValueError, match=r"k=2, but the pool of 4 offers 1 "):
        sample_prompts(builder, [Example("same", 0)], pool, k=2, seed=0)


def test_sampling_is_uniform_over_the_pool(builder):
    queries = [Example(f"text {i % 12}", 0) for i in range(3000)]
    drawn = [name for found in texts(builder, sample_prompts(builder, queries, POOL, 2, seed=0)) for name in found[:-1]]
    counts = torch.tensor([drawn.count(e.text) for e in POOL])
    # 6000 draws over 12 texts: mean 500, standard deviation below √500 = 22.4; five of these is 112.
    assert (counts - 500).abs().max() < 112


def test_unseen_label_prompts_never_show_the_gold_label(builder):
    prompts = sample_prompts(builder, POOL, POOL, k=6, seed=0, unseen_label=True)
    assert all(p.query_label not in p.demonstration_labels and len(p.label_positions) == 6 for p in prompts)
    with pytest.raises(ValueError, match=r"k=7, but the pool of 12 offers 6 .*unseen_label=True"):
        sample_prompts(builder, POOL, POOL, k=7, seed=0, unseen_label=True)


@pytest.mark.parametrize(("k", "message"), [(-1, "k must be 0 or more"), (13, "k=13, but the pool of 12 offers 12")])
def test_impossible_k(builder, k, message):
    with pytest.raises(ValueError, match=message):
        sample_prompts(builder, [Example("new", 0)], POOL, k=k, seed=0)


def test_thousands_of_prompts_take_seconds(builder):
    pool = [Example(f"some text number {i} " + "and more " * 20, i % 2) for i in range(2000)]
    start = time.perf_counter()
    prompts = sample_prompts(builder, pool * 2, pool, k=4, seed=0)
    assert len(prompts) == 4000
    assert time.perf_counter() - start < 15


PROMPTS = [
    # tokens, label positions, demonstration labels, gold label
    Prompt((1, 10, 11, 12, 13), (2, 3), (0, 1), 1, label_id=41),
    Prompt((1, 10, 11), (1,), (0,), 1, label_id=41),
    Prompt((1, 10), (), (), 0),
]


def test_a_prompt_is_a_target():
    targets = [(prompt.query_positions, prompt.positive, prompt.negative, prompt.label) for prompt in PROMPTS]
    assert targets == [((4,), (3,), (2,), 1), ((2,), (), (1,), 1), ((1,), (), (), 0)]
    prompt = Prompt([1, 10, 11, 12, 13], [2, 3], [0, 1], 1, label_id=41)
    assert prompt == PROMPTS[0]
    assert hash(prompt) == hash(PROMPTS[0])
    assert replace(prompt, query_label=0).positive == (2,)
    with pytest.raises(ValueError, match="negative position 5 is not in 0 … 4"):
        Prompt((1, 10, 11, 12, 13), (2, 5), (0, 0), 1)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Prompt((1, 10, 11), (1, 2), (0,), 1)


def test_the_builder_gives_the_gold_label_its_token(builder):
    prompts = builder.build_set([(EXAMPLES[:2], EXAMPLES[2]), ([], EXAMPLES[3])])
    assert [prompt.label_id for prompt in prompts] == [builder.label_token_ids[label] for label in (1, 0)]
    assert [prompt.label for prompt in prompts] == [1, 0]
    assert prompts == PromptSet(builder, [builder.build(EXAMPLES[:2], EXAMPLES[2]), builder.build([], EXAMPLES[3])])


def test_a_set_keeps_its_builder(builder):
    prompts = sample_prompts(builder, POOL, POOL, k=2, seed=0)
    part = prompts[2:5]
    assert part.builder is prompts.builder is builder
    assert part.label_token_ids == builder.label_token_ids
    assert list(part) == [prompts[2], prompts[3], prompts[4]]
    assert part != prompts
    assert part != list(part)
    again = pickle.loads(pickle.dumps(part))
    assert again == part
    assert again.label_token_ids == builder.label_token_ids
    with pytest.raises(TypeError, match="sample 1 is AttentionTarget, not a Prompt"):
        PromptSet(builder, [prompts[0], AttentionTarget([1, 2], [1], [0])])


def test_collated_batch_by_hand():
    pad = 77
    batch = Collator(pad)(PROMPTS)
    expected = {
        "input_ids": [[1, 10, 11, 12, 13], [1, 10, 11, pad, pad], [1, 10, pad, pad, pad]],
        "seq_lens": [5, 3, 2],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]],
        "key_groups": [[-1, -1, 1, 0, -1], [-1, 1, -1, -1, -1], [-1, -1, -1, -1, -1]],
        "query_positions": [[4], [2], [1]],
        "prompt_lengths": [[5], [3], [2]],
        "demonstrations": [[2], [1], [0]],
        "correct_demonstrations": [[1], [0], [0]],
        "row_weights": [[1.0], [1.0], [1.0]],
        "labels": [1, 1, 0],
        "label_ids": [41, 41, -100],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {name: tensor.dtype for name, tensor in batch.items() if tensor.dtype != torch.int64} == {
        "key_groups": torch.int8,
        "seq_lens": torch.int32,
        "row_weights": torch.float32,
    }


prompt_strategy = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.integers(0, n - 2), unique=True, max_size=3).flatmap(
        lambda positions: st.builds(
            Prompt,
            st.lists(st.integers(5, 99), min_size=n, max_size=n).map(tuple),
            st.just(tuple(sorted(positions))),
            st.tuples(*[st.integers(0, 1)] * len(positions)),
            st.integers(0, 1),
        )
    )
)


@given(st.lists(prompt_strategy, min_size=1, max_size=5), st.sampled_from(["left", "right"]))
@settings(max_examples=100, deadline=None)
def test_collated_rows_hold_their_prompts_on_either_side(prompts, side):
    batch = Collator(3, padding_side=side)(prompts)
    width = max(p.length for p in prompts)
    for row, prompt in enumerate(prompts):
        start = width - prompt.length if side == "left" else 0
        own = slice(start, start + prompt.length)
        assert batch["input_ids"][row, own].tolist() == list(prompt.input_ids)
        groups = {
            start + p: 0 if label == prompt.query_label else 1
            for p, label in zip(prompt.label_positions, prompt.demonstration_labels, strict=True)
        }
        assert {c: g for c, g in enumerate(batch["key_groups"][row].tolist()) if g != -1} == groups
        assert batch["query_positions"][row].item() == start + prompt.length - 1
        outside = torch.ones(width, dtype=torch.bool)
        outside[own] = False
        assert (batch["input_ids"][row][outside] == 3).all()
        if len({p.length for p in prompts}) == 1:
            assert not {"seq_lens", "seq_starts", "position_ids"} & batch.keys()
            continue
        assert batch["position_ids"][row, own].tolist() == list(range(prompt.length))
        assert (batch["position_ids"][row][outside] == 0).all()
        assert batch["seq_lens"][row] == prompt.length
        assert batch["seq_starts"][row] == start if side == "left" else "seq_starts" not in batch


def test_padding_token_falls_back_to_eos_and_zero():
    model = SimpleNamespace(pad_token_id=None, eos_token_id=[5, 6])
    for options, expected in (({"pad_token": "<s>", "eos_token": "</s>"}, 1), ({"eos_token": "</s>"}, 2), ({}, 0)):
        prompts = PromptSet(PromptBuilder(wrap(word_level(), **options), SST2), PROMPTS)
        assert prompts.pad_token_id == padding_id(prompts, model) == expected
    assert padding_id(list(prompts), model) == 5
    assert padding_id(list(prompts)) == 0


def test_collator_refuses_bad_input():
    with pytest.raises(ValueError, match="empty list of samples"):
        Collator()([])
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', got 'both'"):
        Collator(padding_side="both")
