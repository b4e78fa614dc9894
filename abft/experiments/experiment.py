"""Experiments: methods × tasks × training sizes × seeds, each trained and tested once, resumed if interrupted.

    runs/abft-SST2-n512-seed0/run.json      results, training history, provenance
    runs/abft-SST2-n512-seed0/weights/      what was trained, with a model card
    experiment.json                         the settings, and which runs there are

`abft.experiments.report` reads these files alone.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abft.demo.corpus import DEMO_TASKS, demo_splits
from abft.demo.run import MODEL as DEMO_MODEL
from abft.evaluation.staicc import TaskData, load_task_data, staicc_task, staicc_task_data
from abft.evaluation.suites import CALIBRATION, TESTS, TaskSuite, check_tests
from abft.experiments.card import write_card
from abft.experiments.grid import changes_of, grid_points, own_options, parse_grid
from abft.experiments.methods import METHODS, Method, rates_of, resolve_methods, unused_options
from abft.experiments.runs import EXPERIMENT, FORMAT_VERSION, Run, RunKey, check_writable, read_experiment, read_run
from abft.files import write_json
from abft.models.loading import (
    computes_bfloat16,
    context_of,
    default_device,
    load_base,
    load_config,
    load_tokenizer,
    loading_arguments,
)
from abft.models.model_options import MODEL_HELP, ModelOptions
from abft.models.weights import from_pretrained
from abft.prompts.builder import Prompt, PromptSet, sample_prompts
from abft.prompts.notes import prompt_notes
from abft.prompts.tasks import get_task
from abft.provenance import peak_memory, provenance, reset_peak_memory
from abft.training.config import ABFTConfig
from abft.training.fit import fit
from abft.training.options import TrainingOptions

__all__ = ["PAPER_TASKS", "Experiment", "ExperimentOptions"]

PAPER_TASKS = ("SST2", "MR", "FP", "SST5", "TREC", "SUBJ", "TEE", "TEH")
"""The eight of arXiv 2505.14233's tables."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class RunOptions(ModelOptions):
    """The runs of an experiment: model, data, methods, tests, and what is kept."""

    model: str = field(metadata=_help(f"base model: {MODEL_HELP}; demo for the built-in one"))
    output_dir: str = field(
        metadata=_help("folder of the runs; what it already holds is kept, and an interrupted run resumes")
    )
    data: str = field(
        default="staicc",
        metadata=_help(
            "staicc (the extra abft[staicc]), demo, or a folder with a TASK.jsonl or TASK.csv for each task"
        ),
    )
    tasks: list[str] = field(default_factory=list, metadata=_help("names or indices; default: the paper's eight"))
    methods: list[str] = field(
        default_factory=lambda: ["paper"], metadata=_help(f"some of {', '.join(METHODS)}; or paper, ablation")
    )
    tests: list[str] = field(
        default_factory=lambda: ["Normal"],
        metadata=_help(f"some of {', '.join(TESTS)}"),
    )
    train_tasks: list[str] = field(default_factory=list, metadata=_help("those of the tasks to train on; default: all"))
    test_trained: bool = field(default=True, metadata=_help("test what was trained"))
    generalization: bool = field(default=False, metadata=_help("test what was trained on one task on all of them"))
    k: int = field(default=4, metadata=_help("demonstrations per prompt"))
    num_prompts: list[int] = field(
        default_factory=lambda: [512], metadata=_help("training prompts; several make a data-efficiency curve")
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata=_help("training seeds"))
    learning_rates: list[str] = field(
        default_factory=list, metadata=_help("rates of single methods in place of --learning_rate, such as e2e=1e-4")
    )
    grid: list[str] = field(
        default_factory=list,
        metadata=_help(
            "training options with several values, such as wrong_penalty=0,0.5 adaption=PID,none: every method that "
            "trains runs once more for each combination"
        ),
    )
    limit: int | None = field(default=None, metadata=_help("queries per test, at most; default: all, as published"))
    published_order: bool = field(
        default=False, metadata=_help("the files hold the data sets as published: bring them into StaICC's order")
    )
    staicc_compat: bool = field(default=False, metadata=_help("reproduce StaICC 0.1.1's own numbers, faults included"))
    staicc_labels: bool = field(default=False, metadata=_help("StaICC 0.1.1's words for SUBJ, false and true"))
    batch_size: int | None = field(default=None, metadata=_help("training prompts at a time; default: all of a step"))
    eval_batch_size: int = field(default=32, metadata=_help("test prompts per pass"))
    load_in_4bit: bool = field(default=False, metadata=_help("the base in 4-bit NF4; with --lora True"))
    dtype: str = field(
        default="auto", metadata=_help("of the base: float32, bfloat16 or float16; auto: the model's own")
    )
    keep_weights: bool = field(default=True, metadata=_help("keep what was trained; else only the results"))
    quiet: bool = field(default=False, metadata=_help("no progress bars"))


@dataclass(kw_only=True)
class ExperimentOptions(TrainingOptions, RunOptions):
    """Methods × tasks × training sizes × seeds: train, test, and report."""


# Results do not depend on these options, or the key of the run holds them.
_NOT_SETTINGS = {
    "output_dir",
    "tasks",
    "train_tasks",
    "test_trained",
    "methods",
    "tests",
    "generalization",
    "num_prompts",
    "seeds",
    "packing",
    "tokens_per_batch",
    "gradient_checkpointing",
    "grid",
    "learning_rates",
    "eval_batch_size",
    "keep_weights",
    "quiet",
}
# With adapters the dtype of the base is another.
_OF_TRAINING = {option.name for option in fields(TrainingOptions)} - {"lora"}
PROTOCOL = 2
"""Raise it when a method or the prompts of a test come to mean something else: earlier runs are then refused."""
# A run that was stored before an option existed was made with its default.
_DEFAULTS = {"protocol": 1, **{option.name: option.default for option in fields(ExperimentOptions)}}


class Experiment:
    """An experiment that is checked when it is made; :meth:`run` does what is missing in its folder.

    Args:
        options: of the experiment.

    Raises:
        ValueError, OSError: an option, a task, its data or the folder cannot be used; nothing has been run or written.
    """

    def __init__(self, options: ExperimentOptions) -> None:
        self.options = options
        _check_one_process()
        self.methods = resolve_methods(options.methods)
        self.rates = rates_of(options.learning_rates)
        _check_numbers(options)
        _check_tests(options, self.methods)
        self.model = str(DEMO_MODEL) if options.model == "demo" else options.model
        loading_arguments(options.dtype, options.load_in_4bit)
        trained = [method for method in self.methods if method.trained]
        grid = parse_grid(options.grid)
        if grid and not trained:
            raise ValueError("a grid needs a method that trains; add abft to --methods")
        if trained and (unused := unused_options(trained, {**asdict(options), **grid})):
            names = ", ".join(method.name for method in trained)
            warnings.warn(f"{', '.join(unused)} without effect: none of {names} heeds it", stacklevel=2)
        own = {method.name: own_options(method, asdict(options)) for method in trained}
        self.points = {
            method.name: ["", *grid_points(grid, own[method.name], method.objective.ignores)] for method in trained
        }
        for method in trained:
            for point in self.points[method.name]:
                self._config(method, Path(options.output_dir), 0, point)
        self.data = {data.task.name: data for data in self._task_data()}
        if len(self.data) < 2 and (wide := [method.name for method in trained if method.other_tasks]):
            raise ValueError(f"{wide[0]} trains on the other tasks; name two tasks or more")
        for data in self.data.values():
            _check_pools(data, options, trains=bool(trained))
        self.suites = self._suites()
        self.keys = self._run_keys()
        for task, n, seed in dict.fromkeys(
            (key.task, key.num_prompts, key.seed) for key in self.keys if key.num_prompts
        ):
            self._drawn(task, n, seed)
        own = {name: value for name, value in asdict(options).items() if name not in _NOT_SETTINGS}
        self.settings = {**own, "protocol": PROTOCOL}
        self.output = check_writable(options.output_dir)
        for key in self.keys:
            self._stored(key)

    def _suites(self) -> dict[str, TaskSuite]:
        """Return the tests of each task, with the prompts of the Normal test made.

        Raises:
            ValueError: labels that the tokenizer cannot tell apart, or prompts beyond the model's context.
        """
        options = self.options
        tokenizer = load_tokenizer(self.model)
        length = context_of(load_config(self.model))
        suites = {
            name: TaskSuite(data, tokenizer, options.k, length, options.limit, options.staicc_compat)
            for name, data in self.data.items()
        }
        for suite in suites.values():
            _ = suite.normal
        return suites

    def _task_data(self) -> list[TaskData]:
        options = self.options
        if options.data == "demo":
            by_name = {task.name: task for task in DEMO_TASKS}
            if unknown := [name for name in options.tasks if name not in by_name]:
                raise ValueError(f"the demo has no task {unknown[0]!r}; it has {', '.join(by_name)}")
            chosen = [by_name[name] for name in options.tasks] or list(DEMO_TASKS)
            splits = [demo_splits(task=task, train=1024, demonstrations=2048, test=512) for task in chosen]
            return [
                TaskData(task, split.train, split.demonstrations, split.test)
                for task, split in zip(chosen, splits, strict=True)
            ]
        names = options.tasks or list(PAPER_TASKS)
        if options.data == "staicc":
            own = staicc_task if options.staicc_compat or options.staicc_labels else get_task
            return [staicc_task_data(own(int(name) if name.isdigit() else name)) for name in names]
        if not Path(options.data).is_dir():
            raise ValueError(f"--data {options.data!r} is neither staicc, nor demo, nor a folder")
        return [load_task_data(name, options.data, shuffle=options.published_order) for name in names]

    def _run_keys(self) -> list[RunKey]:
        """Return the key of every run, the untrained model's first."""
        keys = [RunKey("vanilla", task) for task in self.data] if any(not m.trained for m in self.methods) else []
        return keys + [
            RunKey(method.name, task, n, seed, point)
            for task in self._train_tasks()
            for n in self.options.num_prompts
            for seed in self.options.seeds
            for method in self.methods
            if method.trained
            for point in self.points[method.name]
        ]

    def _train_tasks(self) -> list[str]:
        by_name = {
            str(alias).lower(): data.task.name
            for data in self.data.values()
            for alias in (data.task.name, data.task.index)
        }
        if unknown := [name for name in self.options.train_tasks if name.lower() not in by_name]:
            raise ValueError(f"train_tasks names {unknown[0]!r}, which is none of the tasks {', '.join(self.data)}")
        return [by_name[name.lower()] for name in self.options.train_tasks] or list(self.data)

    def _tests(self, key: RunKey) -> dict[str, list[str]]:
        """Return the tests that the run must have, by task."""
        untrained = not METHODS[key.method].trained
        if not untrained and not self.options.test_trained:
            return {key.task: []}
        calibrated = untrained and any(method.name == "calibration" for method in self.methods)
        own = self.options.tests + ([CALIBRATION] if calibrated else [])
        wanted = {key.task: own}
        if self.options.generalization and not untrained and not METHODS[key.method].other_tasks:
            wanted = {task: own if task == key.task else ["Normal"] for task in self.data}
        return wanted

    def _stored(self, key: RunKey) -> Run | None:
        found = read_run(self.output / "runs" / key.folder)
        if found is None:
            return None
        settings = self._settings_of(key)
        then = {name: found.settings.get(name, _DEFAULTS.get(name)) for name in settings}
        differing = [name for name, value in settings.items() if then[name] != value]
        if differing or found.key != key:
            what = differing[0] if differing else "key"
            raise ValueError(
                f"{self.output / 'runs' / key.folder} was made with {what}={then.get(what, found.key)!r}, now it is "
                f"{settings.get(what, key)!r}; choose another --output_dir"
            )
        sources = self._sources(key)
        if found.training is not None and (then_on := found.training.get("tasks", [key.task])) != sources:
            raise ValueError(
                f"{self.output / 'runs' / key.folder} was trained on {', '.join(then_on)}, now it would be on "
                f"{', '.join(sources)}; choose another --output_dir"
            )
        return found

    def _settings_of(self, key: RunKey) -> dict[str, Any]:
        """Return what the results of the run depend on: those of the untrained model on no training option."""
        method = METHODS[key.method]
        without = method.objective.ignores if method.trained else _OF_TRAINING
        settings = {name: value for name, value in self.settings.items() if name not in without}
        if method.name in self.rates:
            settings["learning_rate"] = self.rates[method.name]
        return settings

    def run(self) -> list[Run]:
        """Train and test what is missing; return the runs in their order."""
        console = Console()
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "tasks": list(self.data),
            "labels": {name: list(data.task.labels) for name, data in self.data.items()},
            "methods": [method.name for method in self.methods],
            "seeds": self.options.seeds,
            "num_prompts": self.options.num_prompts,
            "tests": self.options.tests,
            "runs": [vars(key) for key in self.keys],
        }
        if (self.output / EXPERIMENT).is_file():  # what earlier commands ran in this folder stays part of it
            earlier, _ = read_experiment(self.output)
            for name in ("tasks", "methods", "seeds", "num_prompts", "tests", "runs"):
                content[name] = [*earlier[name], *(item for item in content[name] if item not in earlier[name])]
            content["labels"] = {**earlier["labels"], **content["labels"]}
        write_json(self.output / EXPERIMENT, content)
        for name, data in self.data.items():
            sizes = [len(part) for part in (data.train, data.demonstrations, data.queries)]
            console.print("{}: {:,} to train on, {:,} demonstrations, {:,} queries".format(name, *sizes))
        for note in prompt_notes(suite.builder for suite in self.suites.values()):
            console.print(f"note: {note}", highlight=False)
        runs = []
        for number, key in enumerate(self.keys, 1):
            label = f"[{number}/{len(self.keys)}] {METHODS[key.method].title}, {key.task}"
            label += f", {key.num_prompts} prompts, seed {key.seed}" if key.num_prompts else ""
            label += f", {key.grid}" if key.grid else ""
            run = self._one(key, label)
            accuracy = run.tests.get(key.task, {}).get("Normal", {}).get("accuracy")
            console.print(label + ("" if accuracy is None else f": accuracy {accuracy:.1%}"), highlight=False)
            runs.append(run)
        return runs

    def _one(self, key: RunKey, label: str) -> Run:
        folder = self.output / "runs" / key.folder
        run = self._stored(key) or Run(key, self._settings_of(key))
        wanted = {
            task: missing
            for task, tests in self._tests(key).items()
            if (missing := [test for test in tests if test not in run.tests.get(task, {})])
        }
        trained = METHODS[key.method].trained
        if not wanted and (run.training is not None or not trained):
            return run
        reset_peak_memory()
        if trained and run.training is None:
            model, run.training = self._train(key, folder, label)
            run.provenance = provenance()
            run.write(folder)
        elif trained:
            if not (folder / "weights").is_dir():
                raise ValueError(f"{folder} keeps no weights to test anew; delete the folder to train again")
            model = from_pretrained(folder / "weights", self.model, **self.loading())
        else:
            model = load_base(self.model, dtype=self._dtype(), load_in_4bit=self.options.load_in_4bit)
        if not self.options.load_in_4bit:
            model = model.to(default_device())
        started = time.perf_counter()
        for task, tests in wanted.items():
            found = self.suites[task].run(
                model, tests, batch_size=self.options.eval_batch_size, progress=not self.options.quiet
            )
            run.tests[task] = {**run.tests.get(task, {}), **found}
        run.provenance = {
            **provenance(),
            "evaluation_seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
        }
        run.write(folder)
        if trained and self.options.keep_weights:
            write_card(folder / "weights", run, self.options.model)
        elif trained:
            shutil.rmtree(folder / "weights", ignore_errors=True)
        shutil.rmtree(folder / "training", ignore_errors=True)  # checkpoints, no longer needed
        del model
        gc.collect()
        return run

    def loading(self) -> dict[str, Any]:
        """Return the arguments that load a trained model."""
        return loading_arguments(self._dtype(), self.options.load_in_4bit)

    def _dtype(self) -> str:
        """Return the dtype of the base: full training takes a float16 model in bfloat16, so all tests do."""
        if self.options.dtype == "auto" and not self.options.lora and computes_bfloat16():
            return "bfloat16" if load_config(self.model).dtype == torch.float16 else "auto"
        return self.options.dtype

    def _config(self, method: Method, folder: Path, seed: int, point: str = "") -> ABFTConfig:
        shared = {option.name: getattr(self.options, option.name) for option in fields(TrainingOptions)}
        rate = {"learning_rate": self.rates[method.name]} if method.name in self.rates else {}
        return ABFTConfig(
            output_dir=str(folder),
            seed=seed,
            per_device_train_batch_size=self.options.batch_size,
            save_total_limit=1,
            disable_tqdm=True,
            **{**method.training_options({**shared, **rate}), **changes_of(point)},
        )

    def _training_prompts(self, key: RunKey) -> Sequence[Prompt]:
        """Return the prompts of the run, as many of each of its tasks."""
        sources = self._sources(key)
        if sources == [key.task]:
            return self._drawn(key.task, key.num_prompts, key.seed)
        each, more = divmod(key.num_prompts, len(sources))
        numbers = [each + (index < more) for index in range(len(sources))]
        return [
            prompt
            for name, number in zip(sources, numbers, strict=True)
            for prompt in self._drawn(name, number, key.seed)
        ]

    def _sources(self, key: RunKey) -> list[str]:
        """Return the tasks that the run trains on."""
        other = METHODS[key.method].other_tasks
        return [name for name in self.data if name != key.task] if other else [key.task]

    def _drawn(self, task: str, number: int, seed: int) -> PromptSet:
        train = self.data[task].train
        queries = random.Random(seed).sample(train, number)
        return sample_prompts(self.suites[task].builder, queries, train, self.options.k, seed)

    def _train(self, key: RunKey, folder: Path, label: str) -> tuple[Any, dict[str, Any]]:
        """Return the trained model, its weights saved, and a record of the training."""
        model = load_base(self.model, dtype=self._dtype(), load_in_4bit=self.options.load_in_4bit)
        done = fit(
            model,
            self._config(METHODS[key.method], folder / "training", key.seed, key.grid),
            self._training_prompts(key),
            label=label,
            progress=not self.options.quiet,
            save_to=folder / "weights",
        )
        return done.trainer.model, {
            "seconds": done.seconds,
            "checkpoint_seconds": done.trainer.checkpoint_seconds,
            "trained_parameters": done.trainer.trained_parameters(),
            "resumed": done.checkpoint is not None,
            "steps": done.trainer.state.global_step,
            "tasks": self._sources(key),
            "peak_memory_bytes": peak_memory(),
            "history": done.history,
        }


def _check_one_process() -> None:
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"an experiment runs in one process, here are {processes}; train with `torchrun … abft train` and "
            "compare with `abft eval`, or run one experiment per GPU with other --train_tasks"
        )


def _check_numbers(options: ExperimentOptions) -> None:
    """Raise ValueError for a number out of its range, or a 4-bit base without adapters."""
    if options.load_in_4bit and not options.lora:
        raise ValueError("--load_in_4bit freezes W_Q and W_K: train adapters on them with --lora True")
    for name, values in (("seeds", options.seeds), ("num_prompts", options.num_prompts)):
        if not values or len(set(values)) != len(values) or (name == "num_prompts" and min(values) < 1):
            raise ValueError(f"{name} must be one or more different numbers (of prompts: above 0), got {values}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit must be 1 or more, got {options.limit}")


def _check_tests(options: ExperimentOptions, methods: list[Method]) -> None:
    """Raise ValueError for an unknown test, or one that StaICC's own numbers exclude."""
    check_tests(options.tests)
    if options.staicc_compat and set(options.tests) - {"Normal"}:
        raise ValueError("staicc_compat reproduces StaICC's Normal test alone; give --tests Normal")
    if options.staicc_compat and any(method.name == "calibration" for method in methods):
        raise ValueError("staicc_compat reproduces the uncalibrated test; leave out the method calibration")


def _check_pools(data: TaskData, options: ExperimentOptions, trains: bool) -> None:
    """Raise ValueError if the task has too few examples for the training prompts or the demonstrations."""
    if trains and max(options.num_prompts) > len(data.train):
        raise ValueError(
            f"num_prompts={max(options.num_prompts)}, but task {data.task.name} has {len(data.train)} examples "
            "to train on; lower it"
        )
    if not 0 <= options.k <= min(len(data.demonstrations), len(data.train) - 1):
        raise ValueError(
            f"k={options.k} is beyond the pools of task {data.task.name}: {len(data.train)} examples to train "
            f"on and {len(data.demonstrations)} demonstrations; lower k"
        )
