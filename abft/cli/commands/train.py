"""`abft train`: train W_Q and W_K of a model on labelled texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft.cli.command import Command, sourced
from abft.cli.prompt_options import PromptOptions

if TYPE_CHECKING:
    from abft.prompts.examples import Example
    from abft.training.config import ABFTConfig

__all__ = ["COMMAND", "TrainOptions"]


@dataclass(kw_only=True)
class TrainOptions(PromptOptions):
    """Train on labelled texts."""

    train_file: str = field(metadata={"help": "JSONL or CSV of labelled texts"})
    demonstration_file: str | None = field(
        default=None, metadata={"help": "texts to draw demonstrations from; default: the rest of train_file"}
    )
    num_prompts: int = field(default=512, metadata={"help": "training prompts, each with a query of its own"})


def _options() -> tuple[Any, ...]:
    from abft.training.config import ABFTConfig

    return TrainOptions, ABFTConfig


def _check(options: TrainOptions, config: ABFTConfig) -> None:
    from abft.models.weights import is_trained_folder

    if config.output_dir is None:
        raise ValueError("--output_dir is missing: give the folder to write")
    if options.load_in_4bit and not config.lora:
        raise ValueError("--load_in_4bit freezes W_Q and W_K: train adapters on them with --lora True")
    if is_trained_folder(config.output_dir):
        raise ValueError(
            f"output_dir {config.output_dir!r} already holds a finished run; choose another, or delete it to train anew"
        )


def _examples(options: TrainOptions) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """Return the queries, the pool of demonstrations and the label words."""
    from abft.prompts.examples import split_examples

    examples, labels = options.load(options.train_file, options.known_labels())
    sizes = {"queries": options.num_prompts}
    if options.demonstration_file is not None:
        pool, _ = options.load(options.demonstration_file, labels)
        return split_examples(examples, sizes, seed=options.prompt_seed)["queries"], pool, labels
    sizes["pool"] = len(examples) - options.num_prompts
    if sizes["pool"] < options.k + 1:
        raise ValueError(
            f"{options.train_file} has {len(examples)} examples: {options.num_prompts} queries leave "
            f"{max(0, sizes['pool'])} for {options.k} demonstrations; lower --num_prompts, or give "
            "--demonstration_file"
        )
    parts = split_examples(examples, sizes, seed=options.prompt_seed)
    return parts["queries"], parts["pool"], labels


def run(options: TrainOptions, config: ABFTConfig) -> int:
    """Train, and write the weights, the history and its figure to `config.output_dir`; return 0."""
    from rich.console import Console

    from abft.files import save_figure, write_json
    from abft.models.loading import load_base
    from abft.plots import training_figure
    from abft.prompts.builder import sample_prompts
    from abft.prompts.notes import prompt_notes
    from abft.training.fit import fit

    _check(options, config)
    queries, pool, labels = _examples(options)
    split = {"tp_plan": "auto"} if config.tensor_parallel_size > 1 else {}
    model = load_base(options.model, dtype=options.dtype, load_in_4bit=options.load_in_4bit, **split)
    builder = options.make_builder(model, labels)
    prompts = sample_prompts(builder, queries, pool, options.k, options.prompt_seed)
    console = Console()
    for note in prompt_notes([builder]):
        console.print(f"note: {note}", highlight=False)
    done = fit(
        model,
        config,
        prompts,
        progress=not config.disable_tqdm,
        on_resume=lambda checkpoint: console.print(f"resuming from {checkpoint}"),
    )

    output = Path(str(config.output_dir))
    history = done.trainer.state.log_history
    if done.trainer.is_world_process_zero():
        write_json(output / "training.json", sourced(options, {"history": history}))
        save_figure(training_figure(history), output / "training.png")
    done.trainer.save_model()  # last: a folder with weights is a finished run
    losses = [entry["loss"] for entry in done.history]
    console.print(
        f"{config.method.upper()}: {len(losses)} steps over {len(prompts)} prompts, "
        f"loss {losses[0]:.4g} → {losses[-1]:.4g}; weights and training.png in {output}"
    )
    return 0


COMMAND = Command(
    "train", "train W_Q and W_K of a model with ABFT, or its E2E baseline, on labelled texts", run, _options
)
