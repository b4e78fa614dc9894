"""Draw a verified GPU result, or `cpu_training.json`: `python -m bench.plot FILE --out docs/figures`.

For a GPU result it also prints the table of targets. The colours are Okabe and Ito's, which colour-blind readers can
tell apart; each line also has a marker of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abft.files import save_figure
from bench.gpu.goals import print_verdicts
from bench.result_file import read_result, result_parser
from bench.verify import accepted, problems

__all__ = ["draw", "draw_training", "main"]

# name -> colour, marker
_STYLE = {
    "abft, sparse": ("#000000", "o"), "abft, dense": ("#000000", "v"), "abft": ("#000000", "o"),
    "SDPA flash": ("#0072B2", "s"), "SDPA cuDNN": ("#009E73", "^"), "SDPA efficient": ("#56B4E9", "D"),
    "eager": ("#D55E00", "x"), "FlexAttention, V columns": ("#CC79A7", "P"),
    "FlexAttention, second LSE": ("#E69F00", "*"), "flash-attn 2": ("#F0E442", "h"), "flash-attn 3": ("#999999", "<"),
    "PyTorch": ("#0072B2", "s"), "PyTorch, compiled": ("#009E73", "^"), "abft, no mass": ("#999999", ">"),
}  # fmt: skip
# method -> colour, marker, label
_TRAINING_STYLE = {
    "reference": ("#D55E00", "x", "published shape (eager)"),
    "full": ("#0072B2", "s", "full gradients"),
    "restricted": ("#000000", "o", "restricted gradients"),
    "forward": ("#999999", ">", "forward, no gradient"),
}

Row = dict[str, Any]


def _caption(result: dict[str, Any]) -> str:
    source = result["provenance"]
    versions = ", ".join(f"{name} {source['versions'].get(name)}" for name in ("torch", "triton"))
    return f"{source['gpu']['name']}, {versions}, {source['date'][:10]}, commit {source['commit'][:7]}"


def _figure(caption: str, count: int) -> tuple[Any, Any]:
    """Return a figure with `count` panels side by side, and the panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * count, 4.2), layout="constrained")
    figure.supxlabel(caption, fontsize=8, color="#444444")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _line(axes: Any, points: list[tuple[int, float]], colour: str, marker: str, label: str) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, linewidth=1.4, markersize=5)


def _finish(axes: Any, title: str | None, xlabel: str, ylabel: str, yscale: str = "linear") -> None:
    axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title, fontsize=10)


def _lines(axes: Any, rows: list[Row], value: Callable[[Row], float | None]) -> None:
    """Draw a line for each name in `rows`: `value` of its rows against their length."""
    for name, (colour, marker) in _STYLE.items():
        points = sorted((row["n"], value(row)) for row in rows if row["name"] == name and "reason" not in row)
        if drawn := [(n, y) for n, y in points if y is not None]:
            _line(axes, drawn, colour, marker, name)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    """Write the picture whole or not at all, and return its path."""
    axes[0].legend(fontsize=8)
    save_figure(figure, path, dpi=160, tight=False)
    return path


def draw(result: dict[str, Any], out_dir: Path) -> list[Path]:
    """Write the pictures that the GPU result has data for, and return their paths."""
    suites = {name: suite["rows"] for name, suite in result["suites"].items()}
    pictures: dict[str, tuple[Any, Any]] = {}
    fused = suites.get("kernels", []) + suites.get("flex", [])
    for head_dim in (64, 128):
        pictures[f"gpu-attention-{head_dim}.png"] = _figure(_caption(result), 2)
        rows = [r for r in fused if r.get("head_dim") == head_dim and r.get("kv_heads") != r.get("heads")]
        for ax, way in zip(pictures[f"gpu-attention-{head_dim}.png"][1], ("forward", "backward"), strict=True):
            _lines(ax, rows, lambda row, way=way: row[f"{way}_tflops"])
            title = f"{way}, causal, bf16, head_dim {head_dim}, 5 query heads per KV head"
            _finish(ax, title, "tokens", "TFLOP/s, useful")

    pictures["gpu-rows.png"] = _figure(_caption(result), 1)
    ax = pictures["gpu-rows.png"][1][0]
    rows = suites.get("rows", [])
    plain = {r["n"]: r["both_ms"]["median"] for r in rows if r["name"] == "PyTorch" and "reason" not in r}
    _lines(ax, rows, lambda row: plain[row["n"]] / row["both_ms"]["median"] if row["n"] in plain else None)
    _finish(ax, "mass of one row, forward + backward", "tokens", "times as fast as PyTorch")

    pictures["gpu-memory.png"] = _figure(_caption(result), 1)
    ax = pictures["gpu-memory.png"][1][0]
    _lines(ax, suites.get("memory", []), lambda row: row["both_bytes"] and row["both_bytes"] / 2**20)
    _finish(ax, "forward + backward, beyond inputs and outputs", "tokens", "peak MiB", "log")
    return [
        _save(figure, axes, out_dir / file) for file, (figure, axes) in pictures.items() if any(ax.lines for ax in axes)
    ]


def draw_training(result: dict[str, Any], out_dir: Path) -> Path:
    """Draw peak memory and time of a training step on a CPU by context length; write `cpu-training.png`."""
    source = result["provenance"]
    caption = (
        f"one training step, 4-layer Llama, float32, one CPU thread, torch {source['versions']['torch']}, "
        f"{source['date'][:10]}"
    )
    figure, axes = _figure(caption, 2)
    for ax, key, unit, label in zip(axes, ("bytes", "seconds"), (2**20, 1), ("peak MiB", "seconds"), strict=True):
        for method, (colour, marker, name) in _TRAINING_STYLE.items():
            rows = [r for r in result["rows"] if r["method"] == method and isinstance(r["tokens"], int)]
            _line(ax, [(r["tokens"], r[key]["median"] / unit) for r in rows], colour, marker, name)
        _finish(ax, None, "tokens of the prompt", label, "log")
    return _save(figure, axes, out_dir / "cpu-training.png")


def main(arguments: list[str] | None = None) -> int:
    """Draw the suites that `bench.verify` accepts; return 1 if it refuses the whole file."""
    parser = result_parser("bench.plot", __doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    options, result = read_result(parser, arguments)
    if any(row.get("method") == "restricted" for row in result.get("rows", [])):
        print(f"wrote {draw_training(result, options.out)}")
        return 0
    if found := problems(result, options.allow_dirty):
        print(*found, f"{options.result}: refused", sep="\n")
        return 1
    result = accepted(result)
    for path in draw(result, options.out):
        print(f"wrote {path}")
    print_verdicts(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
