"""Collect episodes in the simulator, as in: python -m wamrl.collect env=metaworld/six data=rich path=data/rich.

Behaviours: `expert` (clean demonstrations), `noisy_expert` (the expert with correlated noise of a level drawn per
episode), `failing` (the expert with very strong noise, a wrong idea of where things are, or a gripper that does the
opposite), `near_miss` (the expert a few centimetres beside the object or the goal), `random` (smooth random motion)
and `policy` (a trained model or planner). A model trained on successes alone imagines only success, so a mixture is
collected.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import OneHot

from wamrl import checkpoint
from wamrl.behaviours import BEHAVIOURS, NEEDS_EXPERT, POLICY_BEHAVIOURS, Act, Action, Setting
from wamrl.cli import command, command_line, plain
from wamrl.control import ModelPolicy
from wamrl.data import EpisodeDataset, EpisodeWriter, episode_tensordict
from wamrl.evaluation import check_starts
from wamrl.files import write_json
from wamrl.interfaces import Layout, Policy, PolicyState, task_id
from wamrl.naming import unknown_name, whole_number
from wamrl.provenance import versions
from wamrl.workers import make_env, module_of, start_states

_MOST_STARTS = 100_000  # of a split, by number: an episode's name has five digits for it
_ROWS = 8  # simulators side by side; more share TorchRL's cost per step better but idle longer at the end
# What stands in a row beside what a policy may see.
_NOT_SEEN = ("action", "done", "terminated", "truncated", "reward", "snapshot", "_reset", "_step", "success",
             "simulator_error")  # fmt: skip


@dataclass
class _Job:
    """One episode that is to be collected, and what has been seen of it."""

    name: str
    task: str
    behaviour: str
    number: int
    start: int
    act: Act | None = None
    details: dict[str, Any] | None = None


def plan_episodes(
    tasks: Sequence[str],
    mixture: Mapping[str, int],
    *,
    shares: Mapping[str, float] | None = None,
    first_start: int = 0,
) -> list[tuple[str, str, str, int, int]]:
    """(name, task, behaviour, number, start) of every episode; `start` numbers are distinct within a task."""
    jobs = []
    for task in tasks:
        number, share = 0, (shares or {}).get(task, 1.0)
        for behaviour, count in mixture.items():
            for _ in range(round(share * count)):
                name = f"{task.split('/')[-1]}-{first_start + number:05d}"
                jobs.append((name, task, behaviour, number, first_start + number))
                number += 1
    return jobs


def collect(
    path: str | Path,
    env: Mapping[str, Any],
    mixture: Mapping[str, int],
    *,
    shares: Mapping[str, float] | None = None,
    split: str = "train",
    seed: int = 0,
    first_start: int = 0,
    policy: Policy | None = None,
    policy_name: str = "",
    noise: tuple[float, float] = (0.1, 0.8),
    label_behaviours: Sequence[str] = tuple(BEHAVIOURS),
    steps_after_success: int = 10,
    snapshots: bool = True,
    rows: int = _ROWS,
    progress: bool = True,
) -> EpisodeDataset | None:
    """Collect the missing episodes of a dataset and open it.

    Args:
        path: the dataset's directory. A directory with the same settings is continued.
        env: the environment's `_target_` and settings, `tasks` among them, as in configs/env.
        mixture: behaviour -> episodes per task; "policy" and "noisy_policy" need `policy`, all others but "random" a
            scripted expert.
        shares: task -> that many times the mixture's counts, rounded; 1 for tasks that are not named.
        split: the start states used.
        first_start: number of the first start state; a second round takes fresh ones.
        seed: of the noise. The noise of an episode depends on the seed, its task and its start only.
        policy: acts in episodes of behaviour "policy", which carry no labels, and of "noisy_policy", where what it
            would have done is the label, which counts in those that succeed.
        policy_name: what the dataset records about the policy.
        noise: least and greatest standard deviation of the noise of a `noisy_expert` or `noisy_policy` episode; actions
            span [-1, 1].
        label_behaviours: on whose episodes the expert's labels count as known to training. The raw label is stored
            for all but "policy", where there is an expert.
        steps_after_success: control steps that an episode goes on after its first success.
        snapshots: whether to store the full simulator state of every frame.
        rows: simulators side by side.
        progress: whether to show a progress bar on stderr.

    Returns:
        The dataset (without snapshots), or None when `split` is held out from training.

    Raises:
        ValueError: for an unknown behaviour, a policy or expert that is missing, settings that the environment refuses,
            or a directory of another dataset.
        KeyboardInterrupt: after Ctrl-C, with a message that says how to go on; whole episodes are kept.
    """
    tasks = _tasks(env)
    for behaviour, count in mixture.items():
        if behaviour not in BEHAVIOURS and behaviour not in POLICY_BEHAVIOURS:
            raise unknown_name("behaviour", behaviour, [*BEHAVIOURS, *POLICY_BEHAVIOURS])
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"the mixture asks for {count!r} episodes of '{behaviour}'; give a whole number from 0")
    for behaviour in label_behaviours:
        if behaviour not in BEHAVIOURS:
            raise unknown_name("behaviour with labels", behaviour, BEHAVIOURS)
    for behaviour in POLICY_BEHAVIOURS:
        if mixture.get(behaviour) and policy is None:
            raise ValueError(f"the mixture has episodes of '{behaviour}', but no policy was given")
    if sum(mixture.values()) == 0:
        raise ValueError("the mixture asks for no episodes; give at least one behaviour a count above 0")
    shares = dict(shares or {})
    for task, share in shares.items():
        if task not in tasks:
            raise unknown_name("task of shares", task, tasks)
        if isinstance(share, bool) or not math.isfinite(share) or share < 0:
            raise ValueError(f"shares has {share!r} for '{task}', but must have finite numbers of at least 0")
    if len({task.rpartition("/")[2] for task in tasks}) < len(tasks):
        raise ValueError(f"tasks are named twice, or alike behind the last slash: {', '.join(tasks)}")
    if not (len(noise) == 2 and 0.0 <= noise[0] <= noise[1]):
        raise ValueError(f"noise is {list(noise)}, but must be two numbers, the least and the greatest, from 0")
    for setting, value, least in (("rows", rows, 1), ("first_start", first_start, 0), ("seed", seed, 0),
                                  ("steps_after_success", steps_after_success, 0)):  # fmt: skip
        whole_number(setting, value, least)
    most = max(sum(round(shares.get(task, 1.0) * n) for n in mixture.values()) for task in tasks)
    if most == 0:
        raise ValueError("shares leave no episodes of the mixture; give at least one task a larger one")
    check_starts(first_start, most, ("first_start", "the mixture's episodes"), most=_MOST_STARTS)
    episodes = plan_episodes(tasks, mixture, shares=shares, first_start=first_start)

    given = {key: value for key, value in env.items() if key not in ("_target_", "tasks")}
    settings = {**given, "snapshots": snapshots, "split": split}
    plan = {
        "tasks": list(tasks), "mixture": dict(mixture), **({"shares": shares} if shares else {}),
        "seed": seed, "first_start": first_start,
        "steps_after_success": steps_after_success, "policy": policy_name or None,
        "noise": [float(level) for level in noise],
        "label_behaviours": list(label_behaviours), **settings,
    }  # fmt: skip
    with contextlib.closing(_make(env, tasks, 1, split=split, snapshots=snapshots)) as made:
        needed = [name for name in NEEDS_EXPERT if mixture.get(name)]
        if needed and not hasattr(module_of(made), "ExpertPolicy"):
            raise ValueError(
                f"the mixture has episodes of '{needed[0]}', but {module_of(made).__name__} has no ExpertPolicy; "
                "choose data=random, or data=planner with wam=<checkpoint>"
            )
        if mixture.get("noisy_policy") and isinstance(made.action_spec, OneHot):
            raise ValueError("noise on a policy needs continuous actions; use policy in place of noisy_policy")
        layout = getattr(made, "layout", Layout())
        if mixture.get("near_miss") and not layout.has("hand", "object", "goal"):
            raise ValueError(
                "the behaviour near_miss needs an environment whose layout says where hand, object and goal are; "
                "leave it out with data.mixture.near_miss=0"
            )
        starts = [start_states(made, task, split, 1) for task in tasks]
        full = {k: v for k, v in getattr(made, "config", settings).items() if k not in ("tasks", "num_envs")}
        index = {
            "tasks": list(tasks),
            "split": split,
            "label_behaviours": list(label_behaviours),
            "env": {**full, "name": tasks[0].partition("/")[0], "control_dt_s": made.control_dt_s},
            "layout": layout.to_dict(),
            "start_states": [_record(task, one) for task, one in zip(tasks, starts, strict=True)],
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
            for some in _groups(tasks, rows):
                queue = [job for job in jobs if job.task in some]
                if queue:
                    _collect_group(writer, env, some, queue, plan, policy, bar, rows)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped with {len(writer.names())} of {len(episodes)} episodes whole in {path}; "
                "the same settings with the same path collect the rest"
            ) from None
    return EpisodeDataset.open(path, label_behaviours=None) if split == "train" else None


def _tasks(env: Mapping[str, Any]) -> tuple[str, ...]:
    return (env["tasks"],) if isinstance(env["tasks"], str) else tuple(env["tasks"])


def _groups(tasks: Sequence[str], rows: int) -> list[tuple[str, ...]]:
    return [tuple(tasks[first : first + rows]) for first in range(0, len(tasks), rows)]


def _record(task: str, starts: Any) -> dict[str, Any]:
    """What a dataset says of its start states; those of a module of one's own may be a plain object."""
    if hasattr(starts, "record"):
        return starts.record()
    return {"task": task, "split": starts.split, "min_distance": starts.min_distance}


def _make(env: Mapping[str, Any], tasks: Sequence[str], rows: int, *, split: str, snapshots: bool) -> Any:
    """The environment of a config; what it refuses is raised as it says it."""
    settings = {"env": dict(env), "split": split, "device": env.get("device", "cpu")}
    try:
        return make_env(settings, tasks, rows, snapshots=snapshots)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError) and "'snapshots'" in str(cause):
            raise ValueError(f"{env['_target_']} cannot save its state; collect with snapshots=false") from error
        if isinstance(cause, ValueError | ImportError | FileNotFoundError):
            raise cause from error
        raise


def _collect_group(
    writer: EpisodeWriter,
    config: Mapping[str, Any],
    tasks: tuple[str, ...],
    jobs: list[_Job],
    plan: Mapping[str, Any],
    policy: Policy | None,
    bar: _Progress,
    rows: int,
) -> None:
    seed, steps_after_success = plan["seed"], plan["steps_after_success"]
    tasks = tuple(task for task in tasks if any(job.task == task for job in jobs))
    count = len(tasks) * max(1, rows // len(tasks))
    env = _make(config, tasks, count, split=plan["split"], snapshots=plan["snapshots"])
    cast = _Cast(env, tasks, policy, plan)
    queues = {task: [job for job in jobs if job.task == task][::-1] for task in tasks}
    keys = [key for key in env.observation_spec.keys() if key not in ("success", "simulator_error", "task")]
    running: list[_Job | None] = [None] * count
    seen: list[list[dict[str, NDArray[Any]]]] = [[] for _ in range(count)]  # whole batches; cut out at the end
    taken: list[list[tuple[Action, Action, float, bool]]] = [[] for _ in range(count)]
    after = [-1] * count  # steps since the first success, -1 before it
    td: TensorDict | None = None

    with contextlib.closing(env):
        while True:
            fresh, start = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
            begun = []
            for row in range(count):
                queue = queues[env.row_tasks[row]]
                if running[row] is None and queue:
                    running[row] = new = queue.pop()
                    begun.append(row)
                    fresh[row], start[row] = True, new.start
                    cast.prepare(row, new)
                    taken[row], after[row] = [], -1
            active = [row for row, job in enumerate(running) if job is not None]
            if not active:
                break
            if begun:
                request = TensorDict({}, [count], device=env.device)
                if td is not None:
                    request = td.clone(False).set("_reset", fresh[:, None].to(td.device))
                td = env.reset(request.set("start", start)).exclude("start", "_reset")
                frame = {key: td[key].cpu().numpy() for key in keys}
                for row in begun:
                    seen[row] = [frame]
            assert td is not None
            action, label = cast.act(td, running, fresh)
            td.set("action", action.to(env.action_spec.device))
            if len(active) < count:
                td.set("_step", torch.tensor([job is not None for job in running]))
            td = env.step(td)["next"]
            success, ended, terminated = (td[key].flatten().tolist() for key in ("success", "done", "terminated"))
            failed = td["simulator_error"].flatten().tolist() if "simulator_error" in td.keys() else [False] * count
            reward = td["reward"].flatten().tolist()
            frame = {key: td[key].cpu().numpy() for key in keys}
            actions, labels = action.numpy(), label.numpy()
            for row in active:
                if not failed[row]:
                    seen[row].append(frame)
                    taken[row].append((actions[row], labels[row], reward[row], success[row]))
                    if after[row] >= 0:
                        after[row] += 1
                    elif success[row]:
                        after[row] = 0
                if ended[row] or 0 <= steps_after_success <= after[row]:
                    job = running[row]
                    assert job is not None
                    if not taken[row]:
                        print(
                            f"the simulator failed in the first step of episode {job.name} (start {job.start}), which "
                            f"is left out; the same settings with path={writer.path} try it again",
                            file=sys.stderr,
                        )
                        seen[row], running[row] = [], None
                        continue
                    frames = {key: torch.from_numpy(np.stack([past[key][row] for past in seen[row]])) for key in keys}
                    over = bool(terminated[row]) and not failed[row]
                    episode = _episode(
                        frames,
                        taken[row],
                        labelled=cast.labels(job.behaviour),
                        terminated=over,
                        truncated=bool(ended[row]) and not over,
                    )
                    info = {
                        "task": job.task, "behaviour": job.behaviour, "start": job.start, "number": job.number,
                        "seed": seed, "details": job.details or {}, "simulator_error": failed[row],
                    }  # fmt: skip
                    writer.write(job.name, episode, info)
                    seen[row], running[row] = [], None
                    bar.advance(any(step[3] for step in taken[row]))


class _Cast:
    """Everybody who acts in the rows of an environment: the policy, its expert if there is one, and the behaviours."""

    def __init__(self, env: Any, tasks: Sequence[str], policy: Policy | None, plan: Mapping[str, Any]) -> None:
        self.seed = plan["seed"] & (2**63 - 1)
        make_expert = getattr(module_of(env), "ExpertPolicy", None)
        self.expert: Policy | None = None if make_expert is None else make_expert(list(tasks))
        actors = {"expert": self.expert, "policy": policy}
        self.actors = {name: actor for name, actor in actors.items() if actor is not None}
        self.states = {name: actor.initial_state(env.batch_size[0]) for name, actor in self.actors.items()}
        for state in self.states.values():
            state["row"] = torch.zeros(env.batch_size[0], dtype=torch.int64)
        self.setting = Setting(
            action_dim=env.action_spec.shape[-1],
            relabel=None if self.expert is None else self._relabel,
            layout=getattr(env, "layout", Layout()),
            gripper=getattr(self.expert, "gripper", None),
            noise=tuple(plan["noise"]),
            discrete=isinstance(env.action_spec, OneHot),
        )

    def _relabel(self, observation: TensorDict) -> Action:
        assert self.expert is not None
        first = torch.ones(1, dtype=torch.bool)
        return self.expert.act(observation, self.expert.initial_state(1), first)[0][0].cpu().numpy()

    def prepare(self, row: int, job: _Job) -> None:
        """Draw what the behaviour of the episode that begins in `row` is."""
        name = "policy" if job.behaviour in POLICY_BEHAVIOURS else "expert"
        if name in self.actors:
            state = self.actors[name].initial_state(1)
            state["row"] = torch.tensor([job.start])
            self.states[name] = _placed(self.states[name], [row], state)
        rng = np.random.Generator(np.random.PCG64([self.seed, task_id(job.task), job.start]))
        job.act, job.details = {**BEHAVIOURS, **POLICY_BEHAVIOURS}[job.behaviour](rng, self.setting)

    def labels(self, behaviour: str) -> bool:
        """Whether an episode carries clean actions beside those that were executed."""
        return behaviour == "noisy_policy" or (behaviour in BEHAVIOURS and self.expert is not None)

    def act(self, td: TensorDict, running: Sequence[_Job | None], fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Executed actions [B, A] and clean ones [B, A], zero where there is none and in idle rows."""
        action = np.zeros((len(running), self.setting.action_dim), dtype=np.float32)
        label = np.zeros_like(action)
        observation = td.exclude(*_NOT_SEEN)
        learned = [row for row, job in enumerate(running) if job is not None and job.behaviour in POLICY_BEHAVIOURS]
        scripted = [row for row, job in enumerate(running) if job is not None and job.behaviour in BEHAVIOURS]
        if scripted and self.expert is not None:
            label[scripted] = self._acted("expert", observation, scripted, fresh)
        if learned:
            chosen = self._acted("policy", observation, learned, fresh)
            if not np.isfinite(chosen).all():
                raise ValueError("the policy gave NaN or infinity as an action; the episode was not stored")
            label[learned] = chosen.clip(-1.0, 1.0)
        for row in (*scripted, *learned):
            job = running[row]
            assert job is not None and job.act is not None
            action[row] = job.act(label[row].copy(), observation, row)
        return torch.from_numpy(action), torch.from_numpy(label)

    @torch.no_grad()
    def _acted(self, name: str, observation: TensorDict, rows: Sequence[int], fresh: Tensor) -> Action:
        """Actions [R, A] of an actor in the `rows` [R], each of which has a state of its own."""
        actor, states = self.actors[name], self.states[name]
        if len(rows) == len(fresh):
            action, self.states[name] = actor.act(observation, states, fresh)
        else:
            at = torch.tensor(rows)
            there = at.to(observation.device or "cpu")
            action, after = actor.act(observation[there], states[at], fresh[at])
            self.states[name] = _placed(states, rows, after)
        return action.to("cpu", torch.float32).numpy()


def _placed(states: PolicyState, rows: Sequence[int], some: PolicyState) -> PolicyState:
    """`states` [B] with `some` [R] in the `rows` [R]."""
    index = torch.arange(len(states))
    index[rows] = torch.arange(len(states), len(states) + len(rows))
    return torch.cat([states, some])[index]


def _episode(
    frames: dict[str, Tensor],
    taken: list[tuple[Action, Action, float, bool]],
    *,
    labelled: bool,
    terminated: bool,
    truncated: bool,
) -> TensorDict:
    snapshot = frames.pop("snapshot", None)
    actions, labels, rewards, successes = zip(*taken, strict=True)
    last = torch.zeros(len(actions), dtype=torch.bool)
    last[-1] = True
    return episode_tensordict(
        frames,
        action=torch.from_numpy(np.stack(actions)),
        label=torch.from_numpy(np.stack(labels)) if labelled else None,
        reward=torch.tensor(rewards),
        success=torch.tensor(successes),
        terminated=last & terminated,
        truncated=last & truncated,
        snapshot=snapshot,
    )


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


def _policy_from(config: DictConfig, env: Mapping[str, Any]) -> tuple[Policy, str]:
    """The policy that `checkpoint`, `acting`, `planner` and `controller` describe, and its name for the records."""
    metadata = checkpoint.read_metadata(config.checkpoint)
    model = checkpoint.load(config.checkpoint, device=config.device)
    with contextlib.closing(_make(env, _tasks(env), 1, split=config.split, snapshots=False)) as made:
        checkpoint.check_environment(model.spec, made)
    name = f"{Path(str(config.checkpoint)).name} {metadata.content_sha256[:16]}"
    if config.acting == "policy":
        return ModelPolicy(model, mode="ode"), f"policy of {name}"
    if config.acting != "planner":
        raise unknown_name("value of acting", str(config.acting), ["planner", "policy"])
    policy = instantiate(config.controller, seed=config.seed)(model, instantiate(config.planner))
    return policy, f"planner in {name}: {plain(config.planner)} {plain(config.controller)}"


@command(
    "collect",
    help="Collect episodes in a simulator into a dataset to train on. The same command with the same path goes on "
    "where an interrupted one stopped.",
    examples=["env=metaworld/six data=rich path=data/rich", "env=metaworld/push-v3 data=scarce path=data/push_scarce",
              "data=demonstrations data.mixture.expert=10 path=data/few",
              "data=planner wam=six first_start=1000 path=data/round_1", "env=mjx/pusher data=random path=data/pusher"],
)  # fmt: skip
def main(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Compose, collect, report."""
    started = time.time()
    torch.set_num_threads(whole_number("threads", config.threads, 1))
    env = plain(config.env)
    if "tasks" not in env:
        raise ValueError(
            f"{env['_target_']} has no tasks to collect; choose a simulator, such as env=metaworld/push-v3"
        )
    mixture = {str(key): value for key, value in plain(config.data.mixture).items()}
    policy, name = None, ""
    if own := [behaviour for behaviour in POLICY_BEHAVIOURS if mixture.get(behaviour)]:
        if config.checkpoint is None:
            raise ValueError(f"the mixture has episodes of '{own[0]}'; say whose with wam=<checkpoint>")
        policy, name = _policy_from(config, env)
    path = Path(config.path) if config.path else run_dir / "dataset"
    try:
        collect(
            path,
            env,
            mixture,
            shares=None if config.shares is None else plain(config.shares),
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
        )
    except KeyboardInterrupt as stop:
        # Without either, the same command would begin another dataset in a directory of the present date.
        where = [] if config.path or config.run_dir else [f"path={path}"]
        raise KeyboardInterrupt(f"{stop}: {command_line('collect', *where)}".lstrip(": ")) from None
    dataset = EpisodeDataset.open(path, training=False)
    results = summary(dataset)
    results |= {"path": str(path), "wall_s": round(time.time() - started, 2), "versions": versions()}
    write_json(run_dir / "results.json", results)
    _print_summary(results)
    table = run_dir / "results.json"
    print(f"{len(dataset)} episodes, {dataset.num_steps} control steps in {path}; this table in {table}")
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
