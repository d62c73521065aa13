"""What all tests share: one thread per worker, and tests of an accelerator skip where there is none."""

from __future__ import annotations

import pytest
import torch

# Two workers with a thread each beat two workers with all the cores each.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
