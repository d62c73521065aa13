"""Goals of a run of `wamrl.plan`: for each start, what the observation shall look like.

Shapes: R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.control import Goals
from wamrl.evaluation import Start, StepRecord, run_episodes
from wamrl.interfaces import Policy

EXPERT = "expert"


def one_goal(observation: TensorDict) -> Goals:
    """The same goal `observation` [1] for every row."""
    return lambda rows: observation.expand(rows.shape[0])


def goals_by_row(goals: Mapping[int, TensorDict]) -> Goals:
    """Each row's own of the `goals`, which are observations without a batch by `Start.row`."""
    return lambda rows: torch.stack([goals[row] for row in rows.tolist()])


def read_goal(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> TensorDict:
    """The goal observation [1] in the npz file `path`, one array per key of `shapes`.

    Raises FileNotFoundError, or ValueError for a file that does not hold what a model with these keys reads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"goal={path}: there is no such file; give an npz with the observation keys {', '.join(shapes)}, "
            "goal=expert, or goal=null"
        )
    try:
        with np.load(path) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    except (ValueError, OSError, TypeError) as cause:
        raise ValueError(f"goal={path} is no npz file of numbers ({cause}); write it with numpy.savez") from cause
    for key, shape in shapes.items():
        if key not in arrays:
            raise ValueError(f"goal={path} has {', '.join(arrays) or 'nothing'}, but the model reads '{key}' as well")
        found = list(arrays[key].shape)
        if found != list(shape):
            raise ValueError(f"'{key}' of goal={path} has shape {found}, but one observation has {list(shape)}")
        if arrays[key].is_floating_point():
            arrays[key] = arrays[key].float()
            if not bool(arrays[key].isfinite().all()):
                raise ValueError(f"'{key}' of goal={path} has NaN or infinite numbers; a goal has to be finite")
    return TensorDict({key: arrays[key][None] for key in shapes}, batch_size=[1])


def described(goal: str | None) -> str | None:
    """What `goal` is in a protocol's hash: of a file its content, not its name."""
    if goal is None or goal == EXPERT:
        return goal
    return f"npz {hashlib.sha256(Path(goal).read_bytes()).hexdigest()}"


def expert_goals(
    env: Any, expert: Policy, starts: Sequence[Start], keys: Sequence[str], *, split: str, seed: int
) -> dict[int, TensorDict]:
    """Where the scripted expert ends, by `Start.row`: its observation `keys` at its first success.

    Where it never succeeds, that is its last observation.
    """
    last: dict[int, TensorDict] = {}

    def see(record: StepRecord) -> None:
        for k, start in enumerate(record.starts):
            last[start.row] = record.after[k].select(*keys).clone()

    options: dict[str, Any] = {"split": split, "seed": seed, "max_steps": env.max_steps}
    run_episodes(env, expert, starts, method="expert", on_step=see, **options)
    return last


def not_yet(rows: Tensor) -> TensorDict:
    """In the place of goals that are still to be made, where a policy is built but does not act."""
    raise RuntimeError("this policy was made to be asked for its settings and has no goals; give planner_policy some")
