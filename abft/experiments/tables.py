"""A table of text, shown as HTML, Markdown, LaTeX or in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import rich.table

__all__ = ["Table", "points", "with_error"]

_LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "→": r"$\rightarrow$",
    "×": r"$\times$",
    "≤": r"$\le$", "–": "--", "…": r"\dots{}",
})  # fmt: skip


@dataclass
class Table:
    """Rows of text.

    Args:
        name: its id in HTML and its label in LaTeX.
        caption: the content, with the conditions.
        columns: column heads; the first column holds the rows' names.
        rows: as long as `columns`.
        bold: (row, column) of cells to set in bold.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)

    def cells(self) -> list[list[tuple[str, bool]]]:
        """Return the text of each cell and whether it is bold, row by row."""
        return [[(text, (r, c) in self.bold) for c, text in enumerate(row)] for r, row in enumerate(self.rows)]

    def mark_best(self, column: int, values: Sequence[float | None], *, lowest: bool = False) -> None:
        """Set the best value of a column in bold, if the column has two or more values."""
        known = [value for value in values if value is not None]
        if len(known) > 1:
            best = min(known) if lowest else max(known)
            self.bold |= {(row, column) for row, value in enumerate(values) if value == best}

    def markdown(self) -> str:
        """Return the table as Markdown with aligned columns, and the caption below."""
        texts = [[f"**{text}**" if bold else text for text, bold in row] for row in self.cells()]
        widths = [max(map(len, column)) for column in zip_longest(self.columns, *texts, fillvalue="")]
        lines = [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
            for row in ([*self.columns], *texts)
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*lines, "", self.caption, ""])

    def latex(self) -> str:
        """Return a LaTeX `table` with `booktabs` rules."""
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{self.caption.translate(_LATEX)}}}",
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(self.columns) - 1)}}}",
            r"\toprule",
            " & ".join(name.translate(_LATEX) for name in self.columns) + r" \\",
            r"\midrule",
        ]
        for row in self.cells():
            texts = [text.translate(_LATEX) for text, _ in row]
            shown = [rf"\textbf{{{text}}}" if bold else text for text, (_, bold) in zip(texts, row, strict=True)]
            lines.append(" & ".join(shown) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])

    def rich(self) -> rich.table.Table:
        """Return the table for the terminal."""
        table = rich.table.Table(*self.columns, title=self.caption)
        for row in self.cells():
            table.add_row(*(f"[bold]{text}[/bold]" if bold else text for text, bold in row))
        return table


def with_error(mean: float | None, error: float | None, digits: int = 1, factor: float = 100.0) -> str:
    """Return "79.2 ± 0.4", without the error if there is none; "" for no value."""
    if mean is None:
        return ""
    text = f"{factor * mean:.{digits}f}"
    return text if error is None else f"{text} ± {factor * error:.{digits}f}"


def points(difference: float) -> str:
    """Return a difference of shares as signed percentage points, "+3.1"."""
    return f"{100 * difference:+.1f}".replace("-", "−")
