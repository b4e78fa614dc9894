"""Experiments of made-up runs, whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from abft.experiments.methods import METHODS
from abft.experiments.runs import FORMAT_VERSION, Run, RunKey
from abft.files import write_json


def made(tmp_path, accuracies, *, methods=None, model="demo", **extra) -> Path:
    """An experiment with runs of 100 prompts; `accuracies[method][task]` is a list over seeds, of shares.

    Keys (task, other) are the accuracy on another task after training on one.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    settings = {"model": model, "k": 4, "data": "demo", "lora": False, "load_in_4bit": False, "limit": None}
    tasks = [task for task in next(iter(accuracies.values())) if isinstance(task, str)]
    keys = []

    def normal(accuracy):
        predictions = [0 if order[i] < round(100 * accuracy) else 1 for i in range(100)]
        return {"n": 100, "accuracy": accuracy, "macro_f1": accuracy, "true_label_likelihood": accuracy, "ece": 0.1,
                "predictions": predictions, "labels": [0] * 100, "posterior_bias": {"kl": 0.1}}  # fmt: skip

    for method, by_task in accuracies.items():
        for task in tasks:
            for seed, accuracy in enumerate(by_task[task]):
                trained = METHODS[method].trained
                key = RunKey(method, task, 512 if trained else 0, seed if trained else 0)
                tests = {task: {"Normal": normal(accuracy), **extra.get(method, {})}}
                for pair, values in by_task.items():
                    if isinstance(pair, tuple) and pair[0] == task:
                        tests[pair[1]] = {"Normal": normal(values[seed])}
                seconds = {"abft": 10.0, "e2e": 25.0}.get(method, 10.0)
                training = {
                    "seconds": seconds,
                    "checkpoint_seconds": 1.0,
                    "trained_parameters": {"abft": 1000, "e2e": 12345}.get(method, 1000),
                    "steps": 32,
                    "peak_memory_bytes": 2**30,
                    "resumed": False,
                    "history": [],
                }
                run = Run(key, settings, tests, training if trained else None, {"date": "2026-01-01"})
                run.write(tmp_path / "runs" / key.folder)
                keys.append(vars(key))
    seeds = list(range(max(len(values) for by_task in accuracies.values() for values in by_task.values())))
    write_json(
        tmp_path / "experiment.json",
        {
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "tasks": tasks,
            "methods": list(accuracies),
            "seeds": seeds,
            "num_prompts": [512],
            "tests": ["Normal"],
            "runs": keys,
        },
    )
    return tmp_path


GOOD = {
    "vanilla": {"a": [0.5], "b": [0.6]},
    "abft": {"a": [0.7, 0.8], "b": [0.8, 0.8], ("a", "b"): [0.62, 0.62], ("b", "a"): [0.5, 0.52]},
    "e2e": {"a": [0.74, 0.76], "b": [0.82, 0.82], ("a", "b"): [0.5, 0.5], ("b", "a"): [0.4, 0.4]},
}
