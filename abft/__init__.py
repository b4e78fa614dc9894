"""Attention Behavior Fine-Tuning (arXiv 2505.14233) on attention masses, for Hugging Face models.

Names are imported on first use, so that the command line answers at once. The attention implementation `"abft"` is
registered with transformers by `abft.attention`, which :func:`enable` and everything else here import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft.attention import enable, is_enabled
    from abft.config import ABFTConfig
    from abft.data import Example, load_examples, split_examples
    from abft.evaluation import Evaluation, evaluate
    from abft.losses import HeadCountController, abft_loss
    from abft.masses import attention_mass, layer_masses
    from abft.prompts import Prompt, PromptBuilder, PromptCollator, sample_prompts
    from abft.statistics import HeadStatistics, head_statistics
    from abft.targets import AttentionTarget, TargetCollator, evaluate_targets
    from abft.tasks import TASKS, Task, Template, get_task
    from abft.training import ABFTTrainer
    from abft.weights import from_pretrained, load_trained
    from abft_kernels import __version__

_MODULES = {
    "abft.attention": ("enable", "is_enabled"),
    "abft.config": ("ABFTConfig",),
    "abft.data": ("Example", "load_examples", "split_examples"),
    "abft.evaluation": ("Evaluation", "evaluate"),
    "abft.losses": ("HeadCountController", "abft_loss"),
    "abft.masses": ("attention_mass", "layer_masses"),
    "abft.prompts": ("Prompt", "PromptBuilder", "PromptCollator", "sample_prompts"),
    "abft.statistics": ("HeadStatistics", "head_statistics"),
    "abft.targets": ("AttentionTarget", "TargetCollator", "evaluate_targets"),
    "abft.tasks": ("TASKS", "Task", "Template", "get_task"),
    "abft.training": ("ABFTTrainer",),
    "abft.weights": ("from_pretrained", "load_trained"),
    "abft_kernels": ("__version__",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "TASKS",
    "ABFTConfig",
    "ABFTTrainer",
    "AttentionTarget",
    "Evaluation",
    "Example",
    "HeadCountController",
    "HeadStatistics",
    "Prompt",
    "PromptBuilder",
    "PromptCollator",
    "TargetCollator",
    "Task",
    "Template",
    "__version__",
    "abft_loss",
    "attention_mass",
    "enable",
    "evaluate",
    "evaluate_targets",
    "from_pretrained",
    "get_task",
    "head_statistics",
    "is_enabled",
    "layer_masses",
    "load_examples",
    "load_trained",
    "sample_prompts",
    "split_examples",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'abft' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
