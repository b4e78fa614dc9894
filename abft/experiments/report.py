"""`abft report`: experiments as one HTML file, and their tables as Markdown and LaTeX, in the paper's layout."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from abft.evaluation.metrics import paired_bootstrap
from abft.evaluation.suites import correct_by_query
from abft.experiments.figures import all_figures, analysis_figures
from abft.experiments.methods import METHODS
from abft.experiments.results import Claim, Results, Value, accuracy, paper_averages
from abft.experiments.runs import Run, read_analysis, read_run
from abft.experiments.tables import Table, points, with_error
from abft.files import save_figure, write_text

__all__ = ["compare_runs", "experiment_tables", "overview_table", "write_report"]


@dataclass(frozen=True)
class _Figure:
    name: str
    caption: str
    data: str


@dataclass(frozen=True)
class _Part:
    heading: str
    setup: str
    claims: list[Claim]
    tables: list[Table]
    figures: list[_Figure]
    provenance: str


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    paper: bool = True,
    figures: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Writes the report of one or more experiments.

    Args:
        folders: that `abft experiment` wrote.
        output: the HTML file; the tables go beside it, as `.md`, `.tex` and `.json`.
        paper: set the paper's figures beside those of a model of the same name.
        figures: folder for the figures as PNG; None for in the page only.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: a folder is no experiment, of another version or empty; nothing is written then.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"output must end in .html, got {output}; the tables are written beside it as .md, .tex and .json"
        )
    if not folders:
        raise ValueError("no experiments; give folders that `abft experiment` wrote")
    experiments = [Results(folder) for folder in folders]
    titles = _titles(experiments)
    overview = overview_table(experiments, paper=paper)
    parts = [_part(results, title) for results, title in zip(experiments, titles, strict=True)]
    loader = jinja2.PackageLoader("abft.experiments")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    names = ", ".join(dict.fromkeys(_name(results) for results in experiments))
    html = environment.get_template("report.html.jinja").render(
        title=f"Attention Behavior Fine-Tuning: {names}",
        lead="In-context accuracy of label words, before and after training W_Q and W_K (arXiv 2505.14233).",
        overview=[overview], parts=parts,
    )  # fmt: skip
    tables = [overview, *(table for part in parts for table in part.tables)]
    pictures = {} if figures is None else _write_figures(experiments, Path(figures))
    contents = {
        output: html,
        output.with_suffix(".md"): _markdown(overview, parts, pictures, output.parent),
        output.with_suffix(".tex"): "\n".join(table.latex() for table in tables),
    }
    data = {
        "tables": [{"name": t.name, "caption": t.caption, "columns": list(t.columns), "rows": t.rows} for t in tables],
        "experiments": [
            {"model": part.heading, "setup": part.setup, "provenance": json.loads(part.provenance),
             "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in part.claims]}
            for part in parts
        ],
    }  # fmt: skip
    contents[output.with_suffix(".json")] = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    for path, content in contents.items():
        write_text(path, content)
    return [*contents, *(path for paths in pictures.values() for path in paths.values())]


def _titles(experiments: Sequence[Results]) -> list[str]:
    """The models' names, with the folder's where a model has several experiments."""
    names = [_name(results) for results in experiments]
    return [
        f"{name} ({results.folder.name})" if names.count(name) > 1 else name
        for name, results in zip(names, experiments, strict=True)
    ]


def _write_figures(experiments: Sequence[Results], folder: Path) -> dict[int, dict[str, Path]]:
    """Number of the experiment → caption → PNG."""
    written: dict[int, dict[str, Path]] = {}
    for number, results in enumerate(experiments):
        for name, (figure, caption) in _figures(results).items():
            path = folder / f"{results.folder.name}-{name}.png"
            save_figure(figure, path)
            written.setdefault(number, {})[caption] = path
    return written


def _markdown(overview: Table, parts: Sequence[_Part], pictures: dict[int, dict[str, Path]], folder: Path) -> str:
    lines = [overview.markdown()]
    for number, part in enumerate(parts):
        claims = [f"- {claim.text}: **{claim.verdict}**. {claim.evidence}" for claim in part.claims]
        lines += [f"## {part.heading}", "", part.setup, "", *claims, "", *(table.markdown() for table in part.tables)]
        for caption, path in pictures.get(number, {}).items():
            lines += [f"![{caption}]({Path(os.path.relpath(path, folder)).as_posix()})", "", caption, ""]
    return "\n".join(lines)


def _figures(results: Results) -> dict[str, tuple[Figure, str]]:
    analysis = read_analysis(results.folder)
    found = {} if analysis is None else analysis_figures(analysis["parts"])
    return {**all_figures(results), **found}


def _part(results: Results, title: str) -> _Part:
    settings, run = results.content["settings"], results.runs[-1]
    trained = f"{results.largest} training prompts" if results.largest else "nothing trained"
    seeds = len(results.content["seeds"])
    setup = (
        f"k = {settings['k']} demonstrations, {trained}, {seeds} training seed{'s' if seeds > 1 else ''}; data: "
        f"{settings['data']}; {'LoRA' if settings['lora'] else 'W_Q and W_K in full'}"
        + (", 4-bit base" if settings["load_in_4bit"] else "")
        + (f"; at most {settings['limit']} queries per test" if settings["limit"] else "")
    )
    provenance = {"settings": settings, **{name: run.provenance[name] for name in run.provenance}}
    unfinished = len(results.content["runs"]) - len(results.runs)
    if unfinished:
        setup += f". {unfinished} of {len(results.content['runs'])} runs are not finished yet"
    analysis = read_analysis(results.folder)
    if analysis is not None:
        provenance["analysis"] = analysis["options"]
    return _Part(
        heading=title, setup=setup + ".", claims=results.claims(), tables=experiment_tables(results, analysis),
        figures=[_Figure(name, caption, _svg(figure)) for name, (figure, caption) in _figures(results).items()],
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False),
    )  # fmt: skip


def _name(results: Results) -> str:
    return Path(results.model).name


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "abft"}):  # looks alike everywhere; the same bytes twice
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def overview_table(experiments: Sequence[Results], *, paper: bool = True) -> Table:
    """Accuracy of every model and method by task: the paper's Table 1, whose averages stand beside its models'."""
    tasks = list(dict.fromkeys(task for results in experiments for task in results.tasks))
    known = [paper_averages(results.model) if paper else None for results in experiments]
    columns = ["", *tasks, "average", *(["paper's average"] if any(known) else [])]
    table = Table("accuracy-by-task", "", columns)
    for results, title, published in zip(experiments, _titles(experiments), known, strict=True):
        first = len(table.rows)
        means: list[list[float | None]] = []
        for method in results.methods:
            cells = [
                results.summary(method, task, accuracy) if task in results.tasks else (None, None) for task in tasks
            ]
            cells.append(results.average(method, accuracy))
            row = [f"{title}, {METHODS[method].title}", *(with_error(*cell) for cell in cells)]
            if any(known):
                beside = dict(zip(("vanilla", "abft"), published or (), strict=False)).get(method)
                row.append("" if beside is None else f"{beside:.2f}")
            table.rows.append(row)
            means.append([mean for mean, _ in cells])
        for column, values in enumerate(zip(*means, strict=True), 1):
            block = Table("", "", (), table.rows[first:])
            block.mark_best(column, list(values))
            table.bold |= {(first + row, where) for row, where in block.bold}
    n = max(
        (tests[name]["n"] for results in experiments for run in results.runs for tests in run.tests.values()
         for name in ("Normal",) if name in tests), default=0,
    )  # fmt: skip
    table.caption = f"Accuracy in %, mean ± standard error over training seeds, up to {n:,} test prompts a task."
    if any(known):
        table.caption += " Paper's average: arXiv 2505.14233, Table 1, over its eight data sets."
    return table


def experiment_tables(results: Results, analysis: dict[str, Any] | None = None) -> list[Table]:
    """Every other table that the runs, and what `abft analyze` wrote, have data for."""
    makers: list[Callable[[Results], Table | None]] = [
        _metrics_table, _comparison_table, _transfer_table, _consistency_table, _robustness_table, _efficiency_table,
    ]  # fmt: skip
    tables = [table for make in makers if (table := make(results)) is not None]
    if analysis is not None and "momentum" in analysis["parts"]:
        tables.append(_momentum_table(results, analysis["parts"]["momentum"]))
    return tables


def _metrics_table(results: Results) -> Table | None:
    names = {"macro_f1": "macro-F1", "true_label_likelihood": "likelihood", "ece": "ECE"}
    table = Table(
        f"{results.folder.name}-metrics",
        f"{_name(results)}: means over tasks ± standard error over seeds. Likelihood: mean probability of the gold "
        "label among the label words; ECE: expected calibration error, lower is better; KL: of the mean prediction "
        "from the labels' frequencies, in nats.",
        ["", "accuracy", *names.values(), "KL"],
    )  # fmt: skip
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
    )  # fmt: skip
    for task in (*results.tasks, None):
        found = [results.compare("vanilla", method, task) for method in results.methods if method != "vanilla"]
        if any(found):
            table.rows.append([
                task or "all",
                *("" if c is None else f"{points(c.difference)} [{points(c.low)}, {points(c.high)}]"
                  + ("*" if c.p_value < 0.05 else "") for c in found),
            ])  # fmt: skip
    return table if table.rows else None


def _transfer_table(results: Results) -> Table | None:
    trained = [name for name in results.methods if METHODS[name].trained]
    if not trained:
        return None
    table = Table(
        f"{results.folder.name}-transfer",
        f"Training on {results.largest} prompts: time and peak memory of one run, accuracy on the task trained on, and "
        "on the others (vanilla: untrained, the same average). The paper's Table 2. Memory on a CPU: the process's.",
        ["", "seconds", "× ABFT", "GiB", "in domain", "out of domain"],
    )  # fmt: skip
    reference, _ = results.seconds("abft")
    for method in ("vanilla", *trained):
        seconds, error = results.seconds(method)
        memory = [
            run.training["peak_memory_bytes"] / 2**30
            for task in results.tasks
            for run in results.of(method, task)
            if run.training
        ]
        away = results.average(method, accuracy) if method == "vanilla" else results.out_of_domain(method)
        table.rows.append([
            METHODS[method].title, with_error(seconds, error, 1, 1.0),
            "" if not seconds or not reference else f"{seconds / reference:.2f}",
            f"{max(memory):.2f}" if memory else "", with_error(*results.average(method, accuracy)), with_error(*away),
        ])  # fmt: skip
    return table


def _consistency_table(results: Results) -> Table | None:
    return _columns_table(
        results, "consistency",
        "Consistency in %: share of the variants of a prompt that give the most frequent answer, mean over queries and "
        "tasks; and the mean accuracy over the variants.",
        [
            ("9 templates", "TempSensitivity", lambda result: result["consistency"]),
            ("accuracy", "TempSensitivity", lambda result: result["accuracy_mean"]),
            ("8 draws of demonstrations", "DemoSensitivity", lambda result: result["consistency"]),
            ("accuracy", "DemoSensitivity", lambda result: result["accuracy_mean"]),
        ],
    )  # fmt: skip


def _robustness_table(results: Results) -> Table | None:
    def entropy(kind: str) -> Value:
        return lambda result: result[kind]["entropy"] / math.log(len(result[kind]["distribution"]))

    return _columns_table(
        results, "robustness",
        "GLER: points of accuracy per share of correct labels. Unseen: accuracy in %, no demonstration carries the "
        "gold label. Bias: entropy of the mean answer in % of a uniform one's, to empty queries and to random words.",
        [
            ("GLER", "GLER", lambda result: result["gler"]),
            ("unseen label", "Unseen", accuracy),
            ("contextual bias", "Bias", entropy("contextual")),
            ("domain bias", "Bias", entropy("domain")),
        ],
    )  # fmt: skip


def _columns_table(
    results: Results, name: str, caption: str, columns: Sequence[tuple[str, str, Value]]
) -> Table | None:
    """Of each method the averages of some values in %: column head, test, and the value in its result."""
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
        f"{results.folder.name}-data-efficiency", "Average accuracy in % by the number of training prompts.",
        ["", *(f"{size:,}" for size in results.sizes)],
    )  # fmt: skip
    for method in results.methods:
        if METHODS[method].trained:
            cells = [results.average(method, accuracy, num_prompts=size) for size in results.sizes]
            table.rows.append([METHODS[method].title, *(with_error(*cell) for cell in cells)])
    return table


def _momentum_table(results: Results, found: dict[str, Any]) -> Table:
    return Table(
        f"{results.folder.name}-momentum",
        f"Momentum attention (arXiv 2212.10559) in the untrained model: accuracy in %, {found['n']} prompts.",
        ["", "plain", *(f"η = {gain['eta']:g}" for gain in found["gains"])],
        [
            [
                "accuracy",
                *(f"{100 * value:.1f}" for value in (found["plain"], *(g["accuracy"] for g in found["gains"]))),
            ],
            ["gain", "", *(points(gain["gain"]) for gain in found["gains"])],
        ],
    )


def compare_runs(before: str | os.PathLike[str], after: str | os.PathLike[str], test: str = "Normal") -> Table:
    """Two runs on the same prompts, task by task.

    Args:
        before, after: folders that hold a `run.json`.
        test: a test with predictions: Normal, Unseen or Calibration.

    Raises:
        ValueError: a folder without a run, no common task, or other prompts.
    """
    runs: list[Run] = []
    for folder in (before, after):
        run = read_run(folder)
        if run is None:
            raise ValueError(f"{folder} holds no run.json; give a folder under runs/ of an experiment")
        runs.append(run)
    for name in ("k", "data", "limit", "staicc_compat", "staicc_labels", "published_order"):
        values = [run.settings.get(name) for run in runs]
        if values[0] != values[1]:
            raise ValueError(f"the runs have different prompts: {name} is {values[0]!r} and {values[1]!r}")
    names = [f"{Path(run.settings['model']).name}, {METHODS[run.key.method].title}" for run in runs]
    table = Table(
        "comparison", f"{test}: {names[0]} against {names[1]}; difference in points with its 95 % interval (paired "
        "bootstrap over queries), p by the sign-flip test.",
        ["task", "before", "after", "difference", "95 % interval", "p"],
    )  # fmt: skip
    for task in runs[0].tests:
        results = [run.tests.get(task, {}).get(test) for run in runs]
        if any(result is None or "predictions" not in result for result in results):
            continue
        correct = [correct_by_query(result) for result in results if result is not None]
        if results[0]["labels"] != results[1]["labels"]:  # type: ignore[index]
            raise ValueError(f"task {task}: the runs were tested on different queries")
        found = paired_bootstrap(*correct)
        table.rows.append([
            task, *(f"{100 * sum(values) / len(values):.1f}" for values in correct), points(found.difference),
            f"{points(found.low)} to {points(found.high)}", f"{found.p_value:.3g}",
        ])  # fmt: skip
    if not table.rows:
        raise ValueError(f"the runs have no task in common that has the test {test}")
    return table
