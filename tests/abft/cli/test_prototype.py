"""Each option of the published code reaches its counterpart, and a command runs whole on a local model."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from abft.cli.main import main
from abft.cli.prototype import _experiment_options, _parser
from abft.demo.run import MODEL
from abft.evaluation.mauve import continuations, mauve_score
from abft.experiments.runs import read_run
from abft.models.loading import load_base
from abft.training.options import TrainingOptions

DOCUMENT = Path(__file__).parents[3] / "docs" / "evaluation.md"
PUBLISHED = [
    "--ICL_model_name", "--ICL_dataset_index", "--method", "--ICL_k", "--quantized", "--correct_label_award",
    "--wrong_label_penalty", "--train_sample_num", "--lr", "--pseudo_batch_size", "--epoch", "--random_seed",
    "--no_fore_test", "--no_post_test", "--test_type", "--generalization_test", "--dont_save_model",
    "--restricted_gradient", "--self_adaption_loss", "--loss_adaption_factor_for_P", "--PID_param_P", "--PID_param_I",
    "--PID_param_D", "--lora_r", "--MAUVE_test", "--MAUVE_prefix",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two of StaICC's tasks as files, in words of the demo model, and a model whose label words are theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("prototype")
    for name in ("SST2", "MR"):
        rows = [{"text": f"w{i % 7} w{i % 11} w{i % 13}", "label": ("negative", "positive")[i % 2]} for i in range(160)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [":", "sentence", "review", "sentiment", "text", "label", "Label", "negative", "positive", "input",
             *(f"w{i}" for i in range(13)), "<pad>", "<unk>"]  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,  # the block of 4-bit weights, which bitsandbytes repacks for CPUs with AVX-512
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    return folder


def options_of(folder, *flags):
    arguments = ["--ICL_model_name", str(folder / "model"), "--data", str(folder), *flags]
    return _experiment_options(_parser().parse_args(arguments))


def test_defaults_are_the_papers(folder):
    options = options_of(folder)
    assert (options.methods, options.tasks, options.tests) == (["vanilla", "abft"], ["SST2"], ["Normal"])
    assert (options.k, options.num_prompts, options.pseudo_batch_size, options.num_train_epochs) == (4, [512], 32, 2)
    assert (options.wrong_penalty, options.correct_award, options.adaption) == (0.5, 1.0, "PID")
    assert (options.pid_proportional, options.pid_integral, options.pid_derivative) == (0.03, 0.005, 0.005)
    assert (options.learning_rate, options.lora, options.lora_r, options.load_in_4bit) == (None, False, 16, False)
    assert not options.restricted_gradient
    assert not options.generalization
    assert options.test_trained
    assert options.keep_weights


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--ICL_dataset_index", "1"], "train_tasks", ["MR"]),
        (["--method", "E2E"], "methods", ["vanilla", "e2e"]),
        (["--ICL_k", "8"], "k", 8),
        (["--quantized"], "load_in_4bit", True),
        (["--quantized", "True"], "lora", True),
        (["--quantized", "False"], "lora", False),
        (["--correct_label_award", "2"], "correct_award", 2.0),
        (["--wrong_label_penalty", "0.1"], "wrong_penalty", 0.1),
        (["--train_sample_num", "64"], "num_prompts", [64]),
        (["--lr", "1e-4"], "learning_rate", 1e-4),
        (["--pseudo_batch_size", "12"], "pseudo_batch_size", 12),
        (["--epoch", "3"], "num_train_epochs", 3),
        (["--random_seed", "42"], "seeds", [42]),
        (["--no_fore_test"], "methods", ["abft"]),
        (["--no_post_test"], "test_trained", False),
        (["--test_type", "DemoSensitivity"], "tests", ["DemoSensitivity"]),
        (["--generalization_test"], "tasks", ["SST2", "MR"]),
        (["--generalization_test"], "train_tasks", ["SST2"]),
        (["--dont_save_model"], "keep_weights", False),
        (["--restricted_gradient"], "restricted_gradient", True),
        (["--self_adaption_loss", "None"], "adaption", "none"),
        (["--self_adaption_loss", "P", "--loss_adaption_factor_for_P", "0.2"], "pid_proportional", 0.2),
        (["--loss_adaption_factor_for_P", "0.2"], "pid_proportional", 0.03),
        (["--PID_param_P", "0.1"], "pid_proportional", 0.1),
        (["--PID_param_I", "0.1"], "pid_integral", 0.1),
        (["--PID_param_D", "0.1"], "pid_derivative", 0.1),
        (["--lora_r", "4"], "lora_r", 4),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_each_option(folder, flags, field, value):
    assert getattr(options_of(folder, *flags), field) == value


def test_training_options_come_from_one_place(folder):
    """Every training option is offered, under its published name or its own, with its default."""
    options = options_of(folder)
    assert {o.name: getattr(options, o.name) for o in fields(TrainingOptions)} == asdict(TrainingOptions())
    known = {action.dest: action for action in _parser()._actions}
    for option in fields(TrainingOptions):
        if option.name not in ("lora", "adaption"):
            assert known[option.name].help == option.metadata["help"]
    assert options_of(folder, "--per_head_mean").per_head_mean  # no published name
    assert known["method"].choices == ("ABFT", "E2E")


def test_every_published_option_exists_and_is_documented():
    known = {string for action in _parser()._actions for string in action.option_strings}
    assert set(PUBLISHED) <= known
    table = DOCUMENT.read_text(encoding="utf-8")
    assert all(re.search(rf"`{option}`", table) for option in PUBLISHED)


def test_a_published_command(folder, tmp_path, capsys):
    """Every option at once, but for those that exclude others."""
    output = tmp_path / "run"
    command = f"""--ICL_model_name {folder / "model"} --ICL_dataset_index 0 --method ABFT --ICL_k 2
        --correct_label_award 1 --wrong_label_penalty 0.5 --train_sample_num 16 --lr 1e-3 --pseudo_batch_size 8
        --epoch 1 --random_seed 3 --test_type Normal --generalization_test --self_adaption_loss PID --PID_param_P 0.03
        --PID_param_I 0.005 --PID_param_D 0.005 --lora_r 16 --restricted_gradient True --dont_save_model True
        --MAUVE_test True --MAUVE_prefix sentence --data {folder} --output_dir {output} --limit 10 --quiet""".split()
    assert main(["prototype", *command]) == 0
    printed = capsys.readouterr().out
    assert "MAUVE of 256 texts before and after training:" in printed
    run = read_run(output / "runs" / "abft-SST2-n16-seed3")
    assert run.training["steps"] == 2
    assert set(run.tests) == {"SST2", "MR"}
    assert run.tests["SST2"]["Normal"]["n"] == 20
    assert 0 < json.loads((output / "mauve.json").read_text())["mauve"] <= 1
    assert not list(output.rglob("weights"))
    assert (output / "report.html").is_file()
    # The same command again trains nothing, writes no texts, and says the same.
    assert main(["prototype", *command]) == 0
    assert capsys.readouterr().out == printed


def test_sensitivity_and_quantized(folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "run"
    command = f"""--ICL_model_name {folder / "model"} --method E2E --ICL_k 2 --quantized --lora_r 2 --train_sample_num 8
        --pseudo_batch_size 8 --epoch 1 --test_type TempSensitivity --data {folder} --output_dir {output} --limit 4
        --quiet""".split()
    assert main(["prototype", *command]) == 0
    run = read_run(output / "runs" / "e2e-SST2-n8-seed0")
    assert 0.5 <= run.tests["SST2"]["TempSensitivity"]["consistency"] <= 1
    weights = output / "runs" / "e2e-SST2-n8-seed0" / "weights"
    assert json.loads((weights / "adapter_config.json").read_text())["r"] == 2


def test_untested(folder, tmp_path):
    command = f"""--ICL_model_name {folder / "model"} --ICL_k 2 --train_sample_num 8 --pseudo_batch_size 8 --epoch 1
        --no_fore_test --no_post_test --data {folder} --output_dir {tmp_path / "run"} --quiet""".split()
    assert main(["prototype", *command]) == 0
    run = read_run(tmp_path / "run" / "runs" / "abft-SST2-n8-seed0")
    assert run.tests == {}
    assert run.training["steps"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ICL_dataset_index", "12"], "unknown task 12"),
        (["--ICL_dataset_index", "4"], "no data for task 'TREC'"),
        (["--ICL_k", "500"], "k=500 is beyond the pools"),
        (["--train_sample_num", "5000"], "num_prompts=5000"),
        (["--MAUVE_prefix", "EMPTY"], "is an empty file"),
        (["--data", "nowhere"], "neither staicc nor a folder"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, flags, message):
    (tmp_path / "empty").write_text("\n")
    flags = [str(tmp_path / "empty") if flag == "EMPTY" else flag for flag in flags]
    command = ["prototype", "--ICL_model_name", str(folder / "model"), "--data", str(folder), "--output_dir",
               str(tmp_path / "run"), "--train_sample_num", "8", *flags]  # fmt: skip
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mauve_tells_texts_apart(demo_tokenizer, demo_model):
    pytest.importorskip("mauve")
    texts = continuations(demo_model, demo_tokenizer, ["text :", "note"], n=64, new_tokens=12, progress=False)
    assert len(texts) == 64
    assert texts[0].startswith("text :")
    assert texts[1].startswith("note")
    again = continuations(demo_model, demo_tokenizer, ["text :", "note"], n=64, new_tokens=12, progress=False)
    assert texts == again
    others = continuations(demo_model, demo_tokenizer, ["text :", "note"], n=64, new_tokens=12, seed=1, progress=False)
    like = mauve_score(texts, others, str(MODEL), progress=False)
    apart = mauve_score(texts, ["music music music"] * 64, str(MODEL), progress=False)
    assert like > 0.5 > apart
    with pytest.raises(ValueError, match="64 and 3 texts"):
        mauve_score(texts, texts[:3], str(MODEL))
    with pytest.raises(ValueError, match="prefixes must be"):
        continuations(demo_model, demo_tokenizer, [])


def test_heads_command(tmp_path, capsys):
    (tmp_path / "hay.txt").write_text("guitar melody singer piano drum " * 4)
    output = tmp_path / "heads.json"
    command = ["heads", "--model", str(MODEL), "--tokens", "96", "--samples", "1", "--output", str(output), "--quiet"]
    asked = ["--haystack", str(tmp_path / "hay.txt"), "--needle", "planet rocket", "--question", "rocket"]
    assert main([*command, *asked]) == 0
    content = json.loads(output.read_text())
    assert {"induction", "retrieval", "versions"} <= set(content)
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "induction heads, layer.head (mass): 1." in capsys.readouterr().out
    assert main([*command, "--needle", "planet"]) == 2
    assert "all three" in capsys.readouterr().err
    assert main(["heads", "--model", str(MODEL), "--tokens", "99999"]) == 2
    assert load_base(str(MODEL)).config.max_position_embeddings < 99999
