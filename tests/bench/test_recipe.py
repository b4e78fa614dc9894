"""Pre-training of the demo model: its language, its options, and the same weights for the same seed."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft.demo import corpus
from abft.demo.run import MODEL
from bench import recipe

SMALL = [
    "--hidden_size",
    "32",
    "--layers",
    "1",
    "--heads",
    "2",
    "--repeat_steps",
    "3",
    "--prompt_steps",
    "3",
    "--batch_size",
    "4",
    "--threads",
    "1",
    "--quiet",
]


def weights(folder, *flags):
    recipe.main(["--output", str(folder), *SMALL, *flags])
    return torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()])


def test_language_of_the_committed_model():
    """Vocabulary and its order, and the first draws of pre-training, are those of the committed weights."""
    packaged = AutoTokenizer.from_pretrained(MODEL)
    assert recipe.build_tokenizer().get_vocab() == packaged.get_vocab()
    task, demonstrations, query = recipe.Recipe().pretraining_prompt(random.Random(0))
    assert len(demonstrations) == 8
    assert all(len(example.text.split()) == 6 for example in (*demonstrations, query))
    assert len(task.labels) == 4


def test_same_seed_same_weights(tmp_path):
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(tmp_path / "third", "--seed", "1"))


def test_momentum_changes_what_is_learned(tmp_path):
    assert not torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "momentum", "--momentum", "0.1"))


def test_a_stage_ends_by_its_loss(tmp_path):
    once = weights(tmp_path / "once", "--prompt_steps", "1", "--repeat_steps", "1")
    by_loss = weights(tmp_path / "by_loss", "--prompt_loss", "100", "--repeat_loss", "100")
    assert torch.equal(once, by_loss)
    assert not torch.equal(once, weights(tmp_path / "all"))


def test_warm_up_begins_at_nothing(tmp_path):
    untrained = weights(tmp_path / "untrained", "--prompt_steps", "0", "--repeat_steps", "0")
    first = ("--prompt_steps", "0", "--repeat_steps", "1")
    assert torch.equal(untrained, weights(tmp_path / "first", *first, "--warmup_steps", "5"))
    assert not torch.equal(untrained, weights(tmp_path / "without", *first))


def test_other_sizes(tmp_path, capsys):
    output = tmp_path / "model"
    recipe.main(
        [
            "--output",
            str(output),
            *SMALL,
            "--classes",
            "8",
            "--demonstrations",
            "12",
            "--shortest_text",
            "3",
            "--longest_text",
            "9",
            "--context",
            "1024",
            "--save_dtype",
            "bfloat16",
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == AutoTokenizer.from_pretrained(output).model_max_length == 1024
    printed = capsys.readouterr().out
    assert all(f"{task.name}: accuracy" in printed for task in corpus.DEMO_TASKS)


def test_lengths_of_texts():
    made = replace(recipe.Recipe(), shortest_text=3, longest_text=9)
    rng = random.Random(0)
    lengths = {len(example.text.split()) - 1 for _ in range(40) for example in made.pretraining_prompt(rng)[1]}
    assert lengths == set(range(3, 10))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "9"], "classes must be 2 to 8"),
        (["--longest_text", "11"], "lengths must rise within 2 to 10"),
        (["--hidden_size", "30"], "must be a multiple of"),
        (["--prompt_steps", "-1"], "prompt_steps must be 0 or more"),
        (["--warmup_steps", "-1"], "warmup_steps must be 0 or more"),
        (["--momentum", "1.5"], "momentum must lie between 0 and 1, got 1.5"),
        (["--device", "tpu"], "--device 'tpu' is not there"),
        (["--save_dtype", "int8"], "--save_dtype must be"),
        (["--threads", "0"], "--threads must be 1 or more"),
    ],
)
def test_bad_options(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        recipe.main(["--output", str(tmp_path / "model"), *SMALL, *flags])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
