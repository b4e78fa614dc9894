"""Attention Behavior Fine-Tuning (arXiv 2505.14233) on attention masses, for Hugging Face models.

The public names are those that `__init__.pyi` imports. Each is imported on first use, so that the command line answers
at once. The attention implementation `"abft"` is registered with transformers by `abft.models.attention`, which
:func:`enable` and everything else here import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
