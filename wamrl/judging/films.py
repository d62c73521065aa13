"""The most telling agreements and disagreements of an evaluation, each as a film of one start in both worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from wamrl.evaluation import Start
from wamrl.film import VIDEO_CAMERA, VIDEO_FPS, VIDEO_SIZE
from wamrl.interfaces import WAM, Policy, PolicyState
from wamrl.judging import worlds
from wamrl.report import short
from wamrl.video import View, write_pair

KINDS = {
    (False, True): "imagined a success that was none",
    (True, False): "missed a success",
    (True, True): "agreed on a success",
    (False, False): "agreed on a failure",
}


def choose(
    real: NDArray[np.bool_], imagined: NDArray[np.bool_], scores: NDArray[np.float64], count: int
) -> list[tuple[int, int]]:
    """At most `count` episodes (policy, start): of each kind in turn, disagreements first, the one judged most firmly.

    real, imagined, scores: [K, N]. A policy is shown twice only when its kind has no other.
    """
    queues = []
    for kind in KINDS:
        found = np.argwhere((real == kind[0]) & (imagined == kind[1]))
        firm = sorted(found.tolist(), key=lambda at: scores[at[0], at[1]], reverse=kind[1])
        queues.append([(int(k), int(n)) for k, n in firm])
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                shown = {k for k, _ in chosen}
                best = next((at for at in queue if at[0] not in shown), queue[0])
                queue.remove(best)
                chosen.append(best)
    return chosen


class _Pictured:
    """A policy whose world is photographed before each of its actions."""

    def __init__(self, policy: Policy, env: Any) -> None:
        self.policy, self.env = policy, env
        self.frames: list[NDArray[np.uint8]] = []

    def initial_state(self, rows: int) -> PolicyState:
        return self.policy.initial_state(rows)

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        self.take()
        return self.policy.act(observation, policy_state, is_init)

    def take(self) -> None:
        self.frames.append(self.env.render_rgb(0, VIDEO_SIZE, type(self.env.camera)(**VIDEO_CAMERA)))


def film(
    path: Path,
    env: Any,
    model: WAM,
    frame: TensorDict,
    policy: Policy,
    start: Start,
    *,
    name: str,
    split: str,
    seed: int,
    max_steps: int,
    keyframe_every: int | None,
    replicas: int,
    uncertainty: bool,
    threshold: float,
    solved: tuple[bool, bool],
) -> dict[str, str]:
    """Run one start again in both worlds (`env` has one row), write the film, and tell what it shows.

    Raises RuntimeError where nothing can be rendered, and for an environment without pictures.
    """
    if not all(hasattr(env, needed) for needed in ("render_rgb", "camera", "simulators")):
        raise RuntimeError("this environment draws no pictures (it has no render_rgb)")
    keys = list(model.spec.observation)
    common: dict[str, Any] = {"name": name, "split": split, "seed": seed, "max_steps": max_steps}
    pictured = _Pictured(policy, env)
    _, recording = worlds.run_real(env, pictured, [start], keys=keys, cost=worlds.Cost(), **common)
    pictured.take()
    one = worlds.run_imagined(
        model, frame[None], policy, [start], num_envs=1, keyframe_every=keyframe_every, replica=0, replicas=replicas,
        uncertainty=uncertainty, cost=worlds.Cost(), path_keys=["state"], **common,
    )[0]  # fmt: skip
    measured = worlds.real_path(recording, start, ["state"])
    shown, place = one.path, model.spec.layout.place
    fovy = float(env.simulators[0].raw.model.vis.global_.fovy)
    view = View(**VIDEO_CAMERA, fovy=fovy, height=VIDEO_SIZE[0], width=VIDEO_SIZE[1])
    write_pair(
        path,
        pictured.frames,
        {
            "hand": measured[:, place("hand")],
            "object": measured[:, place("object")],
            "goal": measured[-1, place("goal")],
        },
        {"hand": shown[:, place("hand")], "object": shown[:, place("object")]},
        one.probability.tolist(),
        threshold,
        view,
        solved=solved,
        fps=VIDEO_FPS,
    )
    words = f"{name} on {short(start.task)}, start {start.index}: the judge {KINDS[solved]}"
    return {"file": path.name, "words": words}


def films_of(choices: Sequence[Mapping[str, Any]], directory: Path) -> tuple[list[dict[str, str]], str | None]:
    """Make every film of `choices` (arguments of `film` but the path); why there are no more, when rendering fails."""
    made: list[dict[str, str]] = []
    for number, choice in enumerate(choices):
        try:
            made.append(film(directory / f"film_{number + 1}.mp4", **choice))
        except (ImportError, RuntimeError) as error:  # no renderer, no imageio, or no ffmpeg for it
            return made, str(error)
    return made, None
