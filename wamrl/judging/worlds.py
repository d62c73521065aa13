"""Policies in imagination: closed loop in a World Action Model from given start states, and what the model says of it.

An imagined episode begins at the real first frame of a start state. The policy acts on what the model decodes, the
model imagines what follows, control step after control step up to the full length of a real episode. Nothing is judged
while it runs: the success head's probability and the ensemble's disagreement of every step are kept, so that different
judges can read the same episodes.

Letters: F frames, L steps of an episode, R replicas (imagined episodes of one start, each in another ensemble member).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from wamrl.envs.base import Shown
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.evaluation import Episode, Recording, Start, StepRecord, imagined_frames, run_episodes
from wamrl.interfaces import WAM, Context, Layout, Policy, PolicyState
from wamrl.noise import NoiseKey

Floats = NDArray[np.float64]
NEAR_M = 0.06  # from hand to object, as in `wamrl.evaluation.FailureTags`


def nearest_keyframes(every: int, stride: int) -> int:
    """The multiple of `stride` that is nearest below `every`, or the first."""
    return max(1, every // stride) * stride


def check_keyframes(model: WAM, every: int | None) -> None:
    """ValueError where `model` imagines no frame at every `every`-th control step."""
    stride = model.spec.frame_stride
    if every is not None and every % stride:
        raise ValueError(
            f"keyframe_every is {every}, but the model imagines a frame every {stride} control steps and can be "
            "brought back to a decoded one only there; use a multiple, such as keyframe_every="
            f"{nearest_keyframes(every, stride)}"
        )


class Imagination(ImaginedEnv):
    """An `ImaginedEnv` for judging: open-ended, numbered like the real start states, never stopped by a success.

    Args:
        model: as for `ImaginedEnv`.
        frames: [F] real first frames with `task`, in the order of `starts`.
        starts: what they are the first frames of; a reset to `start` asks for `Start.index`.
        num_envs: rows.
        max_steps: control steps of an episode, beyond the model's `max_horizon` as well.
        keyframe_every: encode what was decoded anew every so many control steps, which brings the latent back to where
            encoded frames lie; None never does.
        replica, replicas: the part of the ensemble that this environment follows: replicas share it out evenly.
        uncertainty: whether rows carry it, which takes all of a model's futures and several times as long.
        seed: of what is random in the model.
    """

    def __init__(
        self,
        model: WAM,
        frames: TensorDict,
        starts: Sequence[Start],
        num_envs: int,
        *,
        max_steps: int,
        keyframe_every: int | None = None,
        replica: int = 0,
        replicas: int = 1,
        uncertainty: bool = False,
        seed: int = 0,
    ) -> None:
        if keyframe_every is not None and keyframe_every < 1:
            raise ValueError(f"keyframe_every is {keyframe_every}, but must be at least 1, or null")
        check_keyframes(model, keyframe_every)
        if len(starts) != frames.batch_size[0]:
            raise ValueError(f"there are {len(starts)} starts, but {frames.batch_size[0]} frames; give one for each")
        self.keyframe_every, self._share = keyframe_every, replica / replicas
        self._number = {start: i for i, start in enumerate(starts)}
        # A snapshot among the observation keys is the oracle's own business, and no policy's.
        keys = [key for key in model.spec.observation if key != "snapshot"]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        super().__init__(
            model, frames, num_envs, keys=keys, max_steps=max_steps, uncertainty=uncertainty, seed=seed, device=device
        )

    def _frame(self, task: str, number: int) -> int:
        found = self._number.get(Start(task, number))
        if found is None:
            raise ValueError(f"`start` asks for {number} of '{task}', of which there is no frame here")
        return found

    @torch.no_grad()
    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        after = super()._advance(rows, action)
        after["success"] = torch.zeros_like(after["success"])
        if self.keyframe_every is not None:
            due = (self._steps[rows] % self.keyframe_every == 0).nonzero()[:, 0]
            if due.numel():
                seen = {key: after[key][due] for key in self.keys} | {"task": self._task_ids[rows[due]]}
                frame = TensorDict(seen, batch_size=[due.numel()])
                self._put(rows[due], self._encode(frame, rows[due]))
        return after


@dataclass
class Imagining:
    """One imagined episode.

    probability: [L] of success after each step. uncertainty: [L], zeros where it was not asked for. path: [L + 1, G]
    what was decoded of the keys asked for, the first frame included; empty without any. alone: [L] centimetres that the
    object has moved so far with the hand more than `NEAR_M` away; zeros where the model does not know their places.
    """

    probability: Floats
    uncertainty: Floats
    alone: Floats
    path: Floats = field(default_factory=lambda: np.empty((0, 0)))


class _Watched:
    """A policy on the model's observation keys alone, in both worlds, whose time is taken."""

    def __init__(self, policy: Policy, keys: Sequence[str], name: str) -> None:
        self.policy, self.keys, self.name = policy, keys, name
        self.seconds = 0.0

    def initial_state(self, rows: int) -> PolicyState:
        return self.policy.initial_state(rows)

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        begun = time.perf_counter()
        try:
            return self.policy.act(observation.select(*self.keys, "task"), policy_state, is_init)
        except KeyError as error:
            raise ValueError(
                f"policy '{self.name}' reads {error}, but acts on what the model decodes: {', '.join(self.keys)}"
            ) from error
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass
class Cost:
    """Wall seconds of episodes, the policies' own time apart, and their control steps."""

    env_s: float = 0.0
    policy_s: float = 0.0
    steps: int = 0

    def add(self, env_s: float, policy_s: float, steps: int) -> None:
        self.env_s, self.policy_s, self.steps = self.env_s + env_s, self.policy_s + policy_s, self.steps + steps


def first_frames(env: Any, starts: Sequence[Start]) -> TensorDict:
    """[F] what the simulator shows at the beginning of each start, with `task`."""
    found: list[TensorDict] = []
    for start in starts:
        row = env.row_tasks.index(start.task)
        index = torch.zeros(env.batch_size[0], dtype=torch.int64)
        reset = torch.zeros(env.batch_size[0], 1, dtype=torch.bool)
        index[row], reset[row] = start.index, True
        if not found:
            env.reset()  # the first one has to cover every row
        found.append(env.reset(TensorDict({"start": index, "_reset": reset}, batch_size=env.batch_size))[row].clone())
    return cast(TensorDict, torch.stack(found))


def run_real(
    env: Any,
    policy: Policy,
    starts: Sequence[Start],
    *,
    name: str,
    keys: Sequence[str],
    split: str,
    seed: int,
    max_steps: int,
    cost: Cost,
) -> tuple[list[Episode], Recording]:
    """The episodes of a policy in the simulator, and what was seen and done in them."""
    watched, recording = _Watched(policy, keys, name), Recording()
    begun = time.perf_counter()
    episodes = run_episodes(
        env, watched, starts, method=name, split=split, seed=seed, max_steps=max_steps, on_step=recording.see
    )
    total = time.perf_counter() - begun
    cost.add(total - watched.seconds, watched.seconds, sum(e.length for e in episodes))
    return episodes, recording


def run_imagined(
    model: WAM,
    frames: TensorDict,
    policy: Policy,
    starts: Sequence[Start],
    *,
    name: str,
    split: str,
    seed: int,
    max_steps: int,
    num_envs: int,
    keyframe_every: int | None = None,
    replica: int = 0,
    replicas: int = 1,
    uncertainty: bool = False,
    cost: Cost,
    path_keys: Sequence[str] = (),
) -> list[Imagining]:
    """The episodes of a policy in imagination, one per start, all of `max_steps` unless the model ends them.

    path_keys: what the paths are made of; without them there are none.
    """
    env = Imagination(
        model,
        frames,
        starts,
        min(num_envs, len(starts)),
        max_steps=max_steps,
        keyframe_every=keyframe_every,
        replica=replica,
        replicas=replicas,
        uncertainty=uncertainty,
        seed=seed,
    )
    watched = _Watched(policy, env.keys, name)
    probability: dict[Start, list[float]] = {start: [] for start in starts}
    disagreement: dict[Start, list[float]] = {start: [] for start in starts}
    alone: dict[Start, list[float]] = {start: [] for start in starts}
    paths: dict[Start, list[Tensor]] = {start: [] for start in starts}
    layout = model.spec.layout

    def flat(observation: TensorDict, k: int) -> Tensor:
        return torch.cat([observation[key][k].flatten().float() for key in path_keys])

    def see(record: StepRecord) -> None:
        p = record.after["success_probability"][:, 0].tolist()
        u = record.after["uncertainty"][:, 0].tolist() if uncertainty else [0.0] * len(p)
        by_itself = [0.0] * len(p)
        if layout.has("hand", "object"):
            before, after = record.observation["state"], record.after["state"]
            hand, thing = layout.place("hand"), layout.place("object")
            apart = torch.minimum(*((s[:, hand] - s[:, thing]).norm(dim=1) for s in (before, after)))
            by_itself = (100 * (after - before)[:, thing].norm(dim=1) * (apart > NEAR_M)).tolist()
        for k, start in enumerate(record.starts):
            alone[start].append(by_itself[k] + (alone[start][-1] if alone[start] else 0.0))
            if path_keys:
                if not paths[start]:
                    paths[start].append(flat(record.observation, k))
                paths[start].append(flat(record.after, k))
            probability[start].append(p[k])
            disagreement[start].append(u[k])

    begun = time.perf_counter()
    run_episodes(env, watched, starts, method=name, split=split, seed=seed, max_steps=max_steps, on_step=see)
    total = time.perf_counter() - begun
    cost.add(total - watched.seconds, watched.seconds, sum(map(len, probability.values())))
    return [
        Imagining(
            np.asarray(probability[start]),
            np.asarray(disagreement[start]),
            np.asarray(alone[start]),
            torch.stack(paths[start]).double().cpu().numpy() if path_keys else np.empty((0, 0)),
        )
        for start in starts
    ]


def _by_step(one: Imagining, penalty: float, veto: float | None) -> Floats:
    """[L] how sure the judge is after each step that an episode has succeeded by then, in [0, 1]."""
    sure = one.probability - penalty * np.cumsum(one.uncertainty)
    if veto is not None:
        sure = np.where(one.alone <= veto, sure, 0.0)
    return np.clip(np.maximum.accumulate(sure), 0.0, 1.0)


def score(replicas: Sequence[Imagining], *, penalty: float = 0.0, veto: float | None = None) -> float:
    """How sure the judge is that an episode succeeds, in [0, 1]: the mean over replicas of the best step's probability.

    penalty: that much of the uncertainty accumulated so far is taken off each step's probability, so that a success
    which the ensemble lost track of on the way counts less. veto: centimetres; steps at which the object has moved by
    itself farther than that count as failures, since nothing real moves without being touched.
    """
    return float(np.mean([_by_step(one, penalty, veto)[-1] if len(one.probability) else 0.0 for one in replicas]))


def first_step(
    replicas: Sequence[Imagining], threshold: float, *, penalty: float = 0.0, veto: float | None = None
) -> int | None:
    """Control steps until the `score` of what was imagined by then reaches `threshold`; None when it never does."""
    paths = [_by_step(one, penalty, veto) for one in replicas]
    longest = max(map(len, paths))
    sure = np.mean([np.pad(path, (0, longest - len(path)), mode="edge") for path in paths if len(path)], axis=0)
    over = np.flatnonzero(sure >= threshold)
    return int(over[0]) + 1 if len(over) else None


# ------------------------------------------------------------------------------------------------ drift


def errors_of(decoded: Floats, measured: Floats, scale: Floats | Layout) -> Floats:
    """[..., L] distance between decoded and measured observations [..., L, G].

    scale: the layout of a key `state`: centimetres, the larger of hand and object. Or [G]: the root mean square over
    the numbers in these units.
    """
    if isinstance(scale, Layout):
        gap = 100 * (decoded - measured)
        hand, thing = (np.linalg.norm(gap[..., scale.place(name)], axis=-1) for name in ("hand", "object"))
        return np.maximum(hand, thing)
    return np.sqrt(np.mean(((decoded - measured) / scale) ** 2, axis=-1))


def open_loop(model: WAM, recording: Recording, keys: Sequence[str], horizon: int, scale: Floats | Layout) -> Floats:
    """`told_error` of recorded episodes, in the order of the recording."""
    starts = list(recording.actions)
    if not starts:
        return np.full((0, horizon), np.nan)
    first = cast(TensorDict, torch.stack([recording.observations[s][0] for s in starts]))
    actions = [torch.stack(recording.actions[s]) for s in starts]
    return told_error(
        model, starts, first, actions, [real_path(recording, s, keys) for s in starts], keys, horizon, scale
    )


@torch.no_grad()
def told_error(
    model: WAM,
    starts: Sequence[Start],
    first: TensorDict,
    actions: Sequence[Tensor],
    paths: Sequence[Floats],
    keys: Sequence[str],
    horizon: int,
    scale: Floats | Layout,
) -> Floats:
    """[N, H] error after 1, ..., H steps when the model is told the actions that were executed from the first frame on.

    first: [N] frames. actions: [N] of [L, A]. paths: [N] of [L + 1, G], what was measured of `keys`. NaN after an
    episode's end. The decoded observations are those of the sampled futures' mean.
    """
    found = np.full((len(starts), horizon), np.nan)
    state = model.encode(Context.from_observation(first.select(*model.spec.observation, "task")))
    lengths = [min(len(one), horizon) for one in actions]
    whole = torch.zeros(len(starts), max(lengths), model.spec.action_dim)
    for i, one in enumerate(actions):
        whole[i, : lengths[i]] = one[: lengths[i]]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    row = torch.tensor([s.row for s in starts], device=device)
    key = NoiseKey(row=row, step=torch.zeros_like(row))
    seen = imagined_frames(model, state, whole.clamp(-1, 1).to(device), keys, noise=key)
    decoded = torch.cat([seen[key].flatten(3).float() for key in keys], dim=-1).mean(1).double().cpu().numpy()
    for i, length in enumerate(lengths):
        found[i, :length] = errors_of(decoded[i, :length], paths[i][1 : length + 1], scale)
    return found


def real_path(recording: Recording, start: Start, keys: Sequence[str]) -> Floats:
    """[L + 1, G] what was measured in one episode, the numbers of `keys` one after the other."""
    frames = recording.observations[start]
    flat = torch.stack([torch.cat([o[key].flatten().float() for key in keys]) for o in frames])
    return flat.double().cpu().numpy()


def failures_in_training(provenance: Mapping[str, Any]) -> str:
    """What a checkpoint's data mixture says of failures: "some", "none" or "unknown".

    Counts episodes of behaviours that are made to fail; a behaviour may fail by chance as well, which nobody recorded.
    """
    plans = [index.get("plan") or {} for index in _indices(provenance)]
    mixtures = [plan["mixture"] for plan in plans if plan.get("mixture")]
    if not mixtures:
        return "unknown"
    return "some" if any(m.get(name, 0) for m in mixtures for name in ("failing", "near_miss", "random")) else "none"


def training_splits(provenance: Mapping[str, Any] | None) -> set[str]:
    """The splits whose start states a checkpoint was trained on, as far as it says."""
    return {str(index["split"]) for index in _indices(provenance or {}) if "split" in index}


def _indices(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    data = provenance.get("data")
    return [index for index in data if isinstance(index, Mapping)] if isinstance(data, list) else []
