"""The commands that evaluate: `abft experiment | analyze | report | compare | heads | prototype`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from abft.analysis.heads import HeadScores, induction_scores, retrieval_scores
from abft.cli.arguments import parse
from abft.cli.prototype import prototype
from abft.experiments.analyze import AnalyzeOptions, analyze
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.experiments.figures import head_scores_figure
from abft.experiments.report import compare_runs, overview_table, write_report
from abft.experiments.results import Results
from abft.experiments.runs import check_writable
from abft.files import save_figure, write_json
from abft.models.loading import context_of, default_device, load_base, load_tokenizer
from abft.provenance import provenance

__all__ = ["COMMANDS"]

_DEPTHS = tuple(step / 10 for step in range(11))


@dataclass(kw_only=True)
class HeadOptions:
    """Induction heads of a model on random tokens that repeat, and its retrieval heads on a needle in a haystack."""

    model: str = field(metadata={"help": "a local folder or a name on the Hugging Face Hub"})
    tokens: int = field(default=8192, metadata={"help": "length of the context"})
    samples: int = field(default=4, metadata={"help": "repeated texts to average over"})
    haystack: str | None = field(default=None, metadata={"help": "text file to hide the needle in; repeated if short"})
    needle: str | None = field(default=None, metadata={"help": "the sentence that answers the question"})
    question: str | None = field(default=None, metadata={"help": "what follows the haystack; its last token looks"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or float16; auto: the model's own"})
    load_in_4bit: bool = field(default=False, metadata={"help": "the model in 4-bit NF4"})
    seed: int = field(default=0, metadata={"help": "seed of the random tokens"})
    output: str = field(default="heads.json", metadata={"help": "JSON to write, with a picture beside it"})
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})


def _experiment(arguments: Sequence[str]) -> int:
    (options,) = parse("experiment", arguments, ExperimentOptions)
    disable_progress_bar()  # a bar for each time that the model is read from disk
    experiment = Experiment(options)
    experiment.run()
    results = Results(experiment.output)
    console = Console()
    console.print(overview_table([results]).rich())
    for claim in results.claims():
        if claim.holds is not None:
            console.print(f"{claim.text}: {claim.verdict}. {claim.evidence}", highlight=False)
    _say_written(write_report([experiment.output], experiment.output / "report.html"))
    return 0


def _analyze(arguments: Sequence[str]) -> int:
    (options,) = parse("analyze", arguments, AnalyzeOptions)
    analyze(options)
    folder = Path(options.experiment)
    _say_written([folder / "analysis.json", *write_report([folder], folder / "report.html")])
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="abft report", description="Experiments as HTML, Markdown and LaTeX.")
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="folder that `abft experiment` wrote")
    parser.add_argument("--output", default="report.html", help="HTML file; .md, .tex and .json are written beside it")
    parser.add_argument("--figures", default=None, help="folder to write the figures to, as PNG")
    parser.add_argument("--no_paper", action="store_true", help="leave out the paper's own figures")
    options = parser.parse_args(list(arguments))
    _say_written(write_report(options.experiments, options.output, paper=not options.no_paper, figures=options.figures))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="abft compare", description="Two runs on the same prompts.")
    parser.add_argument("before", metavar="RUN", help="folder with a run.json, under runs/ of an experiment")
    parser.add_argument("after", metavar="RUN")
    parser.add_argument("--test", default="Normal", help="Normal, Unseen or Calibration")
    options = parser.parse_args(list(arguments))
    Console().print(compare_runs(options.before, options.after, options.test).rich())
    return 0


def _heads(arguments: Sequence[str]) -> int:
    (options,) = parse("heads", arguments, HeadOptions)
    asked = [options.haystack, options.needle, options.question]
    if any(asked) and not all(asked):
        raise ValueError("retrieval heads need --haystack, --needle and --question, all three")
    haystack = Path(options.haystack).read_text(encoding="utf-8") if options.haystack else ""
    output = Path(options.output)
    check_writable(output.parent)
    model = load_base(options.model, dtype=options.dtype, load_in_4bit=options.load_in_4bit).eval()
    if not options.load_in_4bit:
        model.to(default_device())
    limit = context_of(model.config)
    if limit is not None and options.tokens > limit:
        raise ValueError(f"tokens={options.tokens} is beyond the model's context of {limit}; lower it")
    scores = {"induction": induction_scores(
        model, length=options.tokens, samples=options.samples, seed=options.seed, progress=not options.quiet
    )}  # fmt: skip
    if options.haystack:
        tokenizer = load_tokenizer(options.model)
        hay, needle, question = (
            tokenizer.encode(text, add_special_tokens=False) for text in (haystack, options.needle, options.question)
        )
        room = options.tokens - len(needle) - len(question)
        if room < 1 or not hay:
            raise ValueError(f"a context of {options.tokens} tokens leaves no room for a haystack; raise --tokens")
        hay = (hay * -(-room // len(hay)))[:room]
        by_depth = retrieval_scores(model, hay, needle, question, depths=_DEPTHS, progress=not options.quiet)
        scores["retrieval"] = by_depth.mean(0)
    content = {name: HeadScores(score).to_dict() for name, score in scores.items()}
    write_json(output, {**provenance(), "options": asdict(options), **content})
    picture = output.with_suffix(".png")
    save_figure(head_scores_figure(scores, options.tokens), picture)
    console = Console()
    for name, found in content.items():
        best = ", ".join(f"{top['layer']}.{top['head']} ({top['score']:.1%})" for top in found["top"][:5])
        console.print(f"{name} heads, layer.head (mass): {best}", highlight=False)
    _say_written([output, picture])
    return 0


def _say_written(paths: Sequence[Path]) -> None:
    Console().print(f"written: {', '.join(map(str, paths))}", highlight=False)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "experiment": _experiment,
    "analyze": _analyze,
    "report": _report,
    "compare": _compare,
    "heads": _heads,
    "prototype": prototype,
}
"""By name."""
