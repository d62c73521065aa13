"""Imports go down the layers, and siblings do not import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Unit -> layer. A unit is a module of wamrl, or a folder whose files belong together.
LAYERS = {
    **dict.fromkeys(("interfaces", "noise", "naming", "files", "provenance"), 0),
    **dict.fromkeys(("models", "imagination"), 1),
    **dict.fromkeys(("envs", "planners", "agents"), 2),
    **dict.fromkeys(("data", "checkpoint", "training", "evaluation", "report", "control", "oracle", "video"), 3),
    **dict.fromkeys(("image_quality", "probe"), 3),
    # cli: what commands share; film, results, goals: parts of plan; measuring, experience, posttraining: of posttrain
    # imagined: environments from checkpoint and data; stages: commands one after the other, for loop and fast_wam
    **dict.fromkeys(("cli", "film", "results", "imagined", "pages", "properties", "stages", "behaviours"), 4),
    **dict.fromkeys(("measuring", "experience", "goals"), 4),
    **dict.fromkeys(("workers", "judging", "posttraining", "fast_wam", "budget"), 5),
    **dict.fromkeys(("collect", "train", "plan", "posttrain", "evaluate", "loop", "bench"), 6),
    "configs": 6,
    "": 7,  # wamrl/__init__.py, the way in for users
}
# The nouns and their small tools are one page in several files.
FRIENDS = {frozenset(("interfaces", "noise")), frozenset(("interfaces", "naming"))}
FOLDERS = ("models", "judging", "envs", "planners", "agents", "configs")
LINKED = {"envs", "planners", "agents", "configs"}  # real folders at the top


def sources(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(unit, dotted name, path) of every module of the package."""
    for path in sorted((root / "wamrl").glob("*.py")):
        unit = "" if path.stem == "__init__" else path.stem
        yield unit, f"wamrl.{unit}".rstrip("."), path
    for folder in FOLDERS:
        base = root / folder if folder in LINKED else root / "wamrl" / folder
        for path in sorted(base.rglob("*.py")):
            parts = [folder, *path.relative_to(base).with_suffix("").parts]
            yield folder, "wamrl." + ".".join(part for part in parts if part != "__init__"), path


def imported(tree: ast.AST, units: set[str]) -> Iterator[tuple[str, int]]:
    """(unit, line) of every import of wamrl, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head in ("tests", "benchmarks"):
                yield head, node.lineno
            elif head == "wamrl":
                unit = rest.partition(".")[0]
                yield (unit if unit in units else ""), node.lineno


def violations(root: Path) -> list[str]:
    found = []
    modules = list(sources(root))
    units = {unit for unit, _, _ in modules}
    for unit, name, path in modules:
        if unit not in LAYERS:
            found.append(f"{name} is in no layer; give it one in LAYERS")
            continue
        for other, line in imported(ast.parse(path.read_text(encoding="utf-8")), units):
            where = f"{path.relative_to(root)}:{line}: {name} imports"
            if other in ("tests", "benchmarks"):
                found.append(f"{where} {other}, which stands above the package")
            elif other == unit:
                continue
            elif LAYERS.get(other, -1) > LAYERS[unit]:
                found.append(f"{where} wamrl.{other}".rstrip(".") + ", which is above it")
            elif LAYERS.get(other) == LAYERS[unit] and frozenset((unit, other)) not in FRIENDS:
                found.append(f"{where} wamrl.{other}, its sibling")
    return found


def test_imports_go_down_the_layers():
    assert not violations(ROOT), "\n".join(["", *violations(ROOT)])


def test_every_folder_of_the_package_is_checked():
    names = {name for _, name, _ in sources(ROOT)}
    assert {"wamrl", "wamrl.interfaces", "wamrl.envs", "wamrl.planners", "wamrl.models"} <= names


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("wamrl/interfaces.py", "import wamrl.control", "above"),
        ("wamrl/models/mlp.py", "from wamrl.planners.mppi import make_mppi", "above"),
        ("wamrl/models/mlp.py", "from wamrl import data", "above"),
        ("wamrl/models/mlp.py", "def build():\n    from wamrl.data import read", "above"),
        ("planners/mppi.py", "from wamrl.envs import toy", "sibling"),
        ("planners/deep/mppi.py", "import wamrl.agents", "sibling"),
        ("wamrl/data.py", "import wamrl.control as c", "sibling"),
        ("wamrl/plan.py", "from wamrl.train import main", "sibling"),
        ("wamrl/control.py", "from wamrl import load", "above"),
        ("wamrl/data.py", "from benchmarks import plan_metaworld", "above"),
        ("wamrl/helpers.py", "import os", "in no layer"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, text, reason):
    for folder in ("wamrl/models", "wamrl/judging", "envs", "planners", "agents", "configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    for module in ("__init__", "interfaces", "noise", "data", "control", "train"):
        (tmp_path / "wamrl" / f"{module}.py").touch()
    (tmp_path / "wamrl" / "plan.py").write_text("from wamrl import control, data\nfrom wamrl.planners import mppi\n")
    (tmp_path / "wamrl" / "interfaces.py").write_text("from wamrl.noise import NoiseKey\n")
    assert violations(tmp_path) == []

    planted = tmp_path / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text + "\n")
    assert len(violations(tmp_path)) == 1
    assert reason in violations(tmp_path)[0]


def test_importing_the_package_alone_is_cheap():
    code = "import sys, wamrl, wamrl.provenance, wamrl.naming, wamrl.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_plug_in_folders_are_linked_into_the_package():
    for folder in LINKED:
        link = ROOT / "wamrl" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder
