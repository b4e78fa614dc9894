"""Draws a verified GPU result, or `cpu_training.json`: `python -m bench.plot FILE --out docs/figures`.

Of a GPU result it also prints the table of targets. Colours are Okabe and Ito's, which the colour-blind can tell apart;
each line has a marker of its own too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from abft.files import save_figure
from bench.gpu.goals import print_verdicts
from bench.verify import problems

__all__ = ["draw", "draw_training", "main"]

# name -> colour, marker
_STYLE = {
    "abft, sparse": ("#000000", "o"), "abft, dense": ("#000000", "v"), "abft": ("#000000", "o"),
    "SDPA flash": ("#0072B2", "s"), "SDPA cuDNN": ("#009E73", "^"), "SDPA efficient": ("#56B4E9", "D"),
    "eager": ("#D55E00", "x"), "FlexAttention, V columns": ("#CC79A7", "P"),
    "FlexAttention, second LSE": ("#E69F00", "*"), "flash-attn 2": ("#F0E442", "h"), "flash-attn 3": ("#999999", "<"),
    "PyTorch": ("#0072B2", "s"), "PyTorch, compiled": ("#009E73", "^"), "abft, no mass": ("#999999", ">"),
}  # fmt: skip


def _caption(result: dict[str, Any]) -> str:
    source = result["provenance"]
    versions = ", ".join(f"{name} {source['versions'].get(name)}" for name in ("torch", "triton"))
    return f"{source['gpu']['name']}, {versions}, {source['date'][:10]}, commit {source['commit'][:7]}"


def _lines(axes: Any, rows: list[dict[str, Any]], value: Any) -> None:
    for name, (colour, marker) in _STYLE.items():
        points = sorted((row["n"], value(row)) for row in rows if row["name"] == name and "reason" not in row)
        points = [(n, y) for n, y in points if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name, linewidth=1.4, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)


def _figure(result: dict[str, Any], count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * count, 4.2), layout="constrained")
    figure.supxlabel(_caption(result), fontsize=8, color="#444444")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def draw(result: dict[str, Any], out_dir: Path) -> list[Path]:
    """Writes the pictures that the result has data for, and returns their paths."""
    suites = {name: suite["rows"] for name, suite in result["suites"].items()}
    made = []

    def save(figure: Any, axes: Any, file: str) -> None:
        if not any(ax.lines for ax in axes):
            return
        axes[0].legend(fontsize=8)
        path = out_dir / file
        save_figure(figure, path, dpi=160, tight=False)
        made.append(path)

    fused = suites.get("kernels", []) + suites.get("flex", [])
    for head_dim in (64, 128):
        figure, axes = _figure(result, 2)
        rows = [r for r in fused if r.get("head_dim") == head_dim and r.get("kv_heads") != r.get("heads")]
        for ax, way in zip(axes, ("forward", "backward"), strict=True):
            _lines(ax, rows, lambda row, way=way: row[f"{way}_tflops"])
            ax.set(
                title=f"{way}, causal, bf16, head_dim {head_dim}, 5 query heads per KV head", ylabel="TFLOP/s, useful"
            )
            ax.title.set_fontsize(10)
        save(figure, axes, f"gpu-attention-{head_dim}.png")
    figure, axes = _figure(result, 1)
    rows = suites.get("rows", [])
    plain = {r["n"]: r["both_ms"]["median"] for r in rows if r["name"] == "PyTorch" and "reason" not in r}
    _lines(axes[0], rows, lambda row: plain[row["n"]] / row["both_ms"]["median"] if row["n"] in plain else None)
    axes[0].set(title="mass of one row, forward + backward", ylabel="times as fast as PyTorch")
    save(figure, axes, "gpu-rows.png")
    figure, axes = _figure(result, 1)
    _lines(axes[0], suites.get("memory", []), lambda row: row["both_bytes"] and row["both_bytes"] / 2**20)
    axes[0].set(title="forward + backward, beyond inputs and outputs", ylabel="peak MiB", yscale="log")
    save(figure, axes, "gpu-memory.png")
    return made


def draw_training(result: dict[str, Any], out_dir: Path) -> Path:
    """Peak memory and time of a training step on a CPU, by context length; writes `cpu-training.png`."""
    from matplotlib.figure import Figure

    styles = {
        "reference": ("#D55E00", "x", "published shape (eager)"), "full": ("#0072B2", "s", "full gradients"),
        "restricted": ("#000000", "o", "restricted gradients"), "forward": ("#999999", ">", "forward, no gradient"),
    }  # fmt: skip
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, key, scale, label in ((axes[0], "bytes", 2**20, "peak MiB"), (axes[1], "seconds", 1, "seconds")):
        for method, (colour, marker, name) in styles.items():
            rows = [r for r in result["rows"] if r["method"] == method and isinstance(r["tokens"], int)]
            ax.plot([r["tokens"] for r in rows], [r[key]["median"] / scale for r in rows], color=colour, marker=marker,
                    label=name, linewidth=1.4, markersize=5)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(xlabel="tokens of the prompt", ylabel=label, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    source = result["provenance"]
    figure.supxlabel(f"one training step, 4-layer Llama, float32, one CPU thread, torch {source['versions']['torch']}, "
                     f"{source['date'][:10]}", fontsize=8, color="#444444")  # fmt: skip
    path = out_dir / "cpu-training.png"
    save_figure(figure, path, dpi=160, tight=False)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    parser.add_argument("--allow-dirty", action="store_true", help="accept a tree with uncommitted changes")
    options = parser.parse_args(arguments)
    if not options.result.is_file():
        parser.error(f"no file {options.result}")
    result = json.loads(options.result.read_text())
    if "rows" in result and any(row.get("method") == "restricted" for row in result["rows"]):
        print(f"wrote {draw_training(result, options.out)}")
        return 0
    if found := problems(result, options.allow_dirty):
        print(*found, f"{options.result}: refused", sep="\n")
        return 1
    for path in draw(result, options.out):
        print(f"wrote {path}")
    print_verdicts(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
