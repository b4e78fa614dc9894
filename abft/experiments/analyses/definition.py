"""An analysis: how it is computed, and how a report shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformers import PretrainedConfig

from abft.evaluation.suites import TaskSuite
from abft.experiments.results import Results
from abft.experiments.tables import Table

__all__ = ["Analysis", "At", "Subject"]

At = Callable[[Mapping[str, float]], AbstractContextManager[None]]
"""Moves a model while its block runs: takes method → factor."""


@dataclass(frozen=True)
class Subject:
    """The models and the prompts that analyses look at.

    Args:
        model: the untrained model.
        trained: the methods of the runs whose weights are kept.
        at: takes method → factor; inside its block the model is θ₀ + Σ factor·(θ_method − θ₀), so that a factor of 1
            is the trained model.
        differences: method → name of a weight → what training added to it; empty on a 4-bit base, which has adapters.
        suite: the prompts of the task.
        suites: those of every task that an analysis asked for, by name; the task is the first.
        k: demonstrations per prompt.
        prompts: test prompts to use.
        progress: show progress bars.
    """

    model: Any
    trained: tuple[str, ...]
    at: At
    differences: Mapping[str, Mapping[str, Tensor]]
    suite: TaskSuite
    suites: Mapping[str, TaskSuite]
    k: int
    prompts: int
    progress: bool


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Args:
        name: on the command line, and in `analysis.json`.
        run: returns plain data; takes the subject and an object of `options` (None if there are none).
        options: dataclass of its own options, each with a default.
        uses_prompts: the number of test prompts changes the result.
        needs_weights: it needs the weights of one trained run or more.
        methods: returns the methods whose weights it needs, from its options.
        quantized: it works on a 4-bit base.
        on_demand: it is made only if it is named.
        check: raises ValueError for options that do not fit the task's prompts or the model's configuration; called
            before a model is loaded.
        tasks: returns the names of further tasks whose prompts it needs, from its options; "all" for every one.
        figure: draws the plain data; returns the figure and its caption.
        table: sets the plain data in a table.
    """

    name: str
    run: Callable[[Subject, Any], Any]
    options: type | None = None
    uses_prompts: bool = False
    needs_weights: bool = False
    methods: Callable[[Any], Sequence[str]] = lambda options: ()
    quantized: bool = True
    on_demand: bool = False
    check: Callable[[TaskSuite, PretrainedConfig, Any], None] | None = None
    tasks: Callable[[Any], Sequence[str]] | None = None
    figure: Callable[[Any], tuple[Figure, str]] | None = None
    table: Callable[[Results, Any], Table] | None = None
