"""`abft analyze`: the mechanism behind an experiment's numbers, as `analysis.json` that the report draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft.analysis.heads import HeadScores, induction_scores
from abft.analysis.implicit import compare_with_fine_tuning, momentum_gain
from abft.analysis.weight_change import mode_connectivity, moved, qk_difference, weight_distance
from abft.experiments.experiment import Experiment, ExperimentOptions
from abft.experiments.results import Results
from abft.experiments.runs import ANALYSIS, FORMAT_VERSION, read_analysis
from abft.files import write_json
from abft.models.loading import default_device, load_base, loading_arguments
from abft.provenance import provenance

__all__ = ["PARTS", "AnalyzeOptions", "analyze"]

# What each part's result depends on, besides task and seed.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "distance": (), "connectivity": ("prompts", "factors"), "induction": ("tokens",),
    "implicit": ("prompts", "fine_tuning_rate", "fine_tuning_epochs"), "momentum": ("prompts", "etas"),
}  # fmt: skip
PARTS = tuple(_OPTIONS)
"""Parts of an analysis."""


@dataclass(kw_only=True)
class AnalyzeOptions:
    """What training changed inside the models of an experiment."""

    experiment: str = field(metadata={"help": "folder that `abft experiment` wrote, with its weights kept"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"some of {', '.join(PARTS)}"})
    task: str | None = field(default=None, metadata={"help": "task of the runs to look at; default: the first"})
    seed: int | None = field(default=None, metadata={"help": "training seed of these runs; default: the first"})
    prompts: int = field(default=256, metadata={"help": "test prompts to classify at each point"})
    factors: list[float] = field(
        default_factory=lambda: [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25],
        metadata={"help": "of the plane through the untrained model, E2E's and ABFT's"},
    )
    tokens: int = field(default=1024, metadata={"help": "length of the repeated text for induction heads, at most"})
    etas: list[float] = field(
        default_factory=lambda: [0.01, 0.03, 0.1, 0.2], metadata={"help": "factors of momentum attention"}
    )
    fine_tuning_rate: float = field(default=0.01, metadata={"help": "learning rate of fine-tuning on demonstrations"})
    fine_tuning_epochs: int = field(default=1, metadata={"help": "its epochs"})
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})


def analyze(options: AnalyzeOptions) -> dict[str, Any]:
    """Runs the parts that are not done with these options yet, and writes `analysis.json` into the experiment.

    A part that was made with other options is made anew; parts that are not asked for stay as they are.

    Returns:
        What the file holds: part → plain data.

    Raises:
        FileNotFoundError, ValueError: an unknown part or task, runs that the analysis needs and that are missing, a
            4-bit base. Nothing has been computed then.
    """
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if options.prompts < 1:
        raise ValueError(f"prompts must be 1 or more, got {options.prompts}")
    results = Results(options.experiment)
    settings = results.content["settings"]
    task = options.task or next((run.key.task for run in results.runs if run.training), results.tasks[0])
    if task not in results.tasks:
        raise ValueError(f"the experiment has no task {task!r}; it has {', '.join(results.tasks)}")
    seed = results.content["seeds"][0] if options.seed is None else options.seed
    if settings["load_in_4bit"]:
        raise ValueError(
            "the base is quantized to 4 bits, whose weights cannot be moved; analyse a run in full precision"
        )
    folders = {
        method: folder
        for method in results.methods
        for run in results.of(method, task)
        if run.key.seed == seed and (folder := results.folder / "runs" / run.key.folder / "weights").is_dir()
    }
    if {"distance", "connectivity"} & set(options.parts) and not folders:
        raise ValueError(f"{options.experiment} keeps no weights of task {task!r}, seed {seed}; train with them kept")
    if "connectivity" in options.parts and not {"abft", "e2e"} <= folders.keys():
        raise ValueError("connectivity lies between ABFT and E2E: the experiment needs the methods abft and e2e")

    chosen = {
        part: {"task": task, "seed": seed, **{name: getattr(options, name) for name in _OPTIONS[part]}}
        for part in options.parts
    }
    content = read_analysis(results.folder) or {"format_version": FORMAT_VERSION, "options": {}, "parts": {}}
    missing = [part for part in options.parts if content["options"].get(part) != chosen[part]]
    if not missing:
        return content["parts"]

    experiment = Experiment(_again(results, task, options.quiet))
    suite = experiment.suites[task]
    model = load_base(experiment.model, dtype="float32").to(default_device())
    loading = loading_arguments("float32")
    differences = {method: qk_difference(model, folder, **loading) for method, folder in folders.items()}
    progress = not options.quiet
    prompts = suite.normal[: options.prompts]
    for part in missing:
        if part == "distance":
            values: Any = {name: weight_distance(model, change).tolist() for name, change in differences.items()}
        elif part == "connectivity":
            values = mode_connectivity(
                model, differences["e2e"], differences["abft"], prompts, suite.builder, factors=options.factors,
                progress=progress,
            )  # fmt: skip
        elif part == "induction":
            length = min(options.tokens, suite.max_length or options.tokens)
            values = {"tokens": length}
            for name in ("vanilla", *differences):
                change = [differences[name]] if name in differences else []
                with moved(model, change, [1.0] * len(change)):
                    values[name] = HeadScores(induction_scores(model, length=length, progress=progress)).to_dict()
        elif part == "implicit":
            demonstrations = suite.data.demonstrations[: settings["k"]]
            values = compare_with_fine_tuning(
                model, suite.builder, demonstrations, suite.data.queries[: options.prompts],
                learning_rate=options.fine_tuning_rate, epochs=options.fine_tuning_epochs, progress=progress,
            ).to_dict()  # fmt: skip
        else:
            values = momentum_gain(model, prompts, suite.builder, options.etas, progress=progress).to_dict()
        content["parts"][part], content["options"][part] = values, chosen[part]
        content["provenance"] = provenance()
        write_json(results.folder / ANALYSIS, content)
    return content["parts"]


def _again(results: Results, task: str, quiet: bool) -> ExperimentOptions:
    """The experiment's own options, for its prompts."""
    settings = results.content["settings"]
    known: Sequence[str] = [name for name in settings if name in ExperimentOptions.__dataclass_fields__]
    return ExperimentOptions(
        **{name: settings[name] for name in known}, output_dir=str(Path(results.folder)), tasks=[task], quiet=quiet,
        methods=["vanilla"], tests=["Normal"], num_prompts=results.content["num_prompts"],
        seeds=results.content["seeds"],
    )  # fmt: skip
