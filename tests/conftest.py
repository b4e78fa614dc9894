"""Device and settings of all tests. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: before any test module
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
torch.set_num_threads(1)  # the tensors are small, and pytest-xdist runs a process per core


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LargestTensor(TorchDispatchMode):
    """A mode that remembers the largest result of any operator, below autograd and inside composite operators."""

    def __init__(self):
        super().__init__()
        self.numel, self.operator = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() // leaf.element_size() > self.numel:
                self.numel = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.operator = str(func)
        return result


@pytest.fixture
def largest_tensor() -> type[LargestTensor]:
    """Return a mode that can show that no N × N tensor was made."""
    return LargestTensor


def pytest_configure(config):
    relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    shared = {"deadline": None, "suppress_health_check": relaxed, "print_blob": True}
    settings.register_profile("ci", max_examples=50, derandomize=True, **shared)
    settings.register_profile("few", max_examples=12, derandomize=True, **shared)
    settings.register_profile("nightly", max_examples=500, **shared)
    if config.getoption("--hypothesis-profile", None) is None:
        settings.load_profile("ci")
