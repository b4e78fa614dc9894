"""Tables of a report, in the paper's layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abft.experiments.analyses import analysis_registry as registry
from abft.experiments.methods import METHODS
from abft.experiments.paper_tables import published_averages
from abft.experiments.results import Results, Value, accuracy
from abft.experiments.tables import Table, points, with_error

__all__ = ["experiment_tables", "model_name", "overview_table", "titles"]


def model_name(results: Results) -> str:
    """Return the last part of the model's path or name."""
    return Path(results.model).name


def titles(experiments: Sequence[Results]) -> list[str]:
    """Return the models' names, with the folder's name if a model has several experiments."""
    names = [model_name(results) for results in experiments]
    return [
        f"{name} ({results.folder.name})" if names.count(name) > 1 else name
        for name, results in zip(names, experiments, strict=True)
    ]


def overview_table(experiments: Sequence[Results], *, paper: bool = True) -> Table:
    """Return accuracy by model, method and task: the paper's Table 1, with its averages beside those of its models."""
    tasks = list(dict.fromkeys(task for results in experiments for task in results.tasks))
    known = [published_averages(results.model) if paper else {} for results in experiments]
    columns = ["", *tasks, "average", *(["paper's average"] if any(known) else [])]
    table = Table("accuracy-by-task", "", columns)
    for results, title, published in zip(experiments, titles(experiments), known, strict=True):
        first = len(table.rows)
        means: list[list[float | None]] = []
        for method in results.methods:
            cells = [
                results.summary(method, task, accuracy) if task in results.tasks else (None, None) for task in tasks
            ]
            cells.append(results.average(method, accuracy))
            row = [f"{title}, {METHODS[method].title}", *(with_error(*cell) for cell in cells)]
            if any(known):
                row.append(f"{published[method]:.2f}" if method in published else "")
            table.rows.append(row)
            means.append([mean for mean, _ in cells])
        for column, values in enumerate(zip(*means, strict=True), 1):
            block = Table("", "", (), table.rows[first:])
            block.mark_best(column, list(values))
            table.bold |= {(first + row, where) for row, where in block.bold}
    n = max(
        (
            tests[name]["n"]
            for results in experiments
            for run in results.runs
            for tests in run.tests.values()
            for name in ("Normal",)
            if name in tests
        ),
        default=0,
    )
    table.caption = f"Accuracy in %, mean ± standard error over training seeds, up to {n:,} test prompts a task."
    if any(known):
        table.caption += " Paper's average: arXiv 2505.14233, Table 1, over its eight data sets."
    return table


def experiment_tables(results: Results, analysis: dict[str, Any] | None = None) -> list[Table]:
    """Return every other table that the runs, and what `abft analyze` wrote, have data for."""
    makers: list[Callable[[Results], Table | None]] = [
        _metrics_table,
        _comparison_table,
        _transfer_table,
        _consistency_table,
        _robustness_table,
        _efficiency_table,
        _heads_table,
    ]
    tables = [table for make in makers if (table := make(results)) is not None]
    for row, found in registry.stored_parts(analysis):
        if row.table is not None:
            tables.append(row.table(results, found))
    return tables


def _heads_table(results: Results) -> Table | None:
    """Return the induction heads per test prompt, by task."""
    table = Table(
        f"{results.folder.name}-heads",
        f"{model_name(results)}: induction heads per test prompt, mean over training seeds.",
        ["", *results.tasks],
    )

    def heads(result: dict[str, Any]) -> float:
        return result["induction_heads"]

    for method in results.methods:
        cells = [results.summary(method, task, heads, test="heads")[0] for task in results.tasks]
        if method != "calibration" and any(cell is not None for cell in cells):
            table.rows.append([METHODS[method].title, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    return table if table.rows else None


def _metrics_table(results: Results) -> Table | None:
    names = {"macro_f1": "macro-F1", "true_label_likelihood": "likelihood", "ece": "ECE"}
    table = Table(
        f"{results.folder.name}-metrics",
        f"{model_name(results)}: means over tasks ± standard error over seeds. Likelihood: mean probability of the "
        "gold label among the label words; ECE: expected calibration error, lower is better; KL: of the mean "
        "prediction from the labels' frequencies, in nats.",
        ["", "accuracy", *names.values(), "KL"],
    )
    means: dict[str, list[float | None]] = {name: [] for name in ("accuracy", *names, "kl")}
    for method in results.methods:
        row = [METHODS[method].title]
        for name in means:

            def value(result: dict[str, Any], name: str = name) -> float | None:
                return result.get("posterior_bias", {}).get("kl") if name == "kl" else result[name]

            mean, error = results.average(method, value)
            means[name].append(mean)
            row.append(with_error(mean, error) if name == "accuracy" else with_error(mean, error, 3, 1.0))
        table.rows.append(row)
    for column, (name, values) in enumerate(means.items(), 1):
        table.mark_best(column, values, lowest=name in ("ece", "kl"))
    return table if any(value is not None for value in means["accuracy"]) else None


def _comparison_table(results: Results) -> Table | None:
    table = Table(
        f"{results.folder.name}-against-vanilla",
        "Accuracy less the untrained model's on the same prompts, in points, with the 95 % interval of the paired "
        "bootstrap over queries; * p < 0.05, sign-flip test.",
        ["", *(METHODS[method].title for method in results.methods if method != "vanilla")],
    )
    for task in (*results.tasks, None):
        found = [results.compare("vanilla", method, task) for method in results.methods if method != "vanilla"]
        if any(found):
            table.rows.append(
                [
                    task or "all",
                    *(
                        ""
                        if c is None
                        else f"{points(c.difference)} [{points(c.low)}, {points(c.high)}]"
                        + ("*" if c.p_value < 0.05 else "")
                        for c in found
                    ),
                ]
            )
    return table if table.rows else None


def _transfer_table(results: Results) -> Table | None:
    trained = [name for name in results.methods if METHODS[name].trained]
    if not trained:
        return None
    table = Table(
        f"{results.folder.name}-transfer",
        f"Training on {results.largest} prompts: trained parameters, time without and with saving checkpoints, peak "
        "memory of one run; accuracy on the task trained on, and on the others (vanilla: untrained, the same average). "
        "The paper's Table 2. Memory on a CPU: the process's.",
        ["", "parameters", "seconds", "with checkpoints", "× ABFT", "GiB", "in domain", "out of domain"],
    )
    reference, _ = results.seconds("abft")
    for method in ("vanilla", *trained):
        seconds, error = results.seconds(method)
        parameters = results.trained_parameters(method)
        memory = [
            run.training["peak_memory_bytes"] / 2**30
            for task in results.tasks
            for run in results.of(method, task)
            if run.training
        ]
        away = results.average(method, accuracy) if method == "vanilla" else results.out_of_domain(method)
        table.rows.append(
            [
                METHODS[method].title,
                "" if parameters is None else f"{parameters:,}",
                with_error(seconds, error, 1, 1.0),
                with_error(*results.seconds(method, checkpoints=True), 1, 1.0),
                "" if not seconds or not reference else f"{seconds / reference:.2f}",
                f"{max(memory):.2f}" if memory else "",
                with_error(*results.average(method, accuracy)),
                with_error(*away),
            ]
        )
    return table


def _consistency_table(results: Results) -> Table | None:
    return _columns_table(
        results,
        "consistency",
        "Consistency in %: share of the variants of a prompt that give the most frequent answer, mean over queries and "
        "tasks; and the mean accuracy over the variants.",
        [
            ("9 templates", "TempSensitivity", lambda result: result["consistency"]),
            ("accuracy", "TempSensitivity", lambda result: result["accuracy_mean"]),
            ("8 draws of demonstrations", "DemoSensitivity", lambda result: result["consistency"]),
            ("accuracy", "DemoSensitivity", lambda result: result["accuracy_mean"]),
        ],
    )


def _robustness_table(results: Results) -> Table | None:
    def entropy(kind: str) -> Value:
        return lambda result: result[kind]["entropy"] / math.log(len(result[kind]["distribution"]))

    return _columns_table(
        results,
        "robustness",
        "GLER: points of accuracy per share of correct labels. Unseen: accuracy in %, no demonstration carries the "
        "gold label; zero-shot: without demonstrations (the paper's Fig. 3). Bias: entropy of the mean answer in % of "
        "a uniform one's, to empty queries and to random words.",
        [
            ("GLER", "GLER", lambda result: result["gler"]),
            ("unseen label", "Unseen", accuracy),
            ("zero-shot", "ZeroShot", accuracy),
            ("contextual bias", "Bias", entropy("contextual")),
            ("domain bias", "Bias", entropy("domain")),
        ],
    )


def _columns_table(
    results: Results, name: str, caption: str, columns: Sequence[tuple[str, str, Value]]
) -> Table | None:
    """Return each method's averages in %; a column is its head, the test and the value in the test's result."""
    table = Table(f"{results.folder.name}-{name}", caption, ["", *(head for head, _, _ in columns)])
    for method in results.methods:
        cells = [results.average(method, value, test=test) for _, test, value in columns]
        if method != "calibration" and any(mean is not None for mean, _ in cells):
            table.rows.append([METHODS[method].title, *(with_error(*cell) for cell in cells)])
    return table if table.rows else None


def _efficiency_table(results: Results) -> Table | None:
    if len(results.sizes) < 2:
        return None
    table = Table(
        f"{results.folder.name}-data-efficiency",
        "Average accuracy in % by the number of training prompts.",
        ["", *(f"{size:,}" for size in results.sizes)],
    )
    for method in results.methods:
        if METHODS[method].trained:
            cells = [results.average(method, accuracy, num_prompts=size) for size in results.sizes]
            table.rows.append([METHODS[method].title, *(with_error(*cell) for cell in cells)])
    return table
