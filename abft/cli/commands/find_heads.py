"""`abft heads`: induction heads and retrieval heads of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft.cli.command import Command, sourced, write_note
from abft.models.model_options import ModelOptions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["COMMAND", "HeadOptions"]

_DEPTHS = tuple(step / 10 for step in range(11))


@dataclass(kw_only=True)
class HeadOptions(ModelOptions):
    """Find induction heads on random tokens that repeat, and retrieval heads on a needle in a haystack."""

    tokens: int = field(default=8192, metadata={"help": "length of the context"})
    samples: int = field(default=4, metadata={"help": "repeated texts to average over"})
    haystack: str | None = field(default=None, metadata={"help": "text file to hide the needle in; repeated if short"})
    needle: str | None = field(default=None, metadata={"help": "the sentence that answers the question"})
    question: str | None = field(default=None, metadata={"help": "what follows the haystack; its last token looks"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or float16; auto: the model's own"})
    load_in_4bit: bool = field(default=False, metadata={"help": "load the model in 4-bit NF4"})
    seed: int = field(default=0, metadata={"help": "seed of the random tokens"})
    output: str = field(default="heads.json", metadata={"help": "JSON to write, with a picture beside it"})
    quiet: bool = field(default=False, metadata={"help": "show no progress bars"})


def _load(options: HeadOptions) -> Any:
    from abft.models.loading import context_of, default_device, load_base

    model = load_base(options.model, dtype=options.dtype, load_in_4bit=options.load_in_4bit).eval()
    if not options.load_in_4bit:
        model.to(default_device())
    limit = context_of(model.config)
    if limit is not None and options.tokens > limit:
        raise ValueError(f"tokens={options.tokens} is beyond the model's context of {limit}; lower it")
    return model


def _retrieval(options: HeadOptions, model: Any, texts: list[str]) -> Tensor:
    """Return the mass on the needle, mean over depths; `texts` are haystack, needle and question."""
    from abft.analysis.heads import retrieval_scores
    from abft.models.loading import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    hay, needle, question = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    room = options.tokens - len(needle) - len(question)
    if room < 1 or not hay:
        raise ValueError(f"a context of {options.tokens} tokens leaves no room for a haystack; raise --tokens")
    hay = (hay * -(-room // len(hay)))[:room]
    return retrieval_scores(model, hay, needle, question, depths=_DEPTHS, progress=not options.quiet).mean(0)


def run(options: HeadOptions) -> int:
    """Score every head, print the best, and write the JSON file and its figure; return 0."""
    from rich.console import Console

    from abft.analysis.heads import HeadScores, induction_scores
    from abft.experiments.figures import head_scores_figure
    from abft.experiments.runs import check_writable
    from abft.files import save_figure, write_json

    asked = [text for text in (options.haystack, options.needle, options.question) if text]
    if len(asked) not in (0, 3):
        raise ValueError("retrieval heads need --haystack, --needle and --question, all three")
    texts = [Path(asked[0]).read_text(encoding="utf-8"), *asked[1:]] if asked else []
    output = Path(options.output)
    check_writable(output.parent)
    model = _load(options)
    scores = {
        "induction": induction_scores(
            model, length=options.tokens, samples=options.samples, seed=options.seed, progress=not options.quiet
        )
    }
    if texts:
        scores["retrieval"] = _retrieval(options, model, texts)
    content = {name: HeadScores(score).to_dict() for name, score in scores.items()}
    write_json(output, sourced(options, content))
    picture = output.with_suffix(".png")
    save_figure(head_scores_figure(scores, options.tokens), picture)
    console = Console()
    for name, found in content.items():
        best = ", ".join(f"{top['layer']}.{top['head']} ({top['score']:.1%})" for top in found["top"][:5])
        console.print(f"{name} heads, layer.head (mass): {best}", highlight=False)
    write_note([output, picture])
    return 0


COMMAND = Command(
    "heads",
    "find induction heads of a model on repeated text, and retrieval heads on a needle, at any length",
    run,
    lambda: (HeadOptions,),
)
