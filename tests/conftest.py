"""What all tests share: one thread per worker, and tests of an accelerator skip where there is none."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

# Two workers with a thread each beat two workers with all the cores each.
torch.set_num_threads(1)


if importlib.util.find_spec("absl") is not None:
    # JAX and dm_control import absl, whose log handler closes its stream when Hydra sets up logging anew, unless that
    # is the process's own: with pytest's capture as its stream every later test would fail.
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
