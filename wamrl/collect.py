"""Collect episodes in the simulator, as in: python -m wamrl.collect env=metaworld/six data=rich path=data/rich.

Behaviours: `expert` (clean demonstrations), `noisy_expert` (the expert with correlated noise of a level drawn per
episode), `failing` (the expert with very strong noise, a wrong idea of where things are, or a gripper that does the
opposite), `near_miss` (the expert a few centimetres beside the object or the goal), `random` (smooth random motion)
and `policy` (a trained model or planner). A model trained on successes alone imagines only success, so a mixture is
collected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from wamrl.cli import command, plain
from wamrl.data import EpisodeDataset, EpisodeWriter, episode_tensordict
from wamrl.envs.metaworld import (
    ACTION_DIM,
    CONTACT_NAMES,
    SIMULATOR_DT_S,
    STATE_DIM,
    ExpertPolicy,
    MetaWorldEnv,
    check_task,
    start_states,
)
from wamrl.envs.rendering import Camera
from wamrl.files import write_json
from wamrl.interfaces import Policy, PolicyState, task_id
from wamrl.naming import unknown_name
from wamrl.provenance import versions

Action = NDArray[np.float32]
Relabel = Callable[[Tensor], Action]
"""The expert's action [4] in another state [39]."""
_ROWS = 8  # simulators side by side; more share TorchRL's cost per step better but idle longer at the end


class Behaviour(Protocol):
    """What acts in one episode: executed action [4] from the expert's clean `label` [4] and the `state` [39]."""

    def __call__(self, label: Action, state: Tensor) -> Action: ...


class _Noise:
    """Correlated Gaussian noise (an Ornstein-Uhlenbeck process in discrete time) with unit variance."""

    def __init__(self, rng: np.random.Generator, correlation: float) -> None:
        self._rng, self._rho = rng, correlation
        self._value = rng.standard_normal(ACTION_DIM)

    def __call__(self) -> NDArray[np.float64]:
        fresh = self._rng.standard_normal(ACTION_DIM)
        self._value = self._rho * self._value + (1.0 - self._rho**2) ** 0.5 * fresh
        return self._value


def _clip(action: NDArray[np.floating[Any]]) -> Action:
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def _expert(rng: np.random.Generator, relabel: Relabel, level: tuple[float, float]) -> tuple[Behaviour, dict[str, Any]]:
    return lambda label, state: label, {}


def _noisy_expert(
    rng: np.random.Generator, relabel: Relabel, level: tuple[float, float]
) -> tuple[Behaviour, dict[str, Any]]:
    scale, correlation = float(rng.uniform(*level)), float(rng.uniform(0.0, 0.9))
    noise = _Noise(rng, correlation)
    return lambda label, state: _clip(label + scale * noise()), {"noise": scale, "correlation": correlation}


def _failing(
    rng: np.random.Generator, relabel: Relabel, level: tuple[float, float]
) -> tuple[Behaviour, dict[str, Any]]:
    kind = str(rng.choice(["noise", "gripper", "offset"]))
    noise = _Noise(rng, 0.9)
    if kind == "noise":
        scale = float(rng.uniform(1.0, 2.5))
        return lambda label, state: _clip(label + scale * noise()), {"kind": kind, "noise": scale}
    if kind == "gripper":

        def wrong_gripper(label: Action, state: Tensor) -> Action:
            flipped = label + 0.3 * noise()
            flipped[3] = -label[3] if abs(label[3]) > 0.05 else 1.0
            return _clip(flipped)

        return wrong_gripper, {"kind": kind}
    # Misled about object and goal alike: each expert reads at least one of them.
    angle, length = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.08, 0.2)
    offset = torch.zeros(39)
    for part in (slice(4, 6), slice(36, 38)):
        offset[part] = torch.tensor([length * np.cos(angle), length * np.sin(angle)])

    def misled(label: Action, state: Tensor) -> Action:
        return _clip(relabel(state + offset) + 0.1 * noise())

    return misled, {"kind": kind, "offset_m": float(length)}


def _near_miss(
    rng: np.random.Generator, relabel: Relabel, level: tuple[float, float]
) -> tuple[Behaviour, dict[str, Any]]:
    """The expert as a poor imitator: beside the object or the goal, often carrying on as if it had what it missed."""
    part = slice(36, 39) if rng.random() < 0.3 else slice(4, 7)
    direction = rng.standard_normal(3) * (1.0, 1.0, 0.5)
    offset = float(rng.uniform(0.005, 0.08)) * direction / np.linalg.norm(direction)
    carries, scale = bool(rng.random() < 0.6), float(rng.uniform(0.0, 0.4))
    noise, near, held = _Noise(rng, 0.9), 0, None  # held: the object as seen from the hand, once it counts as grasped

    def missing(label: Action, state: Tensor) -> Action:
        nonlocal near, held
        believed = state.clone()
        believed[part] += torch.from_numpy(offset).float()
        near = near + 1 if bool((believed[4:7] - believed[0:3]).norm() < 0.05) else 0
        if carries and held is None and near >= 5:
            held = believed[4:7] - believed[0:3]
        if held is not None:
            believed[4:7] = believed[0:3] + held
        return _clip(relabel(believed) + scale * noise())

    length = float(np.linalg.norm(offset))
    return missing, {"of": "goal" if part.start == 36 else "object", "offset_m": length, "carries": carries}


def _random(rng: np.random.Generator, relabel: Relabel, level: tuple[float, float]) -> tuple[Behaviour, dict[str, Any]]:
    scale, correlation = float(rng.uniform(0.3, 1.0)), float(rng.uniform(0.8, 0.97))
    noise = _Noise(rng, correlation)
    return lambda label, state: _clip(scale * noise()), {"noise": scale, "correlation": correlation}


BEHAVIOURS: dict[str, Callable[..., tuple[Behaviour, dict[str, Any]]]] = {
    "expert": _expert,
    "noisy_expert": _noisy_expert,
    "failing": _failing,
    "near_miss": _near_miss,
    "random": _random,
}


@dataclass
class _Job:
    """One episode that is to be collected, and what has been seen of it."""

    name: str
    task: str
    behaviour: str
    number: int
    start: int
    act: Behaviour | None = None
    details: dict[str, Any] | None = None
    policy_state: PolicyState | None = None


def plan_episodes(
    tasks: Sequence[str], mixture: Mapping[str, int], *, first_start: int = 0
) -> list[tuple[str, str, str, int, int]]:
    """(name, task, behaviour, number, start) of every episode; `start` numbers are distinct within a task."""
    jobs = []
    for task in tasks:
        number = 0
        for behaviour, count in mixture.items():
            for _ in range(count):
                name = f"{task.split('/')[-1]}-{first_start + number:05d}"
                jobs.append((name, task, behaviour, number, first_start + number))
                number += 1
    return jobs


def collect(
    path: str | Path,
    tasks: str | Sequence[str],
    mixture: Mapping[str, int],
    *,
    split: str = "train",
    seed: int = 0,
    first_start: int = 0,
    policy: Policy | None = None,
    policy_name: str = "",
    noise: tuple[float, float] = (0.1, 0.8),
    label_behaviours: Sequence[str] = tuple(BEHAVIOURS),
    steps_after_success: int = 10,
    max_steps: int = 100,
    action_repeat: int = 2,
    pixels: bool = False,
    snapshots: bool = True,
    camera: Mapping[str, Any] | None = None,
    rows: int = _ROWS,
    progress: bool = True,
) -> EpisodeDataset | None:
    """Collect the missing episodes of a dataset and open it.

    Args:
        path: the dataset's directory. A directory with the same settings is continued.
        tasks: task names.
        mixture: behaviour -> episodes per task; "policy" needs `policy`.
        split: the start states used.
        first_start: number of the first start state; a second round takes fresh ones.
        seed: of the noise. The noise of an episode depends on the seed, its task and its start only.
        policy: acts in episodes of behaviour "policy"; those carry no labels.
        policy_name: what the dataset records about the policy.
        noise: least and greatest standard deviation of the noise of a `noisy_expert` episode; actions span [-1, 1].
        label_behaviours: on whose episodes the expert's labels count as known to training. The raw label is stored
            for all but "policy".
        steps_after_success: control steps that an episode goes on after its first success.
        max_steps: control steps of the longest episode.
        action_repeat: simulator steps per control step.
        pixels: whether to store images.
        snapshots: whether to store the full simulator state of every frame.
        camera: the camera's fields by name; None is the default camera.
        rows: simulators side by side.
        progress: whether to show a progress bar on stderr.

    Returns:
        The dataset (without snapshots), or None when `split` is held out from training.

    Raises:
        ValueError: for an unknown behaviour, a policy that is missing, or a directory of another dataset.
        KeyboardInterrupt: after Ctrl-C, with a message that says how to go on; whole episodes are kept.
    """
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for task in tasks:
        check_task(task)
    for behaviour, count in mixture.items():
        if behaviour not in BEHAVIOURS and behaviour != "policy":
            raise unknown_name("behaviour", behaviour, [*BEHAVIOURS, "policy"])
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"the mixture asks for {count!r} episodes of '{behaviour}'; give a whole number from 0")
    for behaviour in label_behaviours:
        if behaviour not in BEHAVIOURS:
            raise unknown_name("behaviour with labels", behaviour, BEHAVIOURS)
    if mixture.get("policy") and policy is None:
        raise ValueError("the mixture has episodes of 'policy', but no policy was given")
    if sum(mixture.values()) == 0:
        raise ValueError("the mixture asks for no episodes; give at least one behaviour a count above 0")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks are named twice: {', '.join(tasks)}")
    if not (len(noise) == 2 and 0.0 <= noise[0] <= noise[1]):
        raise ValueError(f"noise is {list(noise)}, but must be two numbers, the least and the greatest, from 0")
    for name, value in (("max_steps", max_steps), ("action_repeat", action_repeat), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    Camera(**dict(camera or {}))  # its own errors
    if steps_after_success < 0:
        raise ValueError(f"steps_after_success is {steps_after_success}, but must be at least 0")

    settings: dict[str, Any] = {
        "action_repeat": action_repeat, "max_steps": max_steps, "pixels": pixels, "snapshots": snapshots,
        "split": split, "camera": dict(camera) if camera else None,
    }  # fmt: skip
    episodes = plan_episodes(tasks, mixture, first_start=first_start)
    plan = {
        "tasks": list(tasks), "mixture": dict(mixture), "seed": seed, "first_start": first_start,
        "steps_after_success": steps_after_success, "policy": policy_name or None,
        "noise": [float(level) for level in noise],
        "label_behaviours": list(label_behaviours), **settings,
    }  # fmt: skip
    index = {
        "tasks": list(tasks),
        "split": split,
        "label_behaviours": list(label_behaviours),
        "env": {"name": "metaworld", "control_dt_s": SIMULATOR_DT_S * action_repeat, **settings},
        "start_states": [start_states(task, split, 1).record() for task in tasks],
        "plan": plan,
        "provenance": {"versions": versions(), "seed": seed},
    }
    writer = EpisodeWriter(path, index)
    removed = writer.remove_leftovers()
    if removed:
        print(f"dropped {removed} half-written episode(s) in {path}", file=sys.stderr)
    done = writer.names()
    jobs = [_Job(*episode) for episode in episodes if episode[0] not in done]
    if done and jobs and progress:
        print(f"{len(done)} of {len(episodes)} episodes are there already; collecting {len(jobs)}", file=sys.stderr)
    finished = len(episodes) - len(jobs)
    with _Progress(len(episodes), finished, enabled=progress) as bar:
        try:
            for group in _groups(tasks, rows):
                queue = [job for job in jobs if job.task in group]
                if queue:
                    _collect_group(writer, group, queue, settings, plan, policy, bar, rows)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped with {len(writer.names())} of {len(episodes)} episodes whole in {path}; "
                "the same command collects the rest"
            ) from None
    return EpisodeDataset.open(path, label_behaviours=None) if split == "train" else None


def _groups(tasks: Sequence[str], rows: int) -> list[tuple[str, ...]]:
    return [tuple(tasks[first : first + rows]) for first in range(0, len(tasks), rows)]


def _collect_group(
    writer: EpisodeWriter,
    tasks: tuple[str, ...],
    jobs: list[_Job],
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
    policy: Policy | None,
    bar: _Progress,
    rows: int,
) -> None:
    seed, steps_after_success = plan["seed"], plan["steps_after_success"]
    tasks = tuple(task for task in tasks if any(job.task == task for job in jobs))
    per_task = max(1, rows // len(tasks))
    env = MetaWorldEnv(tasks, len(tasks) * per_task, **settings)
    expert = ExpertPolicy(tasks)
    count = len(tasks) * per_task
    queues = {task: [job for job in jobs if job.task == task][::-1] for task in tasks}
    keys = [key for key in env.observation_spec.keys() if key not in ("success", "simulator_error", "task")]
    running: list[_Job | None] = [None] * count
    seen: list[list[dict[str, NDArray[Any]]]] = [[] for _ in range(count)]  # whole batches; cut out at the end
    taken: list[list[tuple[Action, Action, float, bool]]] = [[] for _ in range(count)]
    after = [-1] * count  # steps since the first success, -1 before it
    td: TensorDict | None = None

    while True:
        fresh = torch.zeros(count, 1, dtype=torch.bool)
        start = torch.zeros(count, dtype=torch.int64)
        for row in range(count):
            queue = queues[env.row_tasks[row]]
            if running[row] is None and queue:
                job = running[row] = queue.pop()
                fresh[row], start[row] = True, job.start
                _prepare(job, plan, policy, expert)
                taken[row], after[row] = [], -1
        active = torch.tensor([job is not None for job in running])
        if not active.any():
            break
        if fresh.any():
            request = TensorDict({}, [count]) if td is None else td.clone(False).set("_reset", fresh)
            td = env.reset(request.set("start", start)).exclude("start", "_reset")
            frame = {key: td[key].numpy() for key in keys}
            for row in torch.nonzero(fresh.flatten()).flatten().tolist():
                seen[row] = [frame]
        assert td is not None
        action, label = _act(td, running, fresh.flatten(), policy, expert)
        td.set("action", action)
        td.set("_step", active)
        td = env.step(td)["next"]
        success, failed, truncated = (td[key].flatten().tolist() for key in ("success", "simulator_error", "done"))
        reward = td["reward"].flatten().tolist()
        frame = {key: td[key].numpy() for key in keys}
        actions, labels = action.numpy(), label.numpy()
        for row in torch.nonzero(active).flatten().tolist():
            if not failed[row]:
                seen[row].append(frame)
                taken[row].append((actions[row], labels[row], reward[row], success[row]))
                if after[row] >= 0:
                    after[row] += 1
                elif success[row]:
                    after[row] = 0
            if truncated[row] or 0 <= steps_after_success <= after[row]:
                job = running[row]
                assert job is not None
                frames = {key: torch.from_numpy(np.stack([past[key][row] for past in seen[row]])) for key in keys}
                _store(writer, job, frames, taken[row], seed, failed[row], truncated[row])
                seen[row] = []
                running[row] = None
                bar.advance(bool(taken[row]) and any(step[3] for step in taken[row]))
    env.close()


def _prepare(job: _Job, plan: Mapping[str, Any], policy: Policy | None, expert: ExpertPolicy) -> None:
    if job.behaviour == "policy":
        assert policy is not None
        job.policy_state = policy.initial_state(1)
        job.policy_state["row"] = torch.tensor([job.start])
        job.details = {}
        return
    rng = np.random.Generator(np.random.PCG64([plan["seed"] & (2**63 - 1), task_id(job.task), job.start]))
    task = torch.tensor([task_id(job.task)])

    def relabel(state: Tensor) -> Action:
        return expert.label(state[None], task)[0].numpy()

    job.act, job.details = BEHAVIOURS[job.behaviour](rng, relabel, tuple(plan["noise"]))


def _act(
    td: TensorDict, running: Sequence[_Job | None], fresh: Tensor, policy: Policy | None, expert: ExpertPolicy
) -> tuple[Tensor, Tensor]:
    """Executed actions [B, 4] and the expert's labels [B, 4] (zero for `policy` rows and idle rows)."""
    count = len(running)
    action, label = torch.zeros(count, ACTION_DIM), torch.zeros(count, ACTION_DIM)
    scripted = [row for row, job in enumerate(running) if job is not None and job.behaviour != "policy"]
    if scripted:
        at = torch.tensor(scripted)
        label[at] = expert.label(td["state"][at], td["task"][at])
        for row in scripted:
            job = running[row]
            assert job is not None and job.act is not None
            action[row] = torch.from_numpy(job.act(label[row].numpy().copy(), td["state"][row]))
    learned = [(row, job) for row, job in enumerate(running) if job is not None and job.behaviour == "policy"]
    if learned:
        assert policy is not None
        at = torch.tensor([row for row, _ in learned])
        states = torch.cat([job.policy_state for _, job in learned])  # type: ignore[misc]
        observation = td[at].exclude("action", "done", "terminated", "truncated", "reward", "snapshot", "_reset")
        with torch.no_grad():
            chosen, states = policy.act(observation, states, fresh[at])
        if not bool(torch.isfinite(chosen).all()):
            raise ValueError("the policy gave NaN or infinity as an action; the episode was not stored")
        action[at] = chosen.to("cpu", torch.float32).clamp(-1.0, 1.0)
        for number, (_, job) in enumerate(learned):
            job.policy_state = states[number : number + 1]
    return action, label


def _store(
    writer: EpisodeWriter,
    job: _Job,
    frames: dict[str, Tensor],
    taken: list[tuple[Action, Action, float, bool]],
    seed: int,
    failed: bool,
    truncated: bool,
) -> None:
    if not taken:
        raise RuntimeError(f"the simulator failed in the first step of episode {job.name} (start {job.start})")
    snapshot = frames.pop("snapshot", None)
    actions, labels, rewards, successes = zip(*taken, strict=True)
    ended = torch.zeros(len(actions), dtype=torch.bool)
    ended[-1] = truncated or failed
    episode = episode_tensordict(
        frames,
        action=torch.from_numpy(np.stack(actions)),
        label=None if job.behaviour == "policy" else torch.from_numpy(np.stack(labels)),
        reward=torch.tensor(rewards),
        success=torch.tensor(successes),
        truncated=ended,
        snapshot=snapshot,
    )
    info = {
        "task": job.task, "behaviour": job.behaviour, "start": job.start, "number": job.number, "seed": seed,
        "details": job.details or {}, "simulator_error": failed,
    }  # fmt: skip
    writer.write(job.name, episode, info)


class _Progress:
    """A progress bar on stderr with the success rate so far; silent when not enabled."""

    def __init__(self, total: int, finished: int, *, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not enabled)
        self._task = self._bar.add_task("episodes", total=total, completed=finished)
        self._count = self._successes = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, success: bool) -> None:
        """Count one more episode."""
        self._count += 1
        self._successes += success
        text = f"episodes ({self._successes}/{self._count} successful)"
        self._bar.update(self._task, advance=1, description=text)


def _policy_from(
    config: DictConfig, tasks: Sequence[str], control_dt_s: float, pixels: tuple[int, int] | None
) -> tuple[Policy, str]:
    """The policy that `checkpoint`, `acting`, `planner` and `controller` describe, and its name for the records."""
    from hydra.utils import instantiate

    from wamrl import checkpoint
    from wamrl.control import ModelPolicy

    metadata = checkpoint.read_metadata(config.checkpoint)
    model = checkpoint.load(config.checkpoint, device=config.device).eval()
    observation: dict[str, tuple[int, ...]] = {
        "state": (STATE_DIM,),
        "proprioception": (4,),
        "contact": (len(CONTACT_NAMES),),
    }
    if pixels:
        observation["pixels"] = (3, *pixels)
    checkpoint.check_compatible(
        model.spec, observation=observation, action_dim=ACTION_DIM, tasks=tasks, control_dt_s=control_dt_s
    )
    name = f"{Path(str(config.checkpoint)).name} {metadata.content_sha256[:16]}"
    if config.acting == "policy":
        return ModelPolicy(model, mode="ode"), f"policy of {name}"
    if config.acting != "planner":
        raise unknown_name("value of acting", str(config.acting), ["planner", "policy"])
    policy = instantiate(config.controller)(model, instantiate(config.planner))
    return policy, f"planner in {name}: {plain(config.planner)} {plain(config.controller)}"


@command(
    "collect",
    help="Collect episodes in the simulator into a dataset to train on. The same command with the same path goes on "
    "where an interrupted one stopped.",
    examples=["env=metaworld/six data=rich path=data/rich", "env=metaworld/push-v3 data=scarce path=data/push_scarce",
              "data=planner wam=six first_start=1000 path=data/round_1"],
)  # fmt: skip
def main(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Compose, collect, report."""
    started = time.time()
    torch.set_num_threads(config.threads)
    env = plain(config.env)
    if env.pop("_target_") != "wamrl.envs.metaworld.MetaWorldEnv":
        raise ValueError("collect knows the Meta-World environments so far; choose env=metaworld/<task>")
    tasks = [check_task(task) for task in env.pop("tasks")]
    mixture = {str(key): int(value) for key, value in plain(config.data.mixture).items()}
    policy, name = None, ""
    if mixture.get("policy"):
        if config.checkpoint is None:
            raise ValueError("the mixture has episodes of 'policy'; say whose with wam=<checkpoint>")
        pixels = (int(env["camera"]["height"]), int(env["camera"]["width"])) if env["pixels"] else None
        policy, name = _policy_from(config, tasks, SIMULATOR_DT_S * env["action_repeat"], pixels)
    path = Path(config.path) if config.path else run_dir / "dataset"
    collect(
        path,
        tasks,
        mixture,
        split=config.split,
        seed=config.seed,
        first_start=config.first_start,
        policy=policy,
        policy_name=name,
        noise=tuple(config.data.get("noise") or (0.1, 0.8)),
        label_behaviours=plain(config.data.label_behaviours),
        steps_after_success=config.steps_after_success,
        snapshots=config.snapshots,
        rows=config.rows,
        **env,
    )
    dataset = EpisodeDataset.open(path, training=False)
    results = summary(dataset)
    results |= {"path": str(path), "wall_s": round(time.time() - started, 2), "versions": versions()}
    write_json(run_dir / "results.json", results)
    _print_summary(results)
    print(f"{len(dataset)} episodes, {dataset.num_steps} control steps in {path}")
    return results


def summary(dataset: EpisodeDataset) -> dict[str, Any]:
    """Counts, successes and mean length per task and behaviour."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for episode in dataset.episodes:
        group = groups.setdefault(episode["task"], {}).setdefault(
            episode["behaviour"], {"episodes": 0, "successes": 0, "steps": 0}
        )
        group["episodes"] += 1
        group["successes"] += int(episode["success"])
        group["steps"] += int(episode["steps"])
    return {"episodes": len(dataset), "steps": dataset.num_steps, "tasks": groups}


def _print_summary(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "behaviour", "episodes", "successful", "mean steps")
    for task, behaviours in results["tasks"].items():
        for behaviour, group in behaviours.items():
            count = group["episodes"]
            table.add_row(task, behaviour, f"{count:.0f}", f"{group['successes']:.0f}", f"{group['steps'] / count:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
