"""What a stopped evaluation keeps: the episodes of each policy on a task, read instead of played when it goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wamrl.evaluation import Episode
from wamrl.files import atomic_path, write_json
from wamrl.judging.worlds import Cost, Imagining

_CURVES = ("probability", "uncertainty", "alone")


@dataclass
class Cell:
    """The episodes of one policy on the N starts of one task.

    imagined: roll-out name -> [N][replicas]. open_loop, closed_loop: errors [N, H]. Without a simulator, these and real
    are None. decisions: of `wamrl.results.time_decisions`. reused: whether the real episodes were read, not played.
    """

    real: list[Episode] | None = None
    imagined: dict[str, list[list[Imagining]]] = field(default_factory=dict)
    open_loop: NDArray[np.float64] | None = None
    closed_loop: NDArray[np.float64] | None = None
    real_cost: Cost = field(default_factory=Cost)
    imagined_cost: Cost = field(default_factory=Cost)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    reused: bool = False


class Cells:
    """The cells in `directory`/cells.

    identity: whatever must be the same for them to be of use (protocol, checkpoints). ValueError where it is not.
    settings: of the run, for the one that takes it up.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.folder = Path(directory) / "cells"
        if not (self.folder / "run.json").is_file():
            write_json(self.folder / "run.json", {**identity, "settings": dict(settings)})
            return
        before = self.about(directory)
        other = [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]
        if other:
            raise ValueError(
                f"{directory} was stopped with another {', '.join(other)} than there is now, so its episodes cannot be "
                "joined by new ones; begin again"
            )

    @staticmethod
    def about(directory: str | Path) -> dict[str, Any]:
        """What the stopped run in `directory` says of itself. Raises FileNotFoundError where none was stopped."""
        path = Path(directory) / "cells" / "run.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"resume={directory}: there is no cells/run.json; give the directory of a run of wamrl.evaluate that "
                "was stopped (one that is complete has a report.html, and nothing left to do)"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def path(self, *names: str) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:24]}.npz"

    def read(self, *names: str) -> Cell | None:
        """The cell called `names`, or None when it was not played yet."""
        if not self.path(*names).is_file():
            return None
        with np.load(self.path(*names), allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            cell = Cell(
                real=None if about["real"] is None else [Episode(**e) for e in about["real"]],
                open_loop=found["open_loop"] if "open_loop" in found else None,
                closed_loop=found["closed_loop"] if "closed_loop" in found else None,
                real_cost=Cost(**about["real_cost"]),
                imagined_cost=Cost(**about["imagined_cost"]),
                decisions=about.get("decisions", []),  # stopped runs of earlier versions have none
                reused=about.get("reused", False),
            )
            for name in about["roll_outs"]:
                lengths = found[f"{name}/lengths"]
                cuts = np.cumsum(lengths.ravel())[:-1]
                parts = [iter(np.split(found[f"{name}/{key}"], cuts)) for key in _CURVES]
                cell.imagined[name] = [[Imagining(*map(next, parts)) for _ in row] for row in lengths]
        return cell

    def write(self, cell: Cell, *names: str) -> None:
        """Keep a cell under `names`, whole or not at all."""
        about = {
            "real": None if cell.real is None else [asdict(e) for e in cell.real],
            "roll_outs": list(cell.imagined),
            "real_cost": asdict(cell.real_cost),
            "imagined_cost": asdict(cell.imagined_cost),
            "decisions": cell.decisions,
            "reused": cell.reused,
        }
        arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
        if cell.open_loop is not None and cell.closed_loop is not None:
            arrays |= {"open_loop": cell.open_loop, "closed_loop": cell.closed_loop}
        for name, rows in cell.imagined.items():
            arrays[f"{name}/lengths"] = np.array([[len(one.probability) for one in row] for row in rows])
            for key in _CURVES:
                arrays[f"{name}/{key}"] = np.concatenate([getattr(one, key) for row in rows for one in row])
        with atomic_path(self.path(*names)) as temporary:
            np.savez_compressed(temporary, **arrays)

    def remove(self) -> None:
        """Drop what was kept, once the results are written."""
        shutil.rmtree(self.folder)
