"""Imagined environments from files: a checkpoint and a dataset become a `wamrl.envs.imagined_env.ImaginedEnv`.

Importing this module registers `wamrl/Imagined-v0` with Gymnasium, which is what the part before the colon does in

    gymnasium.make_vec("wamrl.imagined:wamrl/Imagined-v0", num_envs=1024, wam="six", data="data/rich")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium

from wamrl import checkpoint
from wamrl.data import start_frames
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.envs.vector import RowsVectorEnv

ID = "wamrl/Imagined-v0"


def make(
    wam: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_envs: int = 1,
    first_only: bool = False,
    tasks: str | Sequence[str] | None = None,
    device: str = "cpu",
    **options: Any,
) -> ImaginedEnv:
    """An imagined environment in the checkpoint `wam`, whose episodes begin at frames of the dataset(s) `data`.

    Args:
        wam: as in `wamrl.load`. data: directories of `python -m wamrl.collect`.
        data: directories of `python -m wamrl.collect`.
        num_envs: rows.
        first_only: start at the first frame of each episode only, instead of at any.
        tasks: those to start from; None is all that the data holds.
        device: of model and observations.
        options: of `ImaginedEnv`.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint or dataset, or ones that do not fit together.
    """
    if "split" in options:
        raise ValueError(
            f"imagined episodes begin at frames of a dataset, so there are no {options['split']} starts of a "
            "simulator; plan needs a simulator, and wamrl.evaluation.run_episodes compares policies in imagination"
        )
    model = checkpoint.load(wam, device=device)
    frames = start_frames(data, keys=tuple(model.spec.observation), tasks=tasks, first_only=first_only)
    return ImaginedEnv(model, frames, num_envs, tasks=tasks, device=device, **options)


def make_vec(num_envs: int = 1, **options: Any) -> RowsVectorEnv:
    """`make` as a Gymnasium `VectorEnv`, auto-reset mode SAME_STEP."""
    return RowsVectorEnv(make(num_envs=num_envs, **options))


if ID not in gymnasium.registry:
    gymnasium.register(ID, vector_entry_point=make_vec)
