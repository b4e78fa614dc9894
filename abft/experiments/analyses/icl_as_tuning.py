"""In-context learning beside fine-tuning on the demonstrations (arXiv 2212.10559), in the untrained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from transformers import PretrainedConfig

from abft.analysis.fine_tuning import FORMS
from abft.analysis.implicit import compare_forms
from abft.analysis.tuning_search import choose_demonstrations, choose_rate
from abft.evaluation.suites import TaskSuite
from abft.experiments.analyses.definition import Analysis, Subject
from abft.experiments.results import Results
from abft.experiments.styles import integer_ticks
from abft.experiments.tables import Table
from abft.plots import BLUE, GREEN, GREY, ORANGE, new_figure

__all__ = ["ANALYSIS", "ImplicitOptions"]


@dataclass(kw_only=True)
class ImplicitOptions:
    """Options of the analysis `implicit`. Demonstrations and rates are chosen on the training split."""

    fine_tuning_tasks: list[str] = field(
        default_factory=list, metadata={"help": "tasks of the table, or all; default: the task that is analysed"}
    )
    fine_tuning_demonstrations: int = field(
        default=32, metadata={"help": "demonstrations, at most: as many as fit into the model's context"}
    )
    fine_tuning_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3], metadata={"help": "draws of demonstrations, of which ICL takes the best"}
    )
    fine_tuning_rates: list[float] = field(
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1],
        metadata={"help": "learning rates of fine-tuning on demonstrations, of which it takes the best"},
    )
    fine_tuning_epochs: int = field(default=1, metadata={"help": "epochs of fine-tuning on demonstrations"})
    fine_tuning_validation: int = field(default=64, metadata={"help": "examples that these choices are made on"})
    random_draws: int = field(default=3, metadata={"help": "random controls, whose mean is shown"})


def _check(suite: TaskSuite, config: PretrainedConfig, options: ImplicitOptions) -> None:
    for name in ("fine_tuning_demonstrations", "fine_tuning_epochs", "fine_tuning_validation", "random_draws"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if not options.fine_tuning_seeds or not options.fine_tuning_rates:
        raise ValueError("fine_tuning_seeds and fine_tuning_rates need one value or more each")
    if min(options.fine_tuning_rates) <= 0:
        raise ValueError(f"fine_tuning_rates must be above 0, got {options.fine_tuning_rates}")


def _run(subject: Subject, options: ImplicitOptions) -> dict[str, Any]:
    chosen = options.fine_tuning_tasks or [subject.suite.data.task.name]
    names = list(subject.suites) if chosen == ["all"] else chosen
    return {"tasks": {name: _of_task(subject, subject.suites[name], options) for name in names}}


def _of_task(subject: Subject, suite: TaskSuite, options: ImplicitOptions) -> dict[str, Any]:
    data, queries = suite.data, suite.data.queries[: subject.prompts]
    validation = data.train[: options.fine_tuning_validation]
    shared: dict[str, Any] = {"epochs": options.fine_tuning_epochs, "progress": subject.progress}
    demonstrations, draw = choose_demonstrations(
        subject.model,
        suite.builder,
        data.demonstrations,
        validation,
        count=min(options.fine_tuning_demonstrations, len(data.demonstrations)),
        seeds=options.fine_tuning_seeds,
        queries=queries,
        progress=subject.progress,
    )
    rates = {
        form: choose_rate(
            subject.model,
            suite.builder,
            demonstrations,
            validation,
            rates=options.fine_tuning_rates,
            form=form,
            **shared,
        )
        for form in FORMS
    }
    found = compare_forms(
        subject.model,
        suite.builder,
        demonstrations,
        queries,
        {form: rate.value for form, rate in rates.items()},
        random_draws=options.random_draws,
        **shared,
    )
    forms = {form: {**result.to_dict(), "rate": rates[form].to_dict()} for form, result in found.items()}
    return {"demonstrations": draw.to_dict(), "forms": forms}


_ALL, _LABEL = ("all", "all tokens", BLUE, "-o"), ("label", "label alone", GREEN, "-v")
_PANELS = {
    "SimAOU": {"sim_aou": (_ALL, _LABEL), "sim_aou_random": (("all", "random update", GREY, "--s"),)},
    "SimAM": {
        "sim_am": (_ALL, _LABEL),
        "sim_am_before": (("all", "before fine-tuning", ORANGE, "-.^"),),
        "sim_am_random": (("all", "random update", GREY, "--s"),),
    },
    "Kendall's τ, tokens": {
        "kendall_token": (_ALL, _LABEL),
        "kendall_random_token": (("all", "random numbers", GREY, "--s"),),
    },
}


def _figure(found: dict[str, Any]) -> tuple[Figure, str]:
    task, first = next(iter(found["tasks"].items()))
    forms = first["forms"]
    figure, axes = new_figure(9.6, 2.9, len(_PANELS))
    for axis, (title, curves) in zip(axes, _PANELS.items(), strict=True):
        for name, styles in curves.items():
            for form, label, color, style in styles:
                axis.plot(range(len(forms[form][name])), forms[form][name], style, color=color, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        integer_ticks(axis.xaxis)
        axis.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("likeness to ICL")
    return figure, (
        f"In-context learning beside fine-tuning on its {forms['all']['demonstrations']} demonstrations (arXiv "
        f"2212.10559), task {task}, {forms['all']['n']} queries: cosine of attention-output updates and of attention "
        "scores, and Kendall's τ of the attention to the demonstrations' tokens, by layer."
    )


def _table(results: Results, found: dict[str, Any]) -> Table:
    table = Table(
        f"{results.folder.name}-implicit",
        "In-context learning beside fine-tuning on the same demonstrations (arXiv 2212.10559), means over layers. "
        "Accuracy in %; Rec2FTP: share of the queries recovered by fine-tuning that ICL recovers too; in brackets the "
        "control: ICL's share of all that zero-shot gets wrong, random updates, random orders, a random choice.",
        ["", "k", "rate", "zero-shot", "ICL", "tuned", "Rec2FTP", "SimAOU", "SimAM, before", "SimAM", "τ, tokens",
         "top tokens", "top examples"],
    )  # fmt: skip
    for task, form, values in _rows(found):
        table.rows.append(
            [
                f"{task}, {'all tokens' if form == 'all' else 'label alone'}",
                f"{values['demonstrations']}",
                f"{values['rate']['value']:g}",
                *(f"{100 * values['accuracy'][name]:.1f}" for name in ("zero-shot", "icl", "fine-tuned")),
                _beside(values["rec2ftp"], values["rec2ftp_control"]),
                _beside(values["sim_aou_mean"], values["sim_aou_random_mean"]),
                f"{values['sim_am_before_mean']:.2f}",
                _beside(values["sim_am_mean"], values["sim_am_random_mean"]),
                _beside(values["kendall_token_mean"], values["kendall_random_token_mean"]),
                _beside(values["recall_token_mean"], values["chance"]["token"]),
                _beside(values["recall_example_mean"], values["chance"]["example"]),
            ]
        )
    return table


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for task, of_task in found["tasks"].items():
        for form, values in of_task["forms"].items():
            yield task, form, values


def _beside(value: float | None, control: float | None) -> str:
    known = ["none" if number is None else f"{number:.2f}" for number in (value, control)]
    return f"{known[0]} ({known[1]})"


def _tasks(options: ImplicitOptions) -> Sequence[str]:
    return options.fine_tuning_tasks


ANALYSIS = Analysis(
    "implicit",
    _run,
    ImplicitOptions,
    uses_prompts=True,
    quantized=False,
    check=_check,
    tasks=_tasks,
    figure=_figure,
    table=_table,
)
