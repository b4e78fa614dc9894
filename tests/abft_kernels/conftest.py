"""Every kernel test runs on poisoned memory: `torch.empty` holds NaN, so that an element nobody writes is seen."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
