"""`abft analyze`: look into the models of an experiment, and write `analysis.json` for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from abft.analysis.scaled_adapters import ScaledAdapters
from abft.analysis.weight_change import moved, trained_difference
from abft.experiments.analyses import analysis_registry as registry
from abft.experiments.analyses.definition import Analysis, At, Subject
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.experiments.results import Results
from abft.experiments.runs import ANALYSIS, FORMAT_VERSION, read_analysis
from abft.files import write_json
from abft.models.loading import default_device, load_base, load_config, loading_arguments
from abft.provenance import provenance

__all__ = ["ON_DEMAND", "PARTS", "AnalyzeOptions", "analyze"]

PARTS = tuple(row.name for row in registry.ANALYSES)
"""Names of the analyses."""
ON_DEMAND = tuple(row.name for row in registry.ANALYSES if row.on_demand)


@dataclass(kw_only=True)
class AnalyzeOptions:
    """Show what training changed inside the models of an experiment."""

    experiment: str = field(metadata={"help": "folder that `abft experiment` wrote, with its weights kept"})
    parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"some of {', '.join(PARTS)}; default: all but {', '.join(ON_DEMAND)}, or with a 4-bit base "
            "all of these that it allows"
        },
    )
    task: str | None = field(default=None, metadata={"help": "task of the runs to look at; default: the first"})
    seed: int | None = field(default=None, metadata={"help": "training seed of these runs; default: the first"})
    prompts: int = field(default=256, metadata={"help": "test prompts to classify at each point"})
    quiet: bool = field(default=False, metadata={"help": "show no progress bars"})


def analyze(options: AnalyzeOptions, *of_analyses: Any) -> dict[str, Any]:
    """Run the analyses that are not done with these options yet; write `analysis.json` into the experiment.

    An analysis that was made with other options is made anew; those that are not asked for stay as they are.

    Args:
        options: what all analyses share.
        of_analyses: options of single analyses, such as `ConnectivityOptions`; of the others the defaults hold.

    Returns:
        What the file holds: name of the analysis → plain data.

    Raises:
        FileNotFoundError, ValueError: an unknown analysis or task, runs that an analysis needs and that are missing, a
            analysis that a 4-bit base does not allow, options that do not fit. Nothing has been computed then.
    """
    results = Results(options.experiment)
    quantized = results.content["settings"]["load_in_4bit"]
    asked = _asked_for(options, quantized)
    task, seed = _runs_to_look_at(results, options)
    folders = _weights(results, task, seed)
    if quantized:
        folders = {method: folder for method, folder in folders.items() if ScaledAdapters.scalable(folder)}

    given = {type(item): item for item in of_analyses}
    own: dict[str, Any] = {
        row.name: None if row.options is None else given.get(row.options) or row.options() for row in asked
    }
    _check_needs(asked, own, folders, f"{options.experiment} keeps no weights of task {task!r}, seed {seed}")
    chosen = {
        row.name: {
            "task": task,
            "seed": seed,
            **({"prompts": options.prompts} if row.uses_prompts else {}),
            **({} if own[row.name] is None else asdict(own[row.name])),
        }
        for row in asked
    }
    content = read_analysis(results.folder) or {"format_version": FORMAT_VERSION, "options": {}, "parts": {}}
    missing = [row for row in asked if content["options"].get(row.name) != chosen[row.name]]
    if not missing:
        return content["parts"]

    experiment = Experiment(_again(results, _tasks_of(results, task, missing, own), options.quiet))
    _check_options(missing, own, experiment, task)
    subject = _subject(results, experiment, task, folders, options)
    for row in missing:
        content["parts"][row.name] = row.run(subject, own[row.name])
        content["options"][row.name] = chosen[row.name]
        content["provenance"] = provenance()
        write_json(results.folder / ANALYSIS, content)
    return content["parts"]


def _asked_for(options: AnalyzeOptions, quantized: bool) -> list[Analysis]:
    by_name = {row.name: row for row in registry.ANALYSES}
    if unknown := [part for part in options.parts if part not in by_name]:
        raise ValueError(f"unknown part {unknown[0]!r}; known are {', '.join(by_name)}")
    if options.prompts < 1:
        raise ValueError(f"prompts must be 1 or more, got {options.prompts}")
    allowed = {name: row for name, row in by_name.items() if row.quantized or not quantized}
    if refused := [part for part in options.parts if part not in allowed]:
        raise ValueError(
            f"{refused[0]} changes or measures weights that a 4-bit base has rounded; analyse a run in full "
            f"precision, or ask for --parts {' '.join(allowed)}"
        )
    return [allowed[part] for part in options.parts or [name for name, row in allowed.items() if not row.on_demand]]


def _runs_to_look_at(results: Results, options: AnalyzeOptions) -> tuple[str, int]:
    """Return the task and the training seed of the runs."""
    task = options.task or next((run.key.task for run in results.runs if run.training), results.tasks[0])
    if task not in results.tasks:
        raise ValueError(f"the experiment has no task {task!r}; it has {', '.join(results.tasks)}")
    return task, results.content["seeds"][0] if options.seed is None else options.seed


def _weights(results: Results, task: str, seed: int) -> dict[str, Path]:
    """Return the folders of weights that are kept, by method."""
    return {
        method: folder
        for method in results.methods
        for run in results.of(method, task)
        if run.key.seed == seed and (folder := results.folder / "runs" / run.key.folder / "weights").is_dir()
    }


def _check_needs(asked: Sequence[Analysis], own: dict[str, Any], folders: dict[str, Path], no_weights: str) -> None:
    for row in asked:
        if row.needs_weights and not folders:
            raise ValueError(f"{no_weights}; train with them kept")
    for row in asked:
        methods = row.methods(own[row.name])
        if not folders.keys() >= set(methods):
            raise ValueError(
                f"{row.name} needs the weights of the methods {' and '.join(methods)}; train them (on a 4-bit base "
                "without the LM head: e2e_qk in place of e2e)"
            )


def _tasks_of(results: Results, task: str, asked: Sequence[Analysis], own: dict[str, Any]) -> list[str]:
    """Return the tasks whose prompts the analyses need, the one that is looked at first."""
    further = [name for row in asked if row.tasks is not None for name in row.tasks(own[row.name])]
    if unknown := [name for name in further if name not in (*results.tasks, "all")]:
        raise ValueError(f"the experiment has no task {unknown[0]!r}; it has {', '.join(results.tasks)}, or say all")
    return list(dict.fromkeys([task, *(results.tasks if "all" in further else further)]))


def _check_options(asked: Sequence[Analysis], own: dict[str, Any], experiment: Experiment, task: str) -> None:
    config = load_config(experiment.model).get_text_config()
    for row in asked:
        if row.check is not None:
            row.check(experiment.suites[task], config, own[row.name])


def _subject(
    results: Results, experiment: Experiment, task: str, folders: dict[str, Path], options: AnalyzeOptions
) -> Subject:
    """Return the models, loaded, and the prompts that the experiment itself used."""
    settings = results.content["settings"]
    differences: dict[str, Any] = {}
    if settings["load_in_4bit"]:
        model = load_base(experiment.model, dtype=settings["dtype"], load_in_4bit=True)
        at: At = _unmoved
        if folders:
            adapters = ScaledAdapters(model, folders)
            model, at = adapters.model, adapters.at
    else:
        model = load_base(experiment.model, dtype="float32").to(default_device())
        loading = loading_arguments("float32")
        differences = {method: trained_difference(model, folder, **loading) for method, folder in folders.items()}
        at = partial(_moved, model, differences)
    return Subject(
        model=model,
        trained=tuple(folders),
        at=at,
        differences=differences,
        suite=experiment.suites[task],
        suites=experiment.suites,
        k=settings["k"],
        prompts=options.prompts,
        progress=not options.quiet,
    )


def _unmoved(factors: Mapping[str, float]) -> AbstractContextManager[None]:
    return nullcontext()


def _moved(model: Any, differences: Mapping[str, Any], factors: Mapping[str, float]) -> AbstractContextManager[None]:
    return moved(model, [differences[method] for method in factors], list(factors.values()))


def _again(results: Results, tasks: list[str], quiet: bool) -> ExperimentOptions:
    """Return the experiment's own options, reduced to the prompts of the tasks."""
    settings = results.content["settings"]
    known: Sequence[str] = [name for name in settings if name in ExperimentOptions.__dataclass_fields__]
    reduced: dict[str, Any] = {
        "output_dir": str(Path(results.folder)),
        "tasks": tasks,
        "quiet": quiet,
        "methods": ["vanilla"],
        "tests": ["Normal"],
        "num_prompts": results.content["num_prompts"],
        "seeds": results.content["seeds"],
    }
    return ExperimentOptions(**{**{name: settings[name] for name in known}, **reduced})
