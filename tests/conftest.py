"""What all tests share: one thread per worker, and tests of an accelerator skip where there is none.

Tests skip where an optional package is missing. WAMRL_TEST_NEEDS names packages that must be there: `make test` and
`make test-isaac` install them, so that a run without them would be green for having asked nothing.
"""

from __future__ import annotations

import importlib.util
import os
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


def pytest_configure() -> None:
    """Refuse to run without what WAMRL_TEST_NEEDS names."""
    needs = os.environ.get("WAMRL_TEST_NEEDS", "").split()
    missing = [name for name in needs if importlib.util.find_spec(name) is None]  # imports nothing
    if missing:
        raise pytest.UsageError(
            f"WAMRL_TEST_NEEDS names {', '.join(missing)}, but {sys.executable} has none such; install what is missing "
            "(remove the .stamp files of the virtual environment and run make again), or unset the variable"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
