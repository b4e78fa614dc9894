"""Figures of the paper's tables: arXiv 2505.14233v2 (27 September 2025), accuracies and consistencies in %.

Tables 1 to 4, with the models' names on the Hugging Face Hub (its Table 6).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ABLATIONS", "AGAINST_E2E", "AVERAGES", "CONSISTENCY", "published_averages"]

AVERAGES: dict[str, dict[str, float]] = {
    "openai-community/gpt2-large": {"vanilla": 45.86, "calibration": 44.12, "abft": 63.21},
    "openai-community/gpt2-xl": {"vanilla": 50.13, "calibration": 48.07, "abft": 67.74},
    "tiiuae/Falcon3-7B-Base": {"vanilla": 67.55, "calibration": 66.70, "abft": 79.59},
    "meta-llama/Meta-Llama-3-8B": {"vanilla": 66.60, "calibration": 62.02, "abft": 80.20},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": {"vanilla": 72.61, "calibration": 71.86, "abft": 78.21},
    "Qwen/Qwen2.5-32B": {"vanilla": 75.29, "calibration": 72.30, "abft": 79.64},
    "simplescaling/s1.1-32B": {"vanilla": 78.77, "calibration": 78.02, "abft": 81.02},
    "chargoddard/llama3-42b-v0": {"vanilla": 71.31, "calibration": 68.16, "abft": 78.34},
    "nyunai/nyun-c2-llama3-56B": {"vanilla": 70.95, "calibration": 70.12, "abft": 79.52},
}
"""Table 1: mean accuracy over the eight data sets, by method; models from 14B on in 4 bits with LoRA."""

AGAINST_E2E: dict[str, dict[str, float]] = {
    "Llama3 8B": {"vanilla": 66.02, "abft": 72.54, "e2e": 78.33, "abft_away": 64.34, "e2e_away": 61.74, "time": 2.2},
    "DeepSeek-R1 14B": {"vanilla": 72.61, "abft": 78.21, "e2e": 78.26, "abft_away": 67.21, "e2e_away": 63.62,
                        "time": 2.2},
    "Qwen2.5 32B": {"vanilla": 75.29, "abft": 79.64, "e2e": 82.09, "abft_away": 64.96, "e2e_away": 62.24, "time": 2.6},
    "Llama3 56B": {"vanilla": 70.95, "abft": 79.52, "e2e": 82.80, "abft_away": 67.32, "e2e_away": 64.86, "time": 2.7},
}  # fmt: skip
"""Table 2, all in 4 bits with LoRA: accuracy in domain, out of domain (`_away`), and E2E's time by ABFT's."""

CONSISTENCY: dict[str, dict[str, tuple[float, float]]] = {
    "GPT2-XL": {"templates": (81.28, 91.74), "demonstrations": (68.38, 82.75)},
    "Llama3 8B": {"templates": (86.93, 90.32), "demonstrations": (76.99, 92.00)},
    "DeepSeek-R1 14B": {"templates": (89.64, 92.79), "demonstrations": (81.30, 85.97)},
    "Qwen2.5 32B": {"templates": (88.97, 92.78), "demonstrations": (84.52, 87.94)},
    "Llama3 56B": {"templates": (92.78, 93.90), "demonstrations": (82.10, 87.49)},
}
"""Table 3: consistency without and with ABFT."""

ABLATIONS: dict[str, dict[str, float]] = {
    "Falcon3 7B": {"abft": 79.59, "no_pid": 76.86, "no_pid_no_filter": 75.57, "a0": 72.13, "b0": 56.47},
    "Llama3 8B": {"abft": 80.20, "no_pid": 80.07, "no_pid_no_filter": 70.39, "a0": 63.54, "b0": 58.79},
    "DeepSeek-R1 14B": {"abft": 78.21, "no_pid": 73.35, "no_pid_no_filter": 73.51, "a0": 72.71, "b0": 73.36},
}
"""Table 4: mean accuracy by ablation; every ablation has PID off."""


def published_averages(model: str) -> dict[str, float]:
    """Return the paper's averages by method, in %, for a model of that name or folder; empty if it has none."""
    name = Path(model).name.lower()
    return next((row for known, row in AVERAGES.items() if Path(known).name.lower() == name), {})
