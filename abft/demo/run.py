"""`abft demo`: the built-in model before and after ABFT and its E2E baseline, over several training seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from abft.demo.corpus import DEMO_K, DEMO_TASK, demo_splits
from abft.evaluation.classification import evaluate
from abft.evaluation.label_attention import HeadStatistics, head_statistics
from abft.files import save_figure, write_json
from abft.models.loading import load_base, load_tokenizer
from abft.plots import accuracy_figure, head_figure, metrics_table, training_figure
from abft.prompts.builder import PromptBuilder, PromptSet, sample_prompts
from abft.provenance import versions
from abft.training.config import ABFTConfig
from abft.training.fit import fit

__all__ = ["MODEL", "DemoSettings", "run_demo"]

MODEL = Path(__file__).parent / "model"
_METHODS = ("abft", "e2e")


@dataclass(frozen=True)
class DemoSettings:
    """The settings that results depend on besides the seed; results of other settings are refused."""

    learning_rate: float = 5e-4
    train_prompts: int = 512
    test_prompts: int = 512
    k: int = DEMO_K
    batch_size: int = 32


@dataclass(frozen=True)
class _Seed:
    """One seed's draw: training prompts and the demonstrations of the test prompts."""

    builder: PromptBuilder
    train: PromptSet
    test: PromptSet
    folder: Path


def _load_model() -> Any:
    return load_base(str(MODEL), dtype="float32")


def _measure(model: Any, draw: _Seed, settings: DemoSettings, progress: bool) -> dict[str, Any]:
    shared: dict[str, Any] = {"batch_size": settings.batch_size, "progress": progress}
    metrics = evaluate(model, draw.test, **shared).to_dict()
    return {**metrics, **head_statistics(model, draw.test, **shared).to_dict()}


def _train(method: str, seed: int, draw: _Seed, settings: DemoSettings, progress: bool) -> dict[str, Any]:
    config = ABFTConfig(
        output_dir=str(draw.folder / method),
        method=method,
        learning_rate=settings.learning_rate,
        seed=seed,
        per_device_train_batch_size=settings.batch_size,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    label = f"seed {seed}: {method.upper()}"
    done = fit(_load_model(), config, draw.train, label=label, progress=progress, save_to=config.output_dir)
    return {**_measure(done.trainer.model, draw, settings, progress), "history": done.history}


def _stored(path: Path, settings: DemoSettings) -> dict[str, Any] | None:
    """Return an earlier result of the same settings; refuse one of others, so that no table mixes them."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != asdict(settings):
        raise ValueError(f"{path} was made with other settings ({result['settings']}); choose another --output")
    return result


def _heads(result: dict[str, Any]) -> HeadStatistics:
    tensors = {name: torch.tensor(result[name]) for name in ("induction_rate", "mass_correct", "mass_wrong")}
    return HeadStatistics(**tensors, induction_heads=result["induction_heads"])


def run_demo(output: Path, seeds: Sequence[int], *, settings: DemoSettings | None = None, progress: bool = True) -> int:
    """Train and evaluate; write `results.json` and figures to `output`, and print the table.

    Every seed draws its own training prompts, order, and demonstrations of the test prompts. What `output` already
    holds is kept, so an interrupted demo resumes.

    Args:
        output: folder, made if absent.
        seeds: at least one.
        settings: None for the defaults.
        progress: show progress bars.

    Raises:
        ValueError: no seeds, or `output` holds results of other settings.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be one or more different integers, got {list(seeds)}")
    settings = settings or DemoSettings()
    console = Console()
    builder = PromptBuilder(load_tokenizer(str(MODEL)), DEMO_TASK)
    splits = demo_splits(train=settings.train_prompts, test=settings.test_prompts)
    results: dict[str, dict[int, dict[str, Any]]] = {"vanilla": {}, **{method: {} for method in _METHODS}}
    for seed in seeds:
        draw = _Seed(
            builder,
            sample_prompts(builder, splits.train, splits.demonstrations, settings.k, seed),
            sample_prompts(builder, splits.test, splits.demonstrations, settings.k, 10_000 + seed),
            output / f"seed-{seed}",
        )
        for name, of_seed in results.items():
            path = draw.folder / f"{name}.json"
            found = _stored(path, settings)
            if found is None:
                measured = (
                    _measure(_load_model(), draw, settings, progress)
                    if name == "vanilla"
                    else _train(name, seed, draw, settings, progress)
                )
                found = {**measured, "settings": asdict(settings)}
                write_json(path, found)
            of_seed[seed] = found
            console.print(f"seed {seed}  {name:<8}accuracy {found['accuracy']:.1%}")

    summary = _summarize(results, seeds, settings)
    write_json(output / "results.json", summary)
    figures = _figures(summary, results, seeds[0], settings)
    for name, figure in figures.items():
        save_figure(figure, output / name)
    _print(console, summary, settings)
    console.print(f"written: {output}/results.json, {', '.join(figures)}")
    return 0


def _summarize(
    results: Mapping[str, Mapping[int, dict[str, Any]]], seeds: Sequence[int], settings: DemoSettings
) -> dict[str, Any]:
    """Return the content of `results.json`."""
    summary: dict[str, Any] = {"task": DEMO_TASK.name, "settings": asdict(settings), "seeds": list(seeds)}
    for name, of_seed in results.items():
        accuracy = [of_seed[seed]["accuracy"] for seed in seeds]
        scalars = [key for key, value in of_seed[seeds[0]].items() if isinstance(value, float) and key != "accuracy"]
        summary[name] = {
            "accuracy": {str(seed): value for seed, value in zip(seeds, accuracy, strict=True)},
            "accuracy_mean": statistics.fmean(accuracy),
            "accuracy_std": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
            **{key: statistics.fmean(of_seed[seed][key] for seed in seeds) for key in scalars},
        }
    gains = [results["abft"][seed]["accuracy"] - results["vanilla"][seed]["accuracy"] for seed in seeds]
    summary["abft_gain"] = {"mean": statistics.fmean(gains), "min": min(gains), "max": max(gains)}
    vanilla, abft = (_heads(results[name][seeds[0]]) for name in ("vanilla", "abft"))
    layer, head = vanilla.strongest_head()
    summary["strongest_induction_head"] = {
        "layer": layer,
        "head": head,
        "induction_rate": vanilla.induction_rate[layer, head].item(),
        "correct_share_vanilla": vanilla.correct_share[layer, head].item(),
        "correct_share_abft": abft.correct_share[layer, head].item(),
    }
    return {**summary, "versions": versions()}


def _figures(
    summary: Mapping[str, Any], results: Mapping[str, Mapping[int, dict[str, Any]]], first: int, settings: DemoSettings
) -> dict[str, Figure]:
    """Return the figures by file name; `first` is the seed whose heads and training are drawn."""
    methods = {name.upper(): list(summary[name]["accuracy"].values()) for name in _METHODS}
    heads = (_heads(results["vanilla"][first]), _heads(results["abft"][first]))
    return {
        "accuracy.png": accuracy_figure(summary["vanilla"]["accuracy_mean"], methods, settings.test_prompts),
        "heads.png": head_figure(*heads, ("vanilla", "ABFT")),
        "training.png": training_figure(results["abft"][first]["history"]),
    }


def _print(console: Console, summary: Mapping[str, Any], settings: DemoSettings) -> None:
    rows = {name: {**summary[name], "accuracy": summary[name]["accuracy_mean"]} for name in ("vanilla", *_METHODS)}
    title = f"mean over {len(summary['seeds'])} seeds, {settings.test_prompts} test prompts each"
    console.print(metrics_table(rows, title))
    gain, best = summary["abft_gain"], summary["strongest_induction_head"]
    console.print(
        f"ABFT gains {100 * gain['mean']:.1f} points over vanilla in the mean "
        f"(seeds: {100 * gain['min']:+.1f} to {100 * gain['max']:+.1f})."
    )
    console.print(
        f"Head {best['layer']}.{best['head']} passes the induction-head filter on {best['induction_rate']:.0%} of "
        f"prompts; of its attention on labels {best['correct_share_vanilla']:.0%} → {best['correct_share_abft']:.0%} "
        "goes to correct ones."
    )
