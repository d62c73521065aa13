"""What users install is what the tree holds: a folder that is not listed would be missing from the wheel only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("envs", "planners", "agents", "configs")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def expected() -> set[str]:
    """The names in the wheel of every module, config, template and checkpoint of the tree."""
    names = set()
    for path in files(ROOT / "wamrl"):
        inside = path.relative_to(ROOT / "wamrl")
        if inside.parts[0] not in FOLDERS and not path.name.startswith("."):
            names.add(f"wamrl/{inside.as_posix()}")
    for folder in FOLDERS:
        for path in files(ROOT / folder):
            if not path.name.startswith("."):
                names.add(f"wamrl/{folder}/{path.relative_to(ROOT / folder).as_posix()}")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that neither build/ nor *.egg-info of the tree takes part.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("wamrl", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
        + ["--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_config_and_checkpoint(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert expected() - held == set(), "in the tree, not in the wheel: list it in pyproject.toml"
    assert held - expected() == set(), "in the wheel, not in the tree"


def test_the_wheel_has_one_top_level_name_and_the_license(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"wamrl"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_unpacked_wheel_works_away_from_the_tree(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import wamrl, wamrl.envs, wamrl.cli\n"
        "assert wamrl.__file__.startswith(r'%s'), wamrl.__file__\n"
        "assert 'mppi' in wamrl.cli.options('planner'), wamrl.cli.options('planner')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, r'{tmp_path}')\n" + code % tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
