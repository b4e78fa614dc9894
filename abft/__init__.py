"""Attention Behavior Fine-Tuning (arXiv 2505.14233) on attention masses, for Hugging Face models.

Names are imported on first use, so that the command line answers at once. The attention implementation `"abft"` is
registered with transformers by `abft.models.attention`, which :func:`enable` and everything else here import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft.evaluation.classification import Evaluation, evaluate
    from abft.evaluation.label_attention import HeadStatistics, head_statistics
    from abft.evaluation.retrieval import evaluate_targets
    from abft.losses import HeadCountController, abft_loss
    from abft.models.attention import enable, is_enabled
    from abft.models.masses import attention_mass, layer_masses
    from abft.models.weights import from_pretrained, load_trained
    from abft.prompts.builder import Prompt, PromptBuilder, PromptCollator, sample_prompts
    from abft.prompts.examples import Example, load_examples, split_examples
    from abft.prompts.targets import AttentionTarget, TargetCollator
    from abft.prompts.tasks import TASKS, Task, Template, get_task
    from abft.training.config import ABFTConfig
    from abft.training.trainer import ABFTTrainer
    from abft_kernels import __version__

_MODULES = {
    "abft.evaluation.classification": ("Evaluation", "evaluate"),
    "abft.evaluation.label_attention": ("HeadStatistics", "head_statistics"),
    "abft.evaluation.retrieval": ("evaluate_targets",),
    "abft.losses": ("HeadCountController", "abft_loss"),
    "abft.models.attention": ("enable", "is_enabled"),
    "abft.models.masses": ("attention_mass", "layer_masses"),
    "abft.models.weights": ("from_pretrained", "load_trained"),
    "abft.prompts.builder": ("Prompt", "PromptBuilder", "PromptCollator", "sample_prompts"),
    "abft.prompts.examples": ("Example", "load_examples", "split_examples"),
    "abft.prompts.targets": ("AttentionTarget", "TargetCollator"),
    "abft.prompts.tasks": ("TASKS", "Task", "Template", "get_task"),
    "abft.training.config": ("ABFTConfig",),
    "abft.training.trainer": ("ABFTTrainer",),
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
