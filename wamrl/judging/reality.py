"""Real episodes kept in a directory, which the next judge of the same policies reads instead of playing them again.

Letters: N start states of one task, L control steps of an episode, G numbers of an observation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wamrl.evaluation import Episode
from wamrl.files import atomic_path
from wamrl.judging.worlds import Cost

Floats = NDArray[np.float64]


@dataclass
class Reality:
    """The episodes of one policy on the N starts of one task, in the simulator.

    actions: [N] of [L, A], as they were executed. paths: [N] of [L + 1, G], what was measured, the first frame
    included. decisions: of `wamrl.results.time_decisions`.
    """

    episodes: list[Episode]
    actions: list[Floats]
    paths: list[Floats]
    cost: Cost
    decisions: list[dict[str, Any]] = field(default_factory=list)


def place(directory: str | Path, asked: Mapping[str, Any]) -> Path:
    """Where the episodes are kept of which `asked` says all that decides how they go."""
    return Path(directory) / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]}.npz"


def read(path: Path) -> Reality | None:
    """What `write` left there, or None."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as found:
        about = json.loads(str(found["about"]))
        cuts = np.cumsum([e["length"] for e in about["episodes"]])[:-1]
        return Reality(
            episodes=[Episode(**e) for e in about["episodes"]],
            actions=np.split(found["actions"], cuts),
            paths=np.split(found["paths"], cuts + np.arange(1, len(cuts) + 1)),
            cost=Cost(**about["cost"]),
            decisions=about["decisions"],
        )


def write(path: Path, reality: Reality, asked: Mapping[str, Any]) -> None:
    """Keep `reality` under `path`, whole or not at all; `asked` is for who wonders what it is."""
    about = {
        "asked": dict(asked),
        "episodes": [asdict(e) for e in reality.episodes],
        "cost": asdict(reality.cost),
        "decisions": reality.decisions,
    }
    arrays: dict[str, Any] = {"actions": np.concatenate(reality.actions), "paths": np.concatenate(reality.paths)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, about=np.array(json.dumps(about)), **arrays)
