"""Prompts equal those that StaICC 0.1.1 itself makes, and its files are read without running code in them."""

import json
import os
import pickle
import random
import string
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from abft.evaluation.classification import Evaluation, evaluate
from abft.evaluation.staicc import (
    _FILES,
    StaICCRandom,
    TaskData,
    _package_file,
    load_task_data,
    read_pickle,
    split_task,
    staicc_order,
    staicc_task,
    staicc_task_data,
    template_variants,
)
from abft.evaluation.suites import StaICCPromptBuilder, TaskSuite
from abft.prompts.builder import PromptBuilder
from abft.prompts.examples import Example
from abft.prompts.tasks import TASKS, Task, get_task

LOADERS = ("glue_sst2", "rotten_tomatoes", "financial_phrasebank", "sst5", "trec", "agnews", "subjective",
           "tweet_eval_emotion", "tweet_eval_hate", "hate_speech_18")  # fmt: skip


@pytest.fixture(scope="module")
def staicc():
    """Their modules."""
    pytest.importorskip("StaICC", reason="the extra abft[staicc] is not installed")
    from StaICC.prefabricate_inference import model_kernel
    from StaICC.util import configs, experimentor, functional, hgf_dataset_loader, stable_random

    return SimpleNamespace(
        configs=configs,
        experimentor=experimentor,
        functional=functional,
        loaders=hgf_dataset_loader,
        kernel=model_kernel,
        random=stable_random,
    )


@pytest.fixture(scope="module", params=range(10), ids=[task.name for task in TASKS])
def pair(request, staicc):
    """A task's data as they load it and as we do, and the sizes of its splits."""
    theirs = getattr(staicc.loaders, LOADERS[request.param])()
    sizes = staicc.configs.STANDARD_SETTINGS
    name = {"FP": "split_for_FP", "TEE": "split_for_TEE"}.get(TASKS[request.param].name)
    sizes = sizes if name is None else sizes[name]
    dividing = [sizes[f"{split}_number"] for split in ("calibration", "demonstration", "test")]
    return theirs, staicc_task_data(staicc_task(request.param)), dividing


def builder_without_tokenizer(task: Task) -> PromptBuilder:
    """Return a builder of text only."""
    builder = PromptBuilder.__new__(PromptBuilder)
    builder.task = task
    return builder


def texts(data: TaskData, k: int, n: int) -> list[str]:
    builder = builder_without_tokenizer(data.task)
    queries = data.queries[:512]
    return [
        builder.text([data.demonstrations[i] for i in drawn], queries[number % len(queries)]) + " "
        for number, drawn in enumerate(data.draws(k, n))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("k", [4, 8])
def test_prompts_are_theirs(pair, staicc, k):
    loaded, ours, dividing = pair
    theirs = staicc.experimentor.single_experimentor(original_dataset=loaded, k=k, dividing=dividing)
    assert [example.text for example in ours.train] == [row[0][0] for row in theirs.calibration_set().table]
    expected = theirs.prompt_set()
    assert len(expected) == 1024
    assert texts(ours, k, 1024) == expected
    gold = [theirs.triplet_dataset.get_default_ground_truth_label_index(i) for i in range(512)]
    assert [query.label for query in ours.queries] == gold


@pytest.mark.filterwarnings("ignore")
def test_templates_are_theirs(pair, staicc):
    loaded, ours, dividing = pair
    theirs = staicc.experimentor.template_sensitivity_experimentor(
        original_dataset=loaded, k=4, dividing=[*dividing[:2], 100]
    )
    draws = ours.draws(4, 100)
    for index, template in enumerate(template_variants(ours.task)):
        theirs._set_template(index)
        builder = builder_without_tokenizer(replace(ours.task, template=template))
        prompts = [
            builder.text([ours.demonstrations[i] for i in drawn], query) + " "
            for drawn, query in zip(draws, ours.queries, strict=False)
        ]
        assert prompts == theirs.prompt_set()


# --- the other tests' prompts, with small splits (their sampler copies the pool for each draw) ---------------------


@pytest.fixture(scope="module", params=[("FP", 4), ("TREC", 4), ("TEE", 3)], ids=lambda case: f"{case[0]}-k{case[1]}")
def texts_of_a_task(request, staicc):
    """Our suite with a builder of texts in place of prompts, and the arguments of their experimentors."""
    name, k = request.param
    index = [task.name for task in TASKS].index(name)
    task, sizes = staicc_task(index), (128, 200, 64)
    data = split_task(task, read_pickle(_package_file(f"cached_dataset/{_FILES[name][0]}.dataset"), task), sizes)
    suite = TaskSuite(data, SimpleNamespace(), k)

    class Texts(PromptBuilder):
        def __init__(self, task):
            self.task = task

        def build_set(self, pairs):
            return [self.text(demonstrations, query) + " " for demonstrations, query in pairs]

    suite.__dict__["builder"] = Texts(data.task)  # a cached property
    return suite, {"original_dataset": getattr(staicc.loaders, LOADERS[index])(), "k": k, "dividing": list(sizes)}


@pytest.mark.filterwarnings("ignore")
def test_unseen_labels_are_their_out_of_domain_mode(texts_of_a_task, staicc):
    ours, theirs = texts_of_a_task
    theirs = staicc.experimentor.single_experimentor(**theirs)
    theirs.set_out_of_domain_mode()
    assert ours.unseen() == theirs.prompt_set()


@pytest.mark.filterwarnings("ignore")
def test_biased_queries_are_theirs(texts_of_a_task, staicc):
    ours, arguments = texts_of_a_task
    for kind, made in (("contextual", ours.empty_queries()), ("domain", ours.random_word_queries())):
        theirs = staicc.experimentor.prior_bias_experimentor(**arguments, bias_type=kind)
        assert made == theirs.prompt_set(), kind


@pytest.mark.filterwarnings("ignore")
def test_wrong_labels_are_theirs(texts_of_a_task, staicc):
    ours, arguments = texts_of_a_task
    theirs = staicc.experimentor.GLER_experimentor(**arguments)
    theirs._sensitivity_init()
    for made in ours.with_wrong_labels():
        assert made == theirs.prompt_set()
        theirs._sensitivity_step()


@pytest.mark.filterwarnings("ignore")
def test_calibration_prompts_are_theirs(texts_of_a_task, staicc):
    from StaICC.prefabricate_inference.standard_calibration import contextual_calibration

    ours, arguments = texts_of_a_task
    theirs = staicc.experimentor.single_experimentor(**arguments)
    shown = []
    contextual_calibration(theirs.get_label_space()).train(
        theirs.prompt_former.write_prompt_from_dataline,
        lambda prompt, label_space: shown.append(prompt) or [0.0] * len(label_space),
        theirs.calibration_set(),
        calibration_number=512,
        k=ours.k,
    )
    assert ours.calibration_prompts() == shown


def test_subjectivity_has_our_words_unless_theirs_are_asked_for(staicc):
    assert get_task("SUBJ").labels == ("objective", "subjective")
    assert staicc_task("SUBJ").labels == ("false", "true")
    assert all(staicc_task(task.name).labels == task.labels for task in TASKS if task.name != "SUBJ")


def test_order_of_published_data(staicc):
    """A data set as published comes into the order that their loaders give it."""
    rng = random.Random(0)
    lengths = [1023, 1024, 1025, *(rng.randint(3, 2000) for _ in range(300))]
    rows = [(["".join(rng.choices(string.ascii_letters, k=length))], 0) for length in lengths]
    theirs = staicc.loaders.basic_datasets_loader()
    theirs.table = list(rows)
    theirs._automatic_cut_by_length()
    theirs._shuffle()
    ours = staicc_order([Example(text, label) for [text], label in rows])
    assert len(ours) < len(rows)
    assert [example.text for example in ours] == [row[0][0] for row in theirs.table]


def test_generator_is_the_congruential_one():
    generator, state = StaICCRandom(7), 7
    for _ in range(20):
        state = (1664525 * state + 1013904223) % 2**32
        assert generator.random() == state / 2**32
    assert sorted(StaICCRandom().sample(range(50), 50)) == list(range(50))
    with pytest.raises(ValueError, match="draw 3 of 2"):
        StaICCRandom().sample([1, 2], 3)


@pytest.mark.filterwarnings("ignore")
def test_compatible_scores_are_theirs(staicc, demo_model, demo_tokenizer, small_data):
    """Return probabilities and metrics of StaICC's inference on the demo model: one prompt a time, full logits."""
    suite = TaskSuite(small_data, demo_tokenizer, k=3, staicc_compat=True)
    found = suite.run(demo_model, ["Normal"], progress=False)["Normal"]
    labels = list(small_data.task.labels)
    builder = StaICCPromptBuilder(demo_tokenizer, small_data.task)
    queries = small_data.queries
    shown = [
        builder.text([small_data.demonstrations[i] for i in drawn], queries[number % len(queries)]) + " "
        for number, drawn in enumerate(small_data.draws(3, 2 * len(queries)))
    ]
    theirs = [
        staicc.kernel.standard_ICL_inference_with_torch_Causal_LM(
            prompt=prompt, model=demo_model, tokenizer=demo_tokenizer, label_space=labels, cache_empty=None
        )
        for prompt in shown
    ]
    ours = evaluate(demo_model, suite.normal, progress=False)
    torch.testing.assert_close(ours.probabilities, torch.tensor(theirs), rtol=0, atol=1e-5)
    gold = [query.label for query in queries] * 2
    for name, value in found["staicc"].items():
        assert value == pytest.approx(getattr(staicc.functional, name)(gold, theirs), abs=1e-4), name


@pytest.mark.filterwarnings("ignore")
def test_compatible_metrics_on_hard_cases(staicc):
    """Rows that sum to exactly 1 (one-hot, ties) as well as ones that do not."""
    from abft.evaluation.metrics import staicc_metrics

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    cases = [
        torch.randn(40, 3, generator=generator, dtype=torch.float64).softmax(1),
        torch.nn.functional.one_hot(torch.randint(3, (40,), generator=generator), 3).double(),
        torch.nn.functional.one_hot(torch.zeros(40, dtype=torch.long), 3).double(),
        torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).repeat(40, 1),
    ]
    for probabilities in cases:
        found = staicc_metrics(Evaluation.from_probabilities(probabilities, labels))
        for name, value in found.items():
            expected = getattr(staicc.functional, name)(labels.tolist(), probabilities.tolist())
            assert value == pytest.approx(expected, abs=1e-12), name


# --- files ------------------------------------------------------------------------------------------------


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([(["text"], 0), _Payload()]),
        pickle.dumps(SimpleNamespace(a=1)),
        pickle.dumps([(["text"], 0), (["text"], "0")]),
        pickle.dumps([(["text"], 7)]),
        pickle.dumps([("text", 0)]),
        pickle.dumps({"text": 0}),
        pickle.dumps([(["text"], 0)])[:-3],
        b"not a pickle",
        b"",
    ],
    ids=["code", "object", "word", "class", "string", "mapping", "cut", "text", "empty"],
)
def test_files_with_anything_else_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sst2.dataset"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sst2\.dataset"):
        read_pickle(path, get_task("SST2"))
    assert os.listdir() == ["sst2.dataset"]


def test_plain_file_is_read(tmp_path):
    path = tmp_path / "sst2.dataset"
    path.write_bytes(pickle.dumps([(["a b"], 1), (["c"], 0)]))
    assert read_pickle(path, get_task("SST2")) == [Example("a b", 1), Example("c", 0)]


def test_not_installed(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("abft.evaluation.staicc.metadata.distribution", missing)
    with pytest.raises(ValueError, match=r"pip install 'abft\[staicc\]'"):
        staicc_task_data("SST2")
    variants = template_variants(get_task("SST2"))
    assert len(set(variants)) == 9
    assert variants[0] == get_task("SST2").template


def test_own_files(tmp_path):
    rows = [{"text": f"text {i}", "label": ("negative", "positive")[i % 2]} for i in range(80)]
    (tmp_path / "SST2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40)))
    data = load_task_data("0", tmp_path)
    assert data.task == get_task("SST2")
    assert [len(part) for part in (data.train, data.demonstrations, data.queries)] == [20, 40, 20]
    parts = (*data.train, *data.demonstrations, *data.queries)
    assert len({example.text for example in parts}) == 80
    assert parts == tuple(StaICCRandom().sample([Example(f"text {i}", i % 2) for i in range(80)], 80))
    assert load_task_data("mine", tmp_path).task.labels == ("a", "b")
    assert load_task_data("sst2", tmp_path, sizes=(4, 5, 6)).queries == split_task(
        data.task, [Example(f"text {i}", i % 2) for i in range(80)], (4, 5, 6)
    ).queries  # fmt: skip
    with pytest.raises(ValueError, match=r"no data for task 'TREC'"):
        load_task_data("TREC", tmp_path)
    with pytest.raises(ValueError, match=r"built-in tasks are SST2"):
        load_task_data("other", tmp_path)


def test_splits_and_draws_refuse_too_much(small_data):
    with pytest.raises(ValueError, match=r"1024 \+ 4096 \+ 512 .* there are 3"):
        split_task(get_task("SST2"), [Example("a", 0)] * 3)
    with pytest.raises(ValueError, match=r"k=61, but task topics has 60"):
        small_data.draws(61, 1)
    with pytest.raises(ValueError, match="unknown task 'SST9'"):
        staicc_task_data("SST9")
    with pytest.raises(ValueError, match="StaICC has no task 'mine'"):
        staicc_task_data(Task("mine", ("a", "b")))


# --- a byte-level tokenizer, as most models have -------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level(staicc):
    """Trained on some of the texts, and on the label words so that each is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = [example.text for task in TASKS for example in staicc_task_data(task).queries[:64]]
    labels = [f" {label}" for task in (*TASKS, staicc_task("SUBJ")) for label in task.labels]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(rows + 500 * labels, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_tokens_spell_the_prompts(pair, byte_level):
    _, ours, _ = pair
    suite = TaskSuite(ours, byte_level, k=4, limit=3)
    expected = [text for number, text in enumerate(texts(ours, 4, 1024)) if number % 512 < 3]
    for prompt, text in zip(suite.normal, expected, strict=True):
        assert byte_level.decode(prompt.input_ids) + " " == text
        shown = [byte_level.decode(prompt.input_ids[position]) for position in prompt.label_positions]
        assert shown == [f" {ours.task.labels[label]}" for label in prompt.demonstration_labels]


def test_experiment_on_their_tasks(byte_level, tmp_path):
    """The eight of the paper by default; two here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from abft.experiments.experiment import PAPER_TASKS, Experiment, ExperimentOptions

    config = LlamaConfig(
        vocab_size=len(byte_level),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    options = ExperimentOptions(
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        tasks=["TREC", "6"],
        k=2,
        limit=3,
        num_prompts=[8],
        pseudo_batch_size=8,
        num_train_epochs=1,
        staicc_labels=True,
        keep_weights=False,
        quiet=True,
        methods=["vanilla", "abft"],
        tests=["Normal", "TempSensitivity"],
    )
    experiment = Experiment(options)
    assert experiment.data["SUBJ"].task.labels == ("false", "true")
    runs = experiment.run()
    assert [run.key.folder for run in runs] == [
        "vanilla-TREC",
        "vanilla-SUBJ",
        "abft-TREC-n8-seed0",
        "abft-SUBJ-n8-seed0",
    ]
    assert all(run.tests[run.key.task]["Normal"]["n"] == 6 for run in runs)
    assert tuple(Experiment(replace(options, tasks=[], output_dir=str(tmp_path / "all"))).data) == PAPER_TASKS
