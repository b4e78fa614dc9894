"""StaICC's tasks: splits and draws of demonstrations by its generator, and its data where the package is installed.

StaICC (Cho et al., arXiv 2501.15708; the extra `abft[staicc]`, 0.1.1) fixes for each task the examples to train on, the
demonstrations, the queries, and the demonstrations of each query. All of that follows from one linear congruential
generator, so that the prompts made here are its prompts. Only data files of the package are read: its pickles, by an
unpickler that makes nothing but lists, tuples, strings and integers, and the literals of its template variants. None of
its code runs.
"""

from __future__ import annotations

import ast
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from abft.prompts.examples import Example, load_examples
from abft.prompts.tasks import TASKS, Task, Template, get_task

__all__ = [
    "StaICCRandom",
    "TaskData",
    "load_task_data",
    "split_task",
    "staicc_order",
    "staicc_task",
    "staicc_task_data",
    "template_variants",
]

SEED = 42
TRAIN, DEMONSTRATIONS, QUERIES = 1024, 4096, 512
# Smaller pools of demonstrations, for two tasks with too few texts.
_DEMONSTRATIONS = {"FP": 512, "TEE": 3192}
LONGEST_TEXT = 1024
"""Characters; StaICC omits longer texts."""

# Each task's data file and loader class in the package.
_FILES = {
    "SST2": ("sst2", "glue_sst2"), "MR": ("rotten_tomatoes", "rotten_tomatoes"),
    "FP": ("financial_phrasebank", "financial_phrasebank"), "SST5": ("sst5", "sst5"), "TREC": ("trec", "trec"),
    "AGNews": ("agnews", "agnews"), "SUBJ": ("subjective", "subjective"),
    "TEE": ("tweet_eval_emotion", "tweet_eval_emotion"), "TEH": ("tweet_eval_hate", "tweet_eval_hate"),
    "HS18": ("hate_speech_18", "hate_speech_18"),
}  # fmt: skip
# Rows of the orthogonal array L9(3⁴): instruction, text prefix, label prefix, separator.
_L9 = ((0, 0, 0, 0), (0, 1, 1, 1), (0, 2, 2, 2), (1, 0, 1, 2), (1, 1, 2, 0), (1, 2, 0, 1), (2, 0, 2, 1), (2, 1, 0, 2),
       (2, 2, 1, 0))  # fmt: skip
_INSTALL = "pip install 'abft[staicc]'"
_T = TypeVar("_T")


class StaICCRandom:
    """StaICC's generator, x ← (1664525·x + 1013904223) mod 2³², and its draws."""

    def __init__(self, seed: int = SEED) -> None:
        self._state = seed

    def random(self) -> float:
        """Return the next number in [0, 1)."""
        self._state = (1664525 * self._state + 1013904223) % 2**32
        return self._state / 2**32

    def between(self, start: int, end: int) -> int:
        """Return an integer in [start, end)."""
        return int(start + (end - start) * self.random())

    def sample(self, items: Sequence[_T], n: int) -> list[_T]:
        """Draw n items without replacement.

        Raises:
            ValueError: n is more than the number of items.
        """
        if n > len(items):
            raise ValueError(f"cannot draw {n} of {len(items)} without replacement")
        left = list(items)
        return [left.pop(int(self.random() * len(left))) for _ in range(n)]


@dataclass(frozen=True)
class TaskData:
    """A task with its three disjoint splits.

    Args:
        task: label words and template.
        train: examples from which training draws queries and demonstrations (StaICC: calibration set).
        demonstrations: examples from which test prompts draw demonstrations.
        queries: the queries of test prompts.
    """

    task: Task
    train: list[Example]
    demonstrations: list[Example]
    queries: list[Example]

    def draws(self, k: int, n: int) -> list[list[int]]:
        """Return indices of k demonstrations for each of n prompts, by StaICC's generator from its seed.

        Raises:
            ValueError: k is below 0, or more than the number of demonstrations.
        """
        if not 0 <= k <= len(self.demonstrations):
            raise ValueError(f"k={k}, but task {self.task.name} has {len(self.demonstrations)} demonstrations; lower k")
        generator, indices = StaICCRandom(), range(len(self.demonstrations))
        return [generator.sample(indices, k) for _ in range(n)]


def split_task(task: Task, examples: Sequence[Example], sizes: tuple[int, int, int] | None = None) -> TaskData:
    """Split examples into train, demonstrations and queries as StaICC does.

    Args:
        task: the task of the examples.
        examples: in StaICC's order to get its splits (its own files have it; for others see :func:`staicc_order`).
        sizes: sizes of the splits. None for StaICC's: 1,024, 4,096 (FP 512, TEE 3,192) and 512.

    Raises:
        ValueError: the sizes sum to more than the number of examples.
    """
    train, demonstrations, queries = sizes or (TRAIN, _DEMONSTRATIONS.get(task.name, DEMONSTRATIONS), QUERIES)
    total = train + demonstrations + queries
    if total > len(examples):
        raise ValueError(
            f"task {task.name}: {train} + {demonstrations} + {queries} examples for training, demonstrations and "
            f"queries are wanted, but there are {len(examples)}; give smaller split sizes or more examples"
        )
    drawn = StaICCRandom().sample(examples, total)
    return TaskData(task, drawn[:train], drawn[train : train + demonstrations], drawn[train + demonstrations :])


def staicc_order(examples: Sequence[Example]) -> list[Example]:
    """Return a data set as published in the order of StaICC's files: without long texts, shuffled."""
    short = [example for example in examples if len(example.text) <= LONGEST_TEXT]
    return StaICCRandom().sample(short, len(short))


def staicc_task(name_or_index: str | int) -> Task:
    """Return the task with StaICC 0.1.1's own label words, which differ for SUBJ: "false" and "true"."""
    task = get_task(name_or_index)
    return replace(task, labels=("false", "true")) if task.name == "SUBJ" else task


def staicc_task_data(task: str | int | Task) -> TaskData:
    """Return a task's data from the installed StaICC package.

    Args:
        task: name or index; or a task with a name of StaICC's and other label words or another template.

    Raises:
        ValueError: unknown task; StaICC is not installed, or its file holds anything but texts and class indices.
    """
    task = task if isinstance(task, Task) else get_task(task)
    if task.name not in _FILES:
        raise ValueError(f"StaICC has no task {task.name!r}; it has {', '.join(_FILES)}")
    return split_task(task, read_pickle(_package_file(f"cached_dataset/{_FILES[task.name][0]}.dataset"), task))


def load_task_data(
    name_or_index: str, folder: str | Path, *, sizes: tuple[int, int, int] | None = None, shuffle: bool = False
) -> TaskData:
    """Return a task's data from the user's file: `folder/NAME.jsonl` or `.csv`, with columns text and label.

    A task of StaICC's has its label words and template; any other task has the file's labels and the default template.

    Args:
        name_or_index: name or index of the task.
        folder: the folder of the file.
        sizes: as for :func:`split_task`. None with too few examples for StaICC's sizes: a quarter for training, half
            for demonstrations, a quarter for queries.
        shuffle: bring the file, a data set as published, into StaICC's order first.

    Raises:
        ValueError: no such file, or one that cannot be read.
    """
    by_name = {str(key).lower(): task for task in TASKS for key in (task.name, task.index)}
    known = by_name.get(str(name_or_index).lower())
    name = known.name if known else str(name_or_index)
    candidates = [Path(folder) / f"{name}{suffix}" for suffix in (".jsonl", ".ndjson", ".csv")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ValueError(
            f"no data for task {name!r}: none of {', '.join(map(str, candidates))} exists"
            + ("" if known else f"; built-in tasks are {', '.join(task.name for task in TASKS)}")
        )
    examples, labels = load_examples(path, known.labels if known else None)
    task = known or Task(name, labels, Template())
    if shuffle:
        examples = staicc_order(examples)
    if sizes is None and len(examples) < TRAIN + _DEMONSTRATIONS.get(name, DEMONSTRATIONS) + QUERIES:
        quarter = len(examples) // 4
        sizes = (quarter, len(examples) - 2 * quarter, quarter)
    return split_task(task, examples, sizes)


def template_variants(task: Task) -> list[Template]:
    """Return the nine templates of the template-sensitivity test: rows of the orthogonal array L9(3⁴) over four parts.

    The instructions and prefixes are StaICC's if it is installed and has a task of that name, else general ones.
    """
    own = task.template
    alternatives = _staicc_alternatives(task.name) if task.name in _FILES and _installed() else None
    if alternatives is None:
        what = own.label_prefix.rstrip(": ")
        alternatives = (
            ("", f"Read each text and name its {what}. ", f"Decide on the {what} as in the examples. "),
            (own.text_prefix, "input:", "passage:"),
            (own.label_prefix, "label:", "answer:"),
            (own.separator, " ", "\t"),
        )
    instructions, text_prefixes, label_prefixes, separators = alternatives
    return [Template(text_prefixes[t], label_prefixes[label], separators[s], instructions[i]) for i, t, label, s in _L9]


def read_pickle(path: Path, task: Task) -> list[Example]:
    """Read the examples of one of StaICC's data files, a list of ([text], class index).

    Raises:
        ValueError: the file is no pickle, or holds anything else; no code in it is run.
    """
    try:
        rows = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError, MemoryError) as error:
        raise ValueError(
            f"{path} is not one of StaICC's data files ({error}); reinstall it: {_INSTALL} --force-reinstall"
        ) from error
    examples = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not _is_row(row, len(task.labels)):
            raise ValueError(f"{path}, row {number}: {str(row)[:80]!r} is not ([text], class index) of {task.name}")
        examples.append(Example(row[0][0], row[1]))
    return examples


def _is_row(row: Any, classes: int) -> bool:
    return (
        isinstance(row, tuple)
        and len(row) == 2
        and isinstance(row[0], list)
        and len(row[0]) == 1
        and isinstance(row[0][0], str)
        and type(row[1]) is int
        and 0 <= row[1] < classes
    )


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of plain data: refuses a pickle that names a class or function before looking it up."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and data files hold plain data only")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object outside the file, {pid!r}")


def _installed() -> bool:
    try:
        metadata.distribution("StaICC")
    except metadata.PackageNotFoundError:
        return False
    return True


def _package_file(name: str) -> Path:
    if not _installed():
        raise ValueError(f"this needs the data of StaICC, which is not installed: {_INSTALL}; or give your own files")
    path = Path(str(metadata.distribution("StaICC").locate_file(f"StaICC/{name}")))
    if not path.is_file():
        raise ValueError(f"the installed StaICC has no {name}; this release reads version 0.1.1: {_INSTALL}")
    return path


@lru_cache
def _staicc_alternatives(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the instructions, text prefixes, label prefixes and separators that StaICC's loader of the task lists."""
    path = _package_file("util/hgf_dataset_loader.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loader = _FILES[name][1]
    bodies = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == loader]
    for node in (inner for body in bodies for inner in ast.walk(body)):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and target.attr == "alternate_template" for target in node.targets
        ):
            found = ast.literal_eval(node.value)
            return (
                tuple(found["instruction"]),
                tuple(prefixes[0].strip() for prefixes in found["input_text_prefixes"]),
                tuple(prefix.strip() for prefix in found["label_prefix"]),
                tuple(found["label_affix"]),
            )
    raise ValueError(f"{path} lists no template variants of {loader}; this release reads StaICC 0.1.1: {_INSTALL}")
