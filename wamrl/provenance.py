"""What runs here: versions, the commit, a compiler. Cheap: imports none of what it reports on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("wamrl", "torch", "tensordict", "torchrl", "numpy", "gymnasium", "mujoco", "metaworld")

_ROOT = Path(__file__).resolve().parents[1]


def version(package: str) -> str | None:
    """The installed version of a distribution, or None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for the CPU: $CXX, g++, clang++ or c++."""
    return any(name and shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"))


@cache
def git_commit() -> str | None:
    """The commit of the source tree this code runs from, with "-dirty" when tracked files differ from it.

    None when wamrl runs from an installed wheel, or without git. A wheel installed below somebody else's repository
    does not report that repository: the commit counts only when wamrl's own files are the ones it tracks.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(_ROOT), *arguments), capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--", "wamrl/provenance.py"):
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if commit and git("status", "--porcelain", "-uno") else commit or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def versions() -> dict[str, str | None]:
    """Name -> version of Python and of everything in `PACKAGES`, plus "commit"; None where something is absent.

    The same keys in every run, so that results, datasets and checkpoints can be compared line by line.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: version(package) for package in PACKAGES}
    found["commit"] = git_commit()
    return found


def data_of(earlier: Mapping[str, Any] | None, *indices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a model was trained on: the data of the checkpoint that it began from, then these, each once.

    earlier: that checkpoint's provenance. indices: of datasets, of which all but their paths are kept.
    """
    before = (earlier or {}).get("data")
    found: list[dict[str, Any]] = []
    for index in [*(before if isinstance(before, Sequence) and not isinstance(before, str) else []), *indices]:
        kept = {key: value for key, value in index.items() if key != "path"}
        if kept not in found:
            found.append(kept)
    return found
