"""Model cards of trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from abft.experiments.methods import METHODS
from abft.experiments.runs import Run
from abft.files import write_text

__all__ = ["write_card"]

_TEXT = """# {title} on {task}

{what} of `{base}`, trained with {title} on {num_prompts} in-context-learning prompts of {source}
(k = {k}, seed {seed}). Attention Behavior Fine-Tuning: [arXiv 2505.14233](https://arxiv.org/abs/2505.14233).

{table}

{steps} optimizer steps in {seconds:.0f} s on {hardware}; A ended at {wrong_penalty}. Load it with

```python
model = abft.from_pretrained("path/to/this/folder", "{base}")
```

Made by `{command}` with abft {version}, {date}.
"""


_WHAT = {"qk": "W_Q and W_K", "qk_head": "W_Q and W_K, and the LM head", "model": "All parameters"}


def write_card(folder: Path, run: Run, base: str) -> None:
    """Write `README.md` with the run's figures into the folder of its weights.

    Args:
        folder: holds the weights.
        run: a finished run of a method that trains.
        base: name of the base model.
    """
    assert run.training is not None
    lora = run.settings["lora"]
    normal = {task: tests["Normal"] for task, tests in run.tests.items() if "Normal" in tests}
    lines = ["| task | accuracy | macro-F1 | likelihood | ECE | prompts |", "|---|---|---|---|---|---|"]
    for task, found in normal.items():
        metrics = (f"{found[name]:.3f}" for name in ("macro_f1", "true_label_likelihood", "ece"))
        lines.append(f"| {task} | {100 * found['accuracy']:.1f} % | {' | '.join(metrics)} | {found['n']} |")
    method = METHODS[run.key.method]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=task,
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(found["accuracy"], 4),
        )
        for task, found in normal.items()
    ]
    name = Path(base).name
    metadata: dict[str, Any] = {
        "base_model": name if Path(base).is_dir() else base,
        "library_name": "peft" if lora else "abft",
        "tags": ["abft", run.key.method],
    }
    if results:
        metadata |= {"model_name": f"{name}-{run.key.folder}", "eval_results": results}
    last = run.training["history"][-1] if run.training["history"] else {}
    penalty = last.get("wrong_penalty")
    text = _TEXT.format(
        title=method.title,
        task=run.key.task,
        source=f"the other tasks than {run.key.task}" if method.other_tasks else run.key.task,
        what=("LoRA adapters on " if lora else "") + _WHAT[method.objective.trains],
        base=name,
        num_prompts=run.key.num_prompts,
        k=run.settings["k"],
        seed=run.key.seed,
        table="\n".join(lines),
        steps=run.training["steps"],
        seconds=run.training["seconds"],
        hardware=run.provenance["versions"].get("gpu", run.provenance["processor"]),
        wrong_penalty="its first value" if penalty is None else f"{penalty:.3g}",
        command=" ".join(run.provenance["command"]),
        version=run.provenance["versions"]["abft"],
        date=run.provenance["date"][:10],
    )
    card = ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{text}")
    write_text(folder / "README.md", str(card))
