"""`abft report`: experiments as one HTML file, and their tables as Markdown and LaTeX, in the paper's layout."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from abft.experiments.claims import Claim, claims
from abft.experiments.figures import all_figures
from abft.experiments.methods import METHODS
from abft.experiments.report_tables import experiment_tables, model_name, overview_table, titles
from abft.experiments.results import Results
from abft.experiments.runs import read_analysis
from abft.experiments.tables import Table
from abft.files import save_figure, write_text

__all__ = ["write_report"]


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
    """Write the report of one or more experiments.

    Args:
        folders: the experiments' folders, which `abft experiment` wrote.
        output: the HTML file; the tables go beside it, as `.md`, `.tex` and `.json`.
        paper: show the paper's numbers beside those of a model of the same name.
        figures: folder for the figures as PNG; None to write them into the page only.

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
    overview = overview_table(experiments, paper=paper)
    parts = [_part(results, title) for results, title in zip(experiments, titles(experiments), strict=True)]
    tables = [overview, *(table for part in parts for table in part.tables)]
    pictures = {} if figures is None else _write_figures(experiments, Path(figures))
    contents = {
        output: _html(experiments, overview, parts),
        output.with_suffix(".md"): _markdown(overview, parts, pictures, output.parent),
        output.with_suffix(".tex"): "\n".join(table.latex() for table in tables),
        output.with_suffix(".json"): _json(tables, parts),
    }
    for path, content in contents.items():
        write_text(path, content)
    return [*contents, *(path for paths in pictures.values() for path in paths.values())]


def _html(experiments: Sequence[Results], overview: Table, parts: Sequence[_Part]) -> str:
    loader = jinja2.PackageLoader("abft.experiments")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    names = ", ".join(dict.fromkeys(model_name(results) for results in experiments))
    return environment.get_template("report.html.jinja").render(
        title=f"Attention Behavior Fine-Tuning: {names}",
        lead="In-context accuracy of label words, before and after training W_Q and W_K (arXiv 2505.14233).",
        overview=[overview],
        parts=parts,
    )


def _json(tables: Sequence[Table], parts: Sequence[_Part]) -> str:
    data = {
        "tables": [{"name": t.name, "caption": t.caption, "columns": list(t.columns), "rows": t.rows} for t in tables],
        "experiments": [
            {
                "model": part.heading,
                "setup": part.setup,
                "provenance": json.loads(part.provenance),
                "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in part.claims],
            }
            for part in parts
        ],
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _write_figures(experiments: Sequence[Results], folder: Path) -> dict[int, dict[str, Path]]:
    """Write the figures; return number of the experiment → caption → PNG."""
    written: dict[int, dict[str, Path]] = {}
    for number, results in enumerate(experiments):
        for name, (figure, caption) in all_figures(results, read_analysis(results.folder)).items():
            path = folder / f"{results.folder.name}-{name}.png"
            save_figure(figure, path)
            written.setdefault(number, {})[caption] = path
    return written


def _markdown(overview: Table, parts: Sequence[_Part], pictures: dict[int, dict[str, Path]], folder: Path) -> str:
    lines = [overview.markdown()]
    for number, part in enumerate(parts):
        judged = [f"- {claim.text}: **{claim.verdict}**. {claim.evidence}" for claim in part.claims]
        lines += [f"## {part.heading}", "", part.setup, "", *judged, "", *(table.markdown() for table in part.tables)]
        for caption, path in pictures.get(number, {}).items():
            lines += [f"![{caption}]({Path(os.path.relpath(path, folder)).as_posix()})", "", caption, ""]
    return "\n".join(lines)


def _setup(results: Results) -> str:
    """Return one paragraph about the conditions of the experiment."""
    settings = results.content["settings"]
    seeds, runs = len(results.content["seeds"]), len(results.content["runs"])
    unfinished = runs - len(results.runs)
    return (
        f"k = {settings['k']} demonstrations, "
        + (f"{results.largest} training prompts" if results.largest else "nothing trained")
        + f", {seeds} training seed{'s' if seeds > 1 else ''}; data: {settings['data']}; "
        + ("LoRA" if settings["lora"] else "W_Q and W_K in full")
        + (", 4-bit base" if settings["load_in_4bit"] else "")
        + _rates(results)
        + (f"; at most {settings['limit']} queries per test" if settings["limit"] else "")
        + (f". {unfinished} of {runs} runs are not finished yet" if unfinished else "")
        + f".{_fallen_heads(results)}"
    )


def _rates(results: Results) -> str:
    """Return the learning rates by method if they differ; "" if they do not."""
    histories = {METHODS[run.key.method].title: run.training["history"] for run in results.runs if run.training}
    # After a warm-up the last step has the rate.
    rates = {title: entries[-1]["learning_rate"] for title, entries in histories.items() if entries}
    if len(set(rates.values())) < 2:
        return ""
    return f"; learning rates {', '.join(f'{rate:g} ({title})' for title, rate in rates.items())}"


def _fallen_heads(results: Results) -> str:
    """Return a sentence on the runs that lost half of their induction heads; "" if none did."""
    fallen = results.head_losses()
    if not fallen:
        return ""
    runs = ", ".join(f"{name} ({first:.1f} → {last:.1f})" for name, (first, last) in fallen.items())
    return f" Induction heads per prompt fell below half of their first number in: {runs}."


def _part(results: Results, title: str) -> _Part:
    provenance = {"settings": results.content["settings"], **results.runs[-1].provenance}
    analysis = read_analysis(results.folder)
    if analysis is not None:
        provenance["analysis"] = analysis["options"]
    return _Part(
        heading=title,
        setup=_setup(results),
        claims=claims(results),
        tables=experiment_tables(results, analysis),
        figures=[
            _Figure(name, caption, _svg(figure)) for name, (figure, caption) in all_figures(results, analysis).items()
        ],
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False),
    )


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "abft"}):  # looks alike everywhere; the same bytes twice
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
