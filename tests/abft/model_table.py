"""The README's table of models, from what the parity tests run: `python tests/abft/model_table.py --write`."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_models import SERVED, tiny

from abft.models.projections import find_qk, lora_qk

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- models: made by tests/abft/model_table.py -->\n", "<!-- end of models -->\n"


def _trained(kind: str) -> tuple[str, str]:
    """Return the modules that full training changes, and ✓ if LoRA finds them by itself."""
    parts = {item.name.split(".")[-2]: item.fused for item in find_qk(tiny(kind))}
    try:
        lora_qk(tiny(kind))
    except ValueError:
        return ", ".join(f"`{name}`" + (" (its part)" if fused else "") for name, fused in parts.items()), "by name"
    return ", ".join(f"`{name}`" for name in parts), "✓"


def table() -> str:
    """Markdown; a row for each architecture of `SERVED`."""
    lines = ["| model | attention | W_Q, W_K in full | LoRA, 4-bit |", "|---|---|---|---|"]
    for kind, (name, special) in SERVED.items():
        full, lora = _trained(kind)
        lines.append(f"| {name} | {special} | {full} | {lora} |")
    return "\n".join(lines) + "\n"


def in_readme() -> str:
    text = README.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)]


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = README.read_text(encoding="utf-8")
        README.write_text(text.replace(START + in_readme() + END, START + table() + END), encoding="utf-8")
    else:
        print(table())
