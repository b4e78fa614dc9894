"""The command line: `abft COMMAND`, see `_USAGE`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from abft.cli.arguments import parse

# Everything heavy is imported in the commands, so that `abft --version` and usage errors answer at once.

_USAGE = """usage: abft COMMAND [OPTIONS]

  doctor      what is installed, and which attention-mass backends work here
  train       train W_Q and W_K of a model with ABFT, or its E2E baseline, on labelled texts
  eval        in-context accuracy, macro-F1, likelihood, ECE and induction heads, before and after training
  experiment  methods × tasks × seeds of the paper's evaluation, trained, tested and reported
  analyze     what training changed inside: attention, weights, mode connectivity, implicit fine-tuning
  report      experiments as one HTML file, and their tables as Markdown and LaTeX
  compare     two runs on the same prompts
  heads       induction heads of a model on repeated text, and retrieval heads on a needle, at any length
  prototype   the options of the method's published code, unchanged
  plan        memory by part, what fits, the longest context and a launch line, from a model's configuration alone
  merge       write the base with what was trained merged into it, as a model folder of its own
  demo        train and evaluate the built-in model; no download, no GPU

  abft COMMAND --help    options of a command
  abft --version"""


@dataclass(kw_only=True)
class PromptOptions:
    """The model, and how its prompts are made."""

    model: str = field(metadata={"help": "base model: a local folder or a name on the Hugging Face Hub"})
    task: str | None = field(default=None, metadata={"help": "built-in template and label words, such as SST2 or 0"})
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "label words in class order; default: the task's, else those in the file, sorted"},
    )
    text_prefix: str | None = field(
        default=None, metadata={"help": "before each text; default: the task's or 'sentence:'"}
    )
    label_prefix: str | None = field(
        default=None, metadata={"help": "before each label; default: the task's or 'sentiment:'"}
    )
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    k: int = field(default=4, metadata={"help": "demonstrations per prompt"})
    prompt_seed: int = field(default=0, metadata={"help": "seed of the draw of demonstrations"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "float32, bfloat16 or float16; auto: the model's own, but float32 to train W_Q and W_K in full"
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "the base in 4-bit NF4, double quantisation (bitsandbytes); needs --lora True"}
    )


@dataclass(kw_only=True)
class TrainOptions(PromptOptions):
    """What to train on."""

    train_file: str = field(metadata={"help": "JSONL or CSV of labelled texts"})
    demonstration_file: str | None = field(
        default=None, metadata={"help": "texts to draw demonstrations from; default: the rest of train_file"}
    )
    num_prompts: int = field(default=512, metadata={"help": "training prompts, each with a query of its own"})


@dataclass(kw_only=True)
class EvalOptions(PromptOptions):
    """What to evaluate."""

    test_file: str = field(metadata={"help": "JSONL or CSV of labelled texts: the queries"})
    demonstration_file: str = field(metadata={"help": "JSONL or CSV of texts to draw demonstrations from"})
    trained: list[str] = field(default_factory=list, metadata={"help": "folders that `abft train` wrote, to compare"})
    num_prompts: int | None = field(default=None, metadata={"help": "queries to use; default: all"})
    batch_size: int = field(default=32, metadata={"help": "prompts per forward pass"})
    output: str = field(default="eval.json", metadata={"help": "JSON to write, with a picture of the heads beside it"})
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})


@dataclass(kw_only=True)
class PlanOptions:
    """What is to run, and on what."""

    model: str = field(metadata={"help": "model folder, its config.json, or a name on the Hugging Face Hub"})
    context: int = field(default=2048, metadata={"help": "tokens of one pass: of a prompt, or of packed prompts"})
    mode: str = field(default="full", metadata={"help": "full or restricted gradients, e2e, or inference (evaluation)"})
    precision: str = field(default="bfloat16", metadata={"help": "of the base: float32, bfloat16, float16 or nf4"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters; always with nf4"})
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute each layer in the backward pass"})
    gpus: int = field(default=1, metadata={"help": "GPUs"})
    gpu_memory: float = field(default=80.0, metadata={"help": "GiB of each GPU"})


@dataclass(kw_only=True)
class MergeOptions:
    """What is merged into what."""

    model: str = field(metadata={"help": "base model: a local folder or a name on the Hugging Face Hub"})
    trained: str = field(metadata={"help": "folder that `abft train` wrote"})
    output_dir: str = field(metadata={"help": "folder to write; must not exist"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or float16; auto: the model's own"})


@dataclass
class DemoOptions:
    """The built-in model: vanilla against ABFT and E2E."""

    output: str = field(default="demo_run", metadata={"help": "folder of the results; what it already holds is kept"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "training seeds"})
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})


def _task(options: PromptOptions, labels: Sequence[str] | None = None) -> Any:
    """The task of the options; `labels` are those found in a file."""
    from abft.prompts.tasks import Task, Template, get_task

    if options.task is not None:
        task = get_task(int(options.task) if options.task.isdigit() else options.task)
    else:
        task = Task("custom", tuple(options.labels or labels or ()), Template())
    changes = {name: value for name in ("text_prefix", "label_prefix") if (value := getattr(options, name)) is not None}
    template = dataclasses.replace(task.template, **changes)
    return dataclasses.replace(task, template=template, labels=tuple(options.labels or task.labels))


def _known_labels(options: PromptOptions) -> Sequence[str] | None:
    if options.labels is not None or options.task is not None:
        return _task(options).labels
    return None


def _builder(model: Any, tokenizer: Any, task: Any) -> Any:
    from abft.models.loading import context_of
    from abft.prompts.builder import PromptBuilder

    return PromptBuilder(tokenizer, task, max_length=context_of(model.config))


def _load(path: str, options: PromptOptions, labels: Sequence[str] | None) -> tuple[list[Any], tuple[str, ...]]:
    from abft.prompts.examples import load_examples

    return load_examples(path, labels, text_column=options.text_column, label_column=options.label_column)


def _doctor(arguments: Sequence[str]) -> int:
    from abft.cli.doctor import doctor

    _parse_nothing("doctor", arguments)
    return doctor()


def _parse_nothing(command: str, arguments: Sequence[str]) -> None:
    import argparse

    argparse.ArgumentParser(prog=f"abft {command}").parse_args(list(arguments))


def _train(arguments: Sequence[str]) -> int:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from abft.files import save_figure, write_json
    from abft.models.loading import load_base, load_tokenizer
    from abft.models.weights import is_trained_folder
    from abft.plots import training_figure
    from abft.prompts.builder import sample_prompts
    from abft.prompts.examples import split_examples
    from abft.training.config import ABFTConfig
    from abft.training.progress import TrainingProgress
    from abft.training.trainer import ABFTTrainer, last_complete_checkpoint

    options, config = parse("train", arguments, TrainOptions, ABFTConfig)
    console = Console()
    if config.output_dir is None:
        raise ValueError("--output_dir is missing: give the folder to write")
    if options.load_in_4bit and not config.lora:
        raise ValueError("--load_in_4bit freezes W_Q and W_K: train adapters on them with --lora True")
    if is_trained_folder(config.output_dir):
        raise ValueError(
            f"output_dir {config.output_dir!r} already holds a finished run; choose another, or delete it to train anew"
        )
    labels = _known_labels(options)
    examples, labels = _load(options.train_file, options, labels)
    if options.demonstration_file is not None:
        pool, _ = _load(options.demonstration_file, options, labels)
        sizes = {"queries": options.num_prompts}
    else:
        pool = []
        sizes = {"queries": options.num_prompts, "pool": len(examples) - options.num_prompts}
        if sizes["pool"] < options.k + 1:
            raise ValueError(
                f"{options.train_file} has {len(examples)} examples: {options.num_prompts} queries leave "
                f"{max(0, sizes['pool'])} for {options.k} demonstrations; lower --num_prompts, or give "
                "--demonstration_file"
            )
    parts = split_examples(examples, sizes, seed=options.prompt_seed)
    pool = pool or parts["pool"]
    checkpoint = last_complete_checkpoint(config.output_dir)
    if options.dtype == "auto" and not config.lora:
        options.dtype = "float32"  # bfloat16 would round most of the updates away

    split = {"tp_plan": "auto"} if config.tensor_parallel_size > 1 else {}
    model = load_base(options.model, dtype=options.dtype, load_in_4bit=options.load_in_4bit, **split)
    tokenizer = load_tokenizer(options.model)
    builder = _builder(model, tokenizer, _task(options, labels))
    prompts = sample_prompts(builder, parts["queries"], pool, options.k, options.prompt_seed)
    progress = TrainingProgress(config.method.upper(), enabled=not config.disable_tqdm)
    trainer = ABFTTrainer(model, config, prompts, builder, callbacks=[progress])
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)

    output = Path(config.output_dir)
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        write_json(output / "training.json", {**_provenance(options), "history": history})
        save_figure(training_figure(history), output / "training.png")
    trainer.save_model()
    losses = [entry["loss"] for entry in history if "loss" in entry]
    console.print(
        f"{config.method.upper()}: {len(losses)} steps over {len(prompts)} prompts, "
        f"loss {losses[0]:.4g} → {losses[-1]:.4g}; weights and training.png in {output}"
    )
    return 0


def _eval(arguments: Sequence[str]) -> int:
    from abft.evaluation.classification import evaluate
    from abft.evaluation.label_attention import head_statistics
    from abft.files import save_figure, write_json
    from abft.models.loading import default_device, load_base, load_tokenizer, loading_arguments
    from abft.models.weights import from_pretrained, is_trained_folder
    from abft.plots import head_figure, metrics_table
    from abft.prompts.builder import sample_prompts

    (options,) = parse("eval", arguments, EvalOptions)
    for folder in options.trained:
        if not is_trained_folder(folder):
            raise ValueError(f"--trained {folder!r} holds no trained weights; give a folder that `abft train` finished")
    pool, labels = _load(options.demonstration_file, options, _known_labels(options))
    queries, _ = _load(options.test_file, options, labels)
    queries = queries[: options.num_prompts]
    loading = {"dtype": options.dtype, "load_in_4bit": options.load_in_4bit}
    model, tokenizer = load_base(options.model, **loading), load_tokenizer(options.model)
    builder = _builder(model, tokenizer, _task(options, labels))
    prompts = sample_prompts(builder, queries, pool, options.k, options.prompt_seed)

    shared = {"batch_size": options.batch_size, "progress": not options.quiet}
    runs: dict[str, dict[str, Any]] = {}
    statistics = {}
    for name in ["vanilla", *options.trained]:
        if name != "vanilla":
            model = from_pretrained(name, options.model, **loading_arguments(**loading))
        if not options.load_in_4bit:  # which is where it belongs already
            model.to(default_device())
        metrics = evaluate(model, prompts, builder, **shared).to_dict()
        statistics[name] = head_statistics(model, prompts, builder, **shared)
        runs[name] = {**metrics, **statistics[name].to_dict()}
    write_json(options.output, {**_provenance(options), "runs": runs})
    console = Console()
    console.print(metrics_table(runs, f"{len(prompts)} prompts, k = {options.k}"))
    for name in options.trained:
        picture = Path(options.output).with_suffix("").as_posix() + f"-{Path(name).name}.png"
        save_figure(head_figure(statistics["vanilla"], statistics[name], ("vanilla", Path(name).name)), picture)
    console.print(f"written: {options.output}")
    return 0


def _plan(arguments: Sequence[str]) -> int:
    from abft.training.plan import plan

    (options,) = parse("plan", arguments, PlanOptions)
    result = plan(**dataclasses.asdict(options))
    Console(width=110).print(*result.tables(), sep="\n")
    return 0 if result.fits else 1


def _merge(arguments: Sequence[str]) -> int:
    from abft.models.weights import merge

    (options,) = parse("merge", arguments, MergeOptions)
    merge(options.model, options.trained, options.output_dir, dtype=options.dtype)
    Console().print(f"{options.model} with {options.trained} merged into it: {options.output_dir}")
    return 0


def _provenance(options: Any) -> dict[str, Any]:
    from abft.provenance import provenance

    return {**provenance(), "options": dataclasses.asdict(options)}


def _demo(arguments: Sequence[str]) -> int:
    from transformers.utils.logging import disable_progress_bar

    from abft.demo.run import run_demo

    (options,) = parse("demo", arguments, DemoOptions)
    disable_progress_bar()  # a bar for each time the small model is read from disk
    return run_demo(Path(options.output), options.seeds, progress=not options.quiet)


def _benchmark(command: str) -> Callable[[Sequence[str]], int]:
    def run(arguments: Sequence[str]) -> int:
        from abft.cli import experiments

        return experiments.COMMANDS[command](arguments)

    return run


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": _doctor,
    "train": _train,
    "eval": _eval,
    **{name: _benchmark(name) for name in ("experiment", "analyze", "report", "compare", "heads", "prototype")},
    "plan": _plan,
    "merge": _merge,
    "demo": _demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a failed check, 2 for bad input, 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"abft {metadata.version('abft')}")
        return 0
    command = _COMMANDS.get(arguments[0])
    if command is None:
        print(f"abft: no command {arguments[0]!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        return command(arguments[1:])
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"abft {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch is not imported for the commands that need none
            raise
        print(f"abft {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"abft {arguments[0]}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
