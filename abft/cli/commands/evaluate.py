"""`abft eval`: measure a model on labelled texts, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft.cli.command import Command, sourced, write_note
from abft.cli.prompt_options import PromptOptions

__all__ = ["COMMAND", "EvalOptions"]


@dataclass(kw_only=True)
class EvalOptions(PromptOptions):
    """Evaluate on labelled texts."""

    test_file: str = field(metadata={"help": "JSONL or CSV of labelled texts: the queries"})
    demonstration_file: str = field(metadata={"help": "JSONL or CSV of texts to draw demonstrations from"})
    trained: list[str] = field(default_factory=list, metadata={"help": "folders that `abft train` wrote, to compare"})
    num_prompts: int | None = field(default=None, metadata={"help": "queries to use; default: all"})
    batch_size: int = field(default=32, metadata={"help": "prompts per forward pass"})
    output: str = field(default="eval.json", metadata={"help": "JSON to write, with a picture of the heads beside it"})
    quiet: bool = field(default=False, metadata={"help": "show no progress bars"})


def _models(options: EvalOptions, model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the model of each run, the untrained one's first."""
    from abft.models.loading import default_device, loading_arguments
    from abft.models.weights import from_pretrained

    for name in ["vanilla", *options.trained]:
        if name != "vanilla":
            model = from_pretrained(
                name, options.model, **loading_arguments(dtype=options.dtype, load_in_4bit=options.load_in_4bit)
            )
        if not options.load_in_4bit:  # a 4-bit model is on its device already
            model.to(default_device())
        yield name, model


def run(options: EvalOptions) -> int:
    """Measure every model on the same prompts, and write the JSON file and the figures; return 0."""
    from rich.console import Console

    from abft.evaluation.classification import evaluate
    from abft.evaluation.label_attention import head_statistics
    from abft.files import save_figure, write_json
    from abft.models.loading import load_base
    from abft.models.weights import is_trained_folder
    from abft.plots import head_figure, metrics_table
    from abft.prompts.builder import sample_prompts
    from abft.prompts.notes import prompt_notes

    for folder in options.trained:
        if not is_trained_folder(folder):
            raise ValueError(f"--trained {folder!r} holds no trained weights; give a folder that `abft train` finished")
    pool, labels = options.load(options.demonstration_file, options.known_labels())
    queries, _ = options.load(options.test_file, labels)
    queries = queries[: options.num_prompts]
    base = load_base(options.model, dtype=options.dtype, load_in_4bit=options.load_in_4bit)
    builder = options.make_builder(base, labels)
    prompts = sample_prompts(builder, queries, pool, options.k, options.prompt_seed)
    for note in prompt_notes([builder]):
        Console().print(f"note: {note}", highlight=False)

    runs: dict[str, dict[str, Any]] = {}
    statistics = {}
    for name, model in _models(options, base):
        metrics = evaluate(model, prompts, batch_size=options.batch_size, progress=not options.quiet)
        statistics[name] = head_statistics(model, prompts, batch_size=options.batch_size, progress=not options.quiet)
        runs[name] = {**metrics.to_dict(), **statistics[name].to_dict()}
    write_json(options.output, sourced(options, {"runs": runs}))
    Console().print(metrics_table(runs, f"{len(prompts)} prompts, k = {options.k}"))
    for name in options.trained:
        picture = Path(options.output).with_suffix("").as_posix() + f"-{Path(name).name}.png"
        save_figure(head_figure(statistics["vanilla"], statistics[name], ("vanilla", Path(name).name)), picture)
    write_note([options.output])
    return 0


COMMAND = Command(
    "eval",
    "measure in-context accuracy, macro-F1, likelihood, ECE and induction heads, before and after training",
    run,
    lambda: (EvalOptions,),
)
