"""Grids of training options: each combination of values is a run of its own, beside the method's plain run.

A point of the grid is written as text, `correct_award=0.5,wrong_penalty=0.25`: names in alphabetical order, without the
options whose value is the method's own. So a point has one name however the grid was given, a larger grid keeps the
runs of a smaller one, and the point that changes nothing is the method's plain run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any, NoReturn

from transformers import HfArgumentParser

from abft.experiments.methods import Method
from abft.training.config import ABFTConfig
from abft.training.options import TrainingOptions

__all__ = ["changes_of", "grid_points", "own_options", "parse_grid"]

NAMES = tuple(option.name for option in fields(TrainingOptions))


class _Parser(HfArgumentParser):
    """A parser of option values that raises instead of leaving the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _value(name: str, text: str) -> Any:
    """Return the value of a training option from its text, in the option's type."""
    if name not in NAMES:
        raise ValueError(f"the grid names {name!r}, which is no training option; known are {', '.join(NAMES)}")
    options: Any = TrainingOptions
    try:
        return getattr(_Parser(options).parse_args_into_dataclasses([f"--{name}={text}"])[0], name)
    except ValueError as error:
        raise ValueError(f"the grid gives {name} the value {text!r}: {error}") from error


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return option → its values, from texts `NAME=VALUE,VALUE`.

    Raises:
        ValueError: another form, an option that is none of `TrainingOptions` or comes twice, a value that is none of
            it or comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not values or name in grid:
            raise ValueError(f"a grid is given as NAME=VALUE,VALUE with each option once, got {text!r}")
        grid[name] = [_value(name, value) for value in values.split(",")]
        if len(set(grid[name])) < len(grid[name]):
            raise ValueError(f"the grid gives {name} a value twice: {values}")
    return grid


def own_options(method: Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training options of the method's plain run, with the default learning rate filled in.

    Args:
        method: one that trains.
        settings: of the experiment; options that it lacks have their default.
    """
    given = {name: settings[name] for name in NAMES if name in settings}
    size = {"per_device_train_batch_size": settings["batch_size"]} if "batch_size" in settings else {}
    config = ABFTConfig(output_dir=".", **size, **method.training_options(given))
    return {name: getattr(config, name) for name in NAMES}


def grid_points(grid: Mapping[str, Sequence[Any]], own: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return the points of the grid that differ from the method's own options, as text, each once.

    Args:
        grid: option → its values.
        own: options of the method's plain run.
        ignored: options without effect on the method, over which it has no points.
    """
    concerned = {name: values for name, values in grid.items() if name not in ignored}
    points = []
    for values in product(*concerned.values()):
        changes = {name: value for name, value in zip(concerned, values, strict=True) if value != own[name]}
        points.append(",".join(f"{name}={changes[name]}" for name in sorted(changes)))
    return [point for point in dict.fromkeys(points) if point]


def changes_of(point: str) -> dict[str, Any]:
    """Return option → value of a point, from its text; empty for a plain run."""
    return {name: values[0] for name, values in parse_grid(point.split(",") if point else []).items()}
