"""Labelled examples from JSON Lines, CSV or a Hugging Face ``Dataset``, and their splits."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset

_JSON_LINES = (".jsonl", ".ndjson")
_Rows = Iterator[tuple[str, Mapping[str, Any]]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Example:
    """One text and the index of its class."""

    text: str
    label: int


def load_examples(
    source: str | PathLike[str] | Dataset,
    labels: Sequence[str] | None = None,
    *,
    text_column: str = "text",
    label_column: str = "label",
) -> tuple[list[Example], tuple[str, ...]]:
    """Read labelled examples, in the order of the source.

    A label is a label word or a class index. A string is looked up among the words first and read as an index
    second, an integer is always an index. The class indices of a ``ClassLabel`` feature stand for its names
    if all of these are among ``labels``, and are used unchanged otherwise.

    Args:
        source: path of a ``.jsonl``, ``.ndjson`` or ``.csv`` file (UTF-8; CSV with a header line), or a
            ``datasets.Dataset``.
        labels: label words in class order, as in ``Task.labels``. Default: the names of the dataset's
            ``ClassLabel`` feature, else the distinct words of the label column in sorted order, whatever
            order the rows come in.
        text_column: name of the column or key that holds the text.
        label_column: name of the column or key that holds the label.

    Returns:
        The examples, and the label words in class order.

    Raises:
        FileNotFoundError: no file has that path.
        TypeError: ``source`` is neither a path nor a dataset with rows.
        ValueError: an unknown extension, a row that cannot be parsed, a missing column, an empty text, an
            unknown label, or no row at all; the message names source, line (row for a dataset), value and
            remedy.
    """
    if isinstance(labels, str):
        raise TypeError(f"labels must be a sequence of words, got the string {labels!r}; pass [{labels!r}, ...]")
    class_names: tuple[str, ...] = ()
    if isinstance(source, (str, PathLike)):
        name, rows = str(source), _file_rows(Path(source))
    elif isinstance(getattr(source, "column_names", None), list):
        name, rows = "dataset", ((f"dataset, row {i}", row) for i, row in enumerate(source))
        class_names = tuple(getattr((source.features or {}).get(label_column), "names", ()))
    else:
        raise TypeError(
            f"source must be a path or a datasets.Dataset, got {type(source).__name__}; "
            "of a DatasetDict pass one split, as in dataset['train']"
        )

    texts: list[str] = []
    values: list[tuple[str, str | int]] = []
    for where, row in rows:
        text = _cell(row, text_column, where)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: {text_column!r} is {text!r}; give a non-empty text or drop the row")
        texts.append(text)
        values.append((where, _label_value(_cell(row, label_column, where), where)))
    if not texts:
        raise ValueError(f"{name}: no examples; it needs one row or more with {text_column!r} and {label_column!r}")

    words = tuple(labels) if labels is not None else class_names or _infer_labels(values, name)
    index = {word: i for i, word in enumerate(words)}
    # The integers of a ClassLabel stand for its own names, which may be in another order than `labels`.
    same_words = class_names and set(class_names) <= set(words)
    classes = [index[word] for word in class_names] if same_words else list(range(len(words)))
    return [
        Example(text, _class_index(value, index, classes, where))
        for text, (where, value) in zip(texts, values, strict=True)
    ], words


def split_examples(examples: Sequence[_T], sizes: Mapping[str, int], seed: int) -> dict[str, list[_T]]:
    """Draw disjoint random splits.

    All splits come, in the order of ``sizes``, from one ``random.Random(seed).sample``, whose draws are the same on
    every platform and in every supported version of Python. Each example is used at most once; an example that occurs
    twice in ``examples`` counts as two.

    Args:
        examples: the examples to split.
        sizes: number of examples by the name of the split.
        seed: seed of the draw.

    Raises:
        ValueError: a negative size, or sizes that sum to more than the number of examples.
    """
    negative = {name: size for name, size in sizes.items() if size < 0}
    if negative:
        raise ValueError(f"split sizes must be 0 or more, got {negative}")
    total = sum(sizes.values())
    if total > len(examples):
        raise ValueError(
            f"splits {dict(sizes)} need {total} examples, but there are {len(examples)}; "
            "lower the sizes or supply more examples"
        )
    drawn = iter(random.Random(seed).sample(examples, total))
    return {name: [next(drawn) for _ in range(size)] for name, size in sizes.items()}


def _file_rows(path: Path) -> _Rows:
    suffix = path.suffix.lower()
    if suffix not in (*_JSON_LINES, ".csv"):
        raise ValueError(f"{path}: unknown extension {path.suffix!r}; supply .jsonl, .ndjson or .csv")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path (relative paths start at {Path.cwd()})")
    return _csv_rows(path) if suffix == ".csv" else _json_rows(path)


def _json_rows(path: Path) -> _Rows:
    # Bytes, one line at a time: an encoding error then has a line number too.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}); re-encode the file") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {row!r} is not a JSON object; each line must be one, as in {{...}}")
            yield where, row


def _csv_rows(path: Path) -> _Rows:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise ValueError(f"{where}: more fields than the header has columns; quote fields with commas")
                yield where, row
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: not UTF-8 ({error}); re-encode the file"
            ) from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error}); check the quotes") from error


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    if row.get(column) is None:
        present = ", ".join(repr(key) for key, value in row.items() if value is not None)
        raise ValueError(
            f"{where}: no value for {column!r}, only for {present or 'no column'}; "
            "name the columns with text_column and label_column"
        )
    return row[column]


def _label_value(value: Any, where: str) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ValueError(f"{where}: label {value!r} is neither a label word nor a class index")


def _infer_labels(values: Sequence[tuple[str, str | int]], name: str) -> tuple[str, ...]:
    words = set()
    for where, value in values:
        if isinstance(value, int) or value.isdecimal():
            raise ValueError(
                f"{where}: label {value!r} is a class index, and {name} does not say for which word; pass labels"
            )
        words.add(value)
    return tuple(sorted(words))


def _class_index(value: str | int, index: Mapping[str, int], classes: Sequence[int], where: str) -> int:
    if isinstance(value, str) and value in index:
        return index[value]
    number = int(value) if isinstance(value, int) or value.isdecimal() else -1
    if 0 <= number < len(classes):
        return classes[number]
    raise ValueError(
        f"{where}: unknown label {value!r}; expected one of {', '.join(map(repr, index))}, "
        f"or an index from 0 to {len(classes) - 1}"
    )
