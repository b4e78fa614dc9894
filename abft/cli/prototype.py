"""`abft prototype`: the options of the method's published code, so that its users can paste their command.

Each maps to an option of `abft experiment`; docs/evaluation.md has the table. `--data`, `--output_dir`, `--limit`,
`--mauve_feature_model` and `--quiet` are this package's own.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from abft.evaluation.mauve import check_mauve, continuations, mauve_score
from abft.experiments.experiment import PAPER_TASKS, Experiment, ExperimentOptions
from abft.experiments.report import overview_table, write_report
from abft.experiments.results import Results
from abft.experiments.runs import RunKey
from abft.files import write_json
from abft.losses import Adaption
from abft.models.loading import default_device, load_base, load_tokenizer
from abft.models.weights import from_pretrained
from abft.prompts.tasks import TASKS, get_task
from abft.training.options import TrainingOptions

__all__ = ["prototype"]

_TRAINING = {option.name: option for option in fields(TrainingOptions)}
# Training option -> the published code's name for it; options without one keep their own name.
_PUBLISHED = {
    "correct_award": "--correct_label_award",
    "wrong_penalty": "--wrong_label_penalty",
    "learning_rate": "--lr",
    "pseudo_batch_size": "--pseudo_batch_size",
    "num_train_epochs": "--epoch",
    "restricted_gradient": "--restricted_gradient",
    "pid_proportional": "--PID_param_P",
    "pid_integral": "--PID_param_I",
    "pid_derivative": "--PID_param_D",
    "lora_r": "--lora_r",
}
_MAPPED = ("lora", "adaption")  # --quantized, and --self_adaption_loss with other words
_ADAPTIONS = {"None" if adaption == "none" else adaption: adaption for adaption in get_args(Adaption)}
_METHODS = {"ABFT": "abft", "E2E": "e2e"}

_TEXTS = 256
_PREFIX = "The"


def _switch(value: str) -> bool:
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {value!r}")


def _add_training_option(parser: Any, flag: str, name: str) -> None:
    """Add a training option under a flag, with the default, the help and the choices of its field."""
    hint = get_type_hints(TrainingOptions)[name]
    shared = {"dest": name, "default": _TRAINING[name].default, "help": _TRAINING[name].metadata["help"]}
    if bool in (hint, *get_args(hint)):
        parser.add_argument(flag, nargs="?", const=True, type=_switch, **shared)
    elif get_origin(hint) is Literal:
        parser.add_argument(flag, choices=get_args(hint), **shared)
    else:  # a type, a type and None, or words too, which the configuration reads
        kinds = get_args(hint) or (hint,)
        parser.add_argument(flag, type=str if str in kinds else kinds[0], **shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abft prototype", description="Train with ABFT or E2E on one of StaICC's tasks, tested before and after."
    )
    add = parser.add_argument

    def switch(name: str, text: str) -> None:
        add(name, nargs="?", const=True, default=False, type=_switch, help=text)

    add("--ICL_model_name", required=True, help="base model: a local folder or a name on the Hugging Face Hub")
    add("--ICL_dataset_index", type=int, default=0, help="StaICC's number of the task to train on")
    add("--method", choices=tuple(_METHODS), default="ABFT")
    add("--ICL_k", type=int, default=4, help="demonstrations per prompt")
    switch("--quantized", "4-bit base, LoRA adapters")
    add("--train_sample_num", type=int, default=512, help="training prompts")
    add("--random_seed", type=int, default=0)
    switch("--no_fore_test", "no test before training")
    switch("--no_post_test", "no test after training")
    add("--test_type", choices=("Normal", "TempSensitivity", "DemoSensitivity"), default="Normal")
    switch("--generalization_test", "test on all tasks, not only the trained one")
    switch("--dont_save_model", "keep the results only")
    add("--self_adaption_loss", choices=tuple(_ADAPTIONS), default=_TRAINING["adaption"].default, help="what steers A")
    proportional = _TRAINING["pid_proportional"].default
    add("--loss_adaption_factor_for_P", type=float, default=proportional, help="Cp, with P")
    switch("--MAUVE_test", "compare what the model writes before and after")
    add("--MAUVE_prefix", default=_PREFIX, help="what the texts begin with, or a file with one such prefix a line")
    own = parser.add_argument_group("options of this package")
    for name in _TRAINING:
        if name not in _MAPPED:
            published = _PUBLISHED.get(name)
            _add_training_option(parser if published else own, published or f"--{name}", name)
    own.add_argument("--data", default="staicc", help="staicc, or a folder with a TASK.jsonl or TASK.csv")
    own.add_argument("--output_dir", default=None, help="default: runs/MODEL-INDEX-METHOD-seedS")
    own.add_argument("--limit", type=int, default=None, help="queries per test, at most")
    own.add_argument(
        "--mauve_feature_model", default=None, help="whose hidden states stand for texts; default: the base"
    )
    own.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _tasks(options: argparse.Namespace, own: str) -> list[str]:
    """Return the task trained on, and with --generalization_test the others that there are data for."""
    if not options.generalization_test:
        return [own]
    others: Sequence[str] = PAPER_TASKS
    if options.data != "staicc":
        here = {path.stem for path in Path(options.data).iterdir() if path.suffix in (".jsonl", ".ndjson", ".csv")}
        others = [task.name for task in TASKS if task.name in here]
    return [own, *(name for name in others if name != own)]


def _experiment_options(options: argparse.Namespace) -> ExperimentOptions:
    task = get_task(options.ICL_dataset_index).name
    if options.data != "staicc" and not Path(options.data).is_dir():
        raise ValueError(f"--data {options.data!r} is neither staicc nor a folder")
    training = {name: getattr(options, name) for name in _TRAINING if name not in _MAPPED}
    training |= {"lora": options.quantized, "adaption": _ADAPTIONS[options.self_adaption_loss]}
    if training["adaption"] == "P":
        training["pid_proportional"] = options.loss_adaption_factor_for_P
    name = f"{Path(options.ICL_model_name).name}-{options.ICL_dataset_index}-{options.method}-seed{options.random_seed}"
    # Without a test before training the method is the only row.
    methods = ([] if options.no_fore_test else ["vanilla"]) + [_METHODS[options.method]]
    return ExperimentOptions(
        model=options.ICL_model_name,
        output_dir=options.output_dir or str(Path("runs") / name),
        data=options.data,
        tasks=_tasks(options, task),
        train_tasks=[task],
        methods=methods,
        tests=[options.test_type],
        test_trained=not options.no_post_test,
        generalization=options.generalization_test,
        k=options.ICL_k,
        num_prompts=[options.train_sample_num],
        seeds=[options.random_seed],
        limit=options.limit,
        load_in_4bit=options.quantized,
        keep_weights=options.MAUVE_test or not options.dont_save_model,
        quiet=options.quiet,
        **training,
    )


def prototype(arguments: Sequence[str]) -> int:
    """Run the command; return 0."""
    options = _parser().parse_args(list(arguments))
    disable_progress_bar()
    prefixes = _prefixes(options.MAUVE_prefix)
    if options.MAUVE_test:
        check_mauve()
    experiment = Experiment(_experiment_options(options))
    experiment.run()
    results = Results(experiment.output)
    console = Console()
    console.print(overview_table([results]).rich())
    if options.MAUVE_test:
        score = _mauve(options, experiment, prefixes)
        console.print(f"MAUVE of {_TEXTS} texts before and after training: {score:.3f} (1: cannot be told apart)")
    if options.dont_save_model:
        for key in experiment.keys:
            shutil.rmtree(experiment.output / "runs" / key.folder / "weights", ignore_errors=True)
    files = write_report([experiment.output], experiment.output / "report.html")
    console.print(f"written: {', '.join(map(str, files))}", highlight=False)
    return 0


def _prefixes(argument: str) -> list[str]:
    path = Path(argument)
    if not path.is_file():
        return [argument]
    prefixes = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prefixes:
        raise ValueError(f"--MAUVE_prefix {argument} is an empty file; give one prefix a line, or the prefix itself")
    return prefixes


def _mauve(options: argparse.Namespace, experiment: Experiment, prefixes: list[str]) -> float:
    """Return the MAUVE score, measured once and kept in `mauve.json`."""
    path = experiment.output / "mauve.json"
    features = options.mauve_feature_model or experiment.model
    asked = {"prefixes": prefixes, "feature_model": features, "texts": _TEXTS}
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        return found["mauve"]
    key = next(key for key in experiment.keys if key.num_prompts)
    tokenizer = load_tokenizer(experiment.model)
    texts = [
        continuations(model.to(default_device()), tokenizer, prefixes, n=_TEXTS, seed=seed, progress=not options.quiet)
        for seed, model in enumerate(_before_and_after(options, experiment, key))
    ]
    score = mauve_score(texts[0], texts[1], features, progress=not options.quiet)
    write_json(path, {"asked": asked, "mauve": score, "before": texts[0], "after": texts[1]})
    return score


def _before_and_after(options: argparse.Namespace, experiment: Experiment, key: RunKey) -> Any:
    weights = experiment.output / "runs" / key.folder / "weights"
    if not weights.is_dir():
        raise ValueError(
            f"{weights} is gone, so the trained model cannot write; delete {weights.parent} to train again"
        )
    yield load_base(experiment.model, dtype="auto", load_in_4bit=options.quantized)
    yield from_pretrained(weights, experiment.model, **experiment.loading())
