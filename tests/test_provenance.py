"""Where a result came from: the same keys in every run, and a commit only of the code that really ran."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from wamrl import provenance

GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")


def commit_seen_from(folder: Path) -> str:
    """What a fresh process that runs the module from folder/wamrl/provenance.py reports."""
    code = "import runpy; print(runpy.run_path('wamrl/provenance.py')['git_commit']())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout.strip()


def place_module(folder: Path) -> None:
    (folder / "wamrl").mkdir(parents=True)
    shutil.copy(provenance.__file__, folder / "wamrl" / "provenance.py")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run((*GIT, *arguments), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_versions_have_the_same_keys_everywhere():
    found = provenance.versions()
    assert set(found) == {"python", "commit", *provenance.PACKAGES}
    assert found["wamrl"] and found["torch"] and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert provenance.version("no-such-distribution") is None


def test_the_commit_is_that_of_the_code_and_says_when_files_differ(tmp_path):
    place_module(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_seen_from(tmp_path) == head
    (tmp_path / "new.txt").touch()  # an untracked file changes no code
    assert commit_seen_from(tmp_path) == head
    with (tmp_path / "wamrl" / "provenance.py").open("a") as file:
        file.write("\n# changed\n")
    assert commit_seen_from(tmp_path) == f"{head}-dirty"


def test_a_package_installed_below_another_repository_reports_no_commit(tmp_path):
    (tmp_path / "theirs.txt").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "theirs")
    place_module(tmp_path / "site-packages")
    assert commit_seen_from(tmp_path / "site-packages") == "None"


def test_outside_of_any_repository_there_is_no_commit(tmp_path):
    place_module(tmp_path)
    assert commit_seen_from(tmp_path) == "None"


def test_what_a_model_was_trained_on_adds_up_each_once_and_without_paths():
    one, two = {"split": "train", "seed": 0}, {"split": "train", "seed": 1}
    assert provenance.data_of({"data": [one]}, {**one, "path": "anywhere"}, two) == [one, two]
    assert provenance.data_of(None, one) == [one] and provenance.data_of({"data": "made by hand"}, two) == [two]
