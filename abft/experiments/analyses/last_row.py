"""Whole last rows of chosen prompts, before and after training (arXiv 2505.14233, Figs. 8, 16 and 29 to 31)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PretrainedConfig

from abft.analysis.attention_rows import last_rows
from abft.evaluation.suites import TaskSuite
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.methods import METHODS
from abft.plots import BLUE, VERMILION, new_figure

__all__ = ["ANALYSIS", "LastRowOptions"]

# Longer prompts name their label tokens alone.
MOST_TOKENS_NAMED = 160


@dataclass(kw_only=True)
class LastRowOptions:
    """Options of the analysis `last_row`."""

    row_prompts: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "test prompts whose last row is drawn, by number from 0"}
    )
    row_heads: list[str] = field(
        default_factory=list,
        metadata={"help": "heads to draw, as LAYER.HEAD from 0; default: the mean over the heads of each layer"},
    )

    def heads(self) -> list[tuple[int, int]]:
        """Return layer and head of each chosen head.

        Raises:
            ValueError: something other than LAYER.HEAD.
        """
        pairs = []
        for name in self.row_heads:
            layer, dot, head = name.partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise ValueError(f"row_heads must be LAYER.HEAD, such as 3.1, got {name!r}")
            pairs.append((int(layer), int(head)))
        return pairs


def _check(suite: TaskSuite, config: PretrainedConfig, options: LastRowOptions) -> None:
    if not options.row_prompts:
        raise ValueError("row_prompts is empty; give the number of one test prompt or more")
    for number in options.row_prompts:
        if not 0 <= number < len(suite.normal):
            raise ValueError(f"row_prompts must lie from 0 to {len(suite.normal) - 1}, got {number}")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    for layer, head in options.heads():
        if layer >= layers or head >= heads:
            raise ValueError(f"row_heads names {layer}.{head}, but the model has {layers} layers of {heads} heads")


def _run(subject: Subject, options: LastRowOptions) -> dict[str, Any]:
    prompts = [subject.suite.normal[number] for number in options.row_prompts]
    chosen = options.heads()
    rows: dict[str, list[list[list[float]]]] = {}
    for name in ("vanilla", *subject.trained):
        with subject.at({name: 1.0} if name in subject.trained else {}):
            found = last_rows(subject.model, prompts, progress=subject.progress)
        rows[name] = [_rounded(_of_heads(row, chosen)) for row in found]
    return {
        "heads": [f"{layer}.{head}" for layer, head in chosen],
        "prompts": [
            {
                "number": number,
                "tokens": [subject.suite.tokenizer.decode([token]) for token in prompt.input_ids],
                "correct": list(prompt.positive),
                "wrong": list(prompt.negative),
                "gold": subject.suite.data.task.labels[prompt.query_label],
                "rows": {name: rows[name][index] for name in rows},
            }
            for index, (number, prompt) in enumerate(zip(options.row_prompts, prompts, strict=True))
        ],
    }


def _of_heads(rows: Tensor, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the rows `(heads, n)` of the chosen heads, or the head mean of each layer."""
    values = rows.numpy()
    return np.stack([values[layer, head] for layer, head in chosen]) if chosen else values.mean(axis=1)


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    prompts = found["prompts"]
    names = list(prompts[0]["rows"])
    longest = max(len(prompt["tokens"]) for prompt in prompts)
    layers = len(prompts[0]["rows"][names[0]])
    height = len(prompts) * (len(names) * (0.45 + 0.1 * layers) + 0.8)
    width = float(np.clip(0.105 * longest + 1.6, 6, 24))
    figure, axes = new_figure(width, height, rows=len(prompts) * len(names), squeeze=False)
    largest = max(np.max(prompt["rows"][name]) for prompt in prompts for name in names)
    for number, prompt in enumerate(prompts):
        group = axes[number * len(names) : (number + 1) * len(names), 0]
        for axis, name in zip(group, names, strict=True):
            image = axis.imshow(
                prompt["rows"][name],
                norm=PowerNorm(0.5, 0, largest),
                cmap="cividis",
                aspect="auto",
                interpolation="nearest",
            )
            axis.set_xticks([])
            axis.set_ylabel("head" if found["heads"] else "layer", fontsize=7)
            if found["heads"]:
                axis.set_yticks(range(layers), found["heads"])
            axis.tick_params(axis="y", labelsize=6)
            axis.set_title(f"prompt {prompt['number']} (gold: {prompt['gold']}), {METHODS[name].title}", fontsize=8)
        _name_tokens(group[-1], prompt)
    figure.colorbar(image, ax=axes, label="attention", aspect=40)
    return figure, (
        "The last token's attention over the whole prompt, "
        + ("by head" if found["heads"] else "by layer, mean over heads")
        + ", before and after training. Blue: labels equal to the gold label; red: other labels. Colours: square root."
    )


def _name_tokens(axis: Any, prompt: Mapping[str, Any]) -> None:
    """Write the tokens below, labels in colour."""
    tokens, colors = (
        prompt["tokens"],
        dict.fromkeys(prompt["wrong"], VERMILION) | dict.fromkeys(prompt["correct"], BLUE),
    )
    every = len(tokens) <= MOST_TOKENS_NAMED
    named = [position for position in range(len(tokens)) if every or position in colors or position == len(tokens) - 1]
    texts = [tokens[position].replace("\n", "⏎").strip() or "·" for position in named]
    axis.set_xticks(named, texts, rotation=90, fontsize=6, parse_math=False)
    for position, text in zip(named, axis.get_xticklabels(), strict=True):
        if position in colors:
            text.set(color=colors[position], fontweight="bold")


ANALYSIS = Analysis("last_row", _run, LastRowOptions, check=_check, figure=_figure)
