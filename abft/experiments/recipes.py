"""Recipes: the experiments and analyses behind each table and figure of arXiv 2505.14233.

A recipe is a set of options of `abft experiment` with parts of `abft analyze`. All recipes of one model share a folder,
so a run that several need is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from abft.experiments.experiment import ExperimentOptions

__all__ = ["RECIPES", "Recipe", "find_recipes", "options_of", "recipe_table"]


@dataclass(frozen=True)
class Recipe:
    """A table or figure of the paper.

    Args:
        name: as given on the command line.
        title: its content.
        options: fields of `ExperimentOptions`, used where the user leaves the default.
        parts: analyses of `abft analyze`.
        shows: names of the report's tables and figures that answer it.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()

    @property
    def needs(self) -> str:
        """Return the runs and analyses in one phrase."""
        parts = [f"{name} {_text(value)}" for name, value in self.options.items()]
        return "; ".join([*parts, *([f"analyses {_text(self.parts)}"] if self.parts else [])])


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


_COMPARED = ["vanilla", "abft", "e2e"]

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("table1", "accuracy on eight tasks by method", {"methods": ["paper"]}, shows=("accuracy",)),
        Recipe(
            "table2",
            "parameters, time, accuracy in and out of domain, ABFT beside E2E",
            {"methods": _COMPARED, "generalization": True},
            shows=("transfer",),
        ),
        Recipe(
            "table3",
            "consistency over templates and demonstrations",
            {"methods": ["vanilla", "abft"], "tests": ["Normal", "TempSensitivity", "DemoSensitivity"]},
            shows=("consistency",),
        ),
        Recipe("table4", "ablations", {"methods": ["ablation"]}, shows=("accuracy",)),
        Recipe(
            "fig3",
            "accuracy by the number of training prompts, with the zero-shot reference",
            {"methods": _COMPARED, "tests": ["Normal", "ZeroShot"], "num_prompts": [32, 64, 128, 256, 512]},
            shows=("data-efficiency",),
        ),
        Recipe("fig4", "attention on labels by layer", {"methods": _COMPARED}, shows=("label-attention",)),
        Recipe("fig5", "induction heads and A over training", {"methods": ["abft", "no_pid"]}, shows=("training",)),
        Recipe(
            "fig6",
            "accuracy over A × B, with and without PID",
            {
                "methods": ["abft"],
                "grid": ["wrong_penalty=0,0.25,0.5,0.75,1", "correct_award=0,0.5,1,1.5,2", "adaption=PID,none"],
            },
            shows=("grid",),
        ),
        Recipe(
            "fig7",
            "accuracy over the plane of ABFT and E2E",
            {"methods": _COMPARED},
            ("connectivity",),
            ("connectivity",),
        ),
        Recipe(
            "fig8", "the last token's attention, before and after", {"methods": _COMPARED}, ("last_row",), ("last_row",)
        ),
        Recipe(
            "fig10",
            "attention on labels without a correct one",
            {"methods": _COMPARED, "tests": ["Normal", "Unseen"]},
            shows=("robustness", "label-attention"),
        ),
        Recipe(
            "fig9",
            "accuracy over the plane of ABFT and MetaICL",
            {"methods": ["vanilla", "abft", "metaicl"]},
            ("connectivity_metaicl",),
            ("connectivity_metaicl",),
        ),
        Recipe("appendix_b", "shift of W_Q and W_K by layer", {"methods": _COMPARED}, ("distance",), ("distance",)),
        Recipe(
            "robustness",
            "wrong labels, bias, unseen labels",
            {"methods": _COMPARED, "tests": ["Normal", "GLER", "Bias", "Unseen"]},
            shows=("robustness", "label-errors"),
        ),
        Recipe(
            "implicit",
            "ICL beside fine-tuning on the demonstrations (arXiv 2212.10559)",
            {"methods": ["vanilla", "abft"]},
            ("implicit", "momentum"),
            ("implicit",),
        ),
    )
}
"""By name."""


def find_recipes(names: Sequence[str]) -> list[Recipe]:
    """Return the recipes of these names; `all` stands for every one.

    Raises:
        ValueError: an unknown name.
    """
    if unknown := [name for name in names if name not in (*RECIPES, "all")]:
        raise ValueError(f"no recipe {unknown[0]!r}; known are {', '.join(RECIPES)}, all")
    return list(RECIPES.values()) if "all" in names else [RECIPES[name] for name in dict.fromkeys(names)]


def options_of(recipe: Recipe, given: ExperimentOptions) -> ExperimentOptions:
    """Return the options of the recipe's experiment: the recipe's, except where the user changed a default."""
    untouched = ExperimentOptions(model=given.model, output_dir=given.output_dir)
    changes = {
        name: value for name, value in recipe.options.items() if getattr(given, name) == getattr(untouched, name)
    }
    return replace(given, **changes)


def recipe_table() -> Table:
    """Return the recipes and what each needs, for the terminal."""
    table = Table("recipe", "content", "needs", title="tables and figures of arXiv 2505.14233")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.title, recipe.needs)
    return table
