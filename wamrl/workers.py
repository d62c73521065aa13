"""Worker processes: each runs jobs, the episodes of some methods on one task, and tells of everything by events.

An event is (kind, value); `wamrl.results.Run.take` lists the kinds. Model, simulators and policies are built here from
the settings of the run.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from wamrl import checkpoint
from wamrl.control import Goals, ModelPolicy, PlannerPolicy, RandomPolicy
from wamrl.evaluation import Episode, Recording, Start, StepRecord, fidelity, imagined_return, run_episodes
from wamrl.film import Film
from wamrl.goals import EXPERT, expert_goals, goals_by_row, not_yet, one_goal, read_goal
from wamrl.interfaces import WAM, Policy
from wamrl.oracle import OracleWAM
from wamrl.results import Run, peak_rss_mib

Emit = Callable[[str, Any], None]


@dataclass(frozen=True)
class Job:
    """Episodes of some methods on one task. film: the start whose planner episode is recorded, or None."""

    task: str
    starts: tuple[tuple[str, tuple[Start, ...]], ...]
    film: Start | None


def remaining_jobs(run: Run) -> list[Job]:
    """One job per task while there are at least as many tasks as workers, otherwise one per task and method."""
    jobs: list[Job] = []
    for task in run.tasks:
        parts = [(m, tuple(run.missing(m, task))) for m in run.methods]
        parts = [(m, starts) for m, starts in parts if starts]
        # The slowest first, so that no worker ends long after the others.
        parts.sort(key=lambda p: ("oracle", "shuffled", "planner", "policy", "random", "expert").index(p[0]))
        first = next((starts[0] for m, starts in parts if m == "planner"), None)
        film = first if task not in run.traces else None
        if len(run.tasks) >= run.settings["workers"]:
            jobs += [Job(task, tuple(parts), film)] if parts else []
        else:
            jobs += [Job(task, (part,), film if part[0] == "planner" else None) for part in parts]
    return jobs


class Worker:
    """Runs jobs with a model of its own; simulators are kept while the task stays the same."""

    def __init__(self, settings: Mapping[str, Any], directory: Path, emit: Emit) -> None:
        torch.set_num_threads(settings["threads"])
        self.settings, self.directory, self.emit = settings, directory, emit
        self.model = load_model(settings)
        self._envs: dict[tuple[str, int, bool], Any] = {}
        self._goals: dict[int, Any] = {}

    @functools.cached_property
    def _every(self) -> int:
        """Control steps that the controller executes per plan; a model that only acts has no planner to ask."""
        return planner_policy(self.settings, self.model).replan_every

    def run(self, job: Job) -> None:
        """Run the job, telling of episodes as they finish."""
        for method, starts in job.starts:
            if method == "oracle":
                self._run_oracle(job.task, starts)
            else:
                self._run_method(job, method, starts)
        self.emit("memory", peak_rss_mib())

    def _env(self, task: str, rows: int, *, snapshots: bool = False) -> Any:
        key = (task, rows, snapshots)
        if key not in self._envs:
            for old in [k for k in self._envs if k[0] != task]:
                self._envs.pop(old).close()
            self._envs[key] = make_env(self.settings, [task], rows, snapshots=snapshots)
        return self._envs[key]

    def _episodes(
        self,
        env: Any,
        policy: Policy,
        method: str,
        starts: Sequence[Start],
        memory: Recording | None = None,
        **options: Any,
    ) -> None:
        """Run the episodes; of those in `memory`, tell also what the model had imagined of them."""
        judged = memory is not None and {"rollout", "reward"} <= self.model.spec.provides

        def finished(episode: Episode) -> None:
            if judged and memory is not None:
                start, every = Start(episode.task, episode.start), self._every
                episode = replace(episode, imagined_return=imagined_return(self.model, memory, start, every))
            self.emit("episode", episode)

        run_episodes(
            env,
            policy,
            starts,
            method=method,
            split=self.settings["split"],
            seed=self.settings["seed"],
            max_steps=env.max_steps,
            on_episode=finished,
            **options,
        )

    def _goals_of(self, env: Any, starts: Sequence[Start]) -> Goals | None:
        """What the planner is told of the end of these episodes; `goal=expert` has the expert run them first."""
        goal = self.settings.get("goal")
        if goal != EXPERT:
            return None if goal is None else one_goal(read_goal(goal, self.model.spec.observation))
        missing = [start for start in starts if start.row not in self._goals]
        if missing:
            expert = module_of(env).ExpertPolicy(list(env.tasks))
            options = {"split": self.settings["split"], "seed": self.settings["seed"]}
            self._goals |= expert_goals(env, expert, missing, tuple(self.model.spec.observation), **options)
        return goals_by_row(self._goals)

    def _run_method(self, job: Job, method: str, starts: Sequence[Start]) -> None:
        env = self._env(job.task, min(self.settings["num_envs"], max(len(s) for _, s in job.starts)))
        if method == "planner":
            self._run_planner(env, job, starts)
        elif method == "shuffled":
            goals = self._goals_of(env, starts)
            policy: Policy = planner_policy(self.settings, self.model, shuffle=True, goals=goals)
            self._episodes(env, policy, method, starts)
        elif method == "policy":
            memory = Recording()
            policy = model_policy(self.settings, self.model)
            self._episodes(env, policy, method, starts, memory, on_step=memory.see)
            if "planner" not in self.settings["methods"]:
                self.emit("observations", memory.some(24))
        elif method == "random":
            self._episodes(env, RandomPolicy(env.action_spec.shape[-1], seed=self.settings["seed"]), method, starts)
        elif method == "expert":
            self._episodes(env, module_of(env).ExpertPolicy(list(env.tasks)), method, starts)

    def _run_planner(self, env: Any, job: Job, starts: Sequence[Start]) -> None:
        policy = planner_policy(self.settings, self.model, goals=self._goals_of(env, starts))
        film = Film(policy, env, job.film, self.settings["video"]) if job.film else None
        memory = Recording()

        def on_step(record: StepRecord) -> None:
            memory.see(record)
            if film is not None:
                film.see(record)

        self._episodes(env, film or policy, "planner", starts, memory, on_step=on_step)
        self.emit("plan_log", policy.log)
        self.emit("observations", memory.some(24))
        if "decode" in self.model.spec.provides and "state" in self.model.spec.observation:
            horizon = int(getattr(policy.planner, "horizon", self.model.spec.max_horizon))
            errors = fidelity(self.model, memory, horizon)
            if errors is not None:
                self.emit("fidelity", (job.task, errors))
        if film is not None:
            trace = film.trace()
            self.emit("trace", trace)
            self.emit("video", trace if "note" in trace else film.write(self.directory, trace))

    def _run_oracle(self, task: str, starts: Sequence[Start]) -> None:
        env = self._env(task, min(self.settings["num_envs"], len(starts)), snapshots=True)
        policy = oracle_policy(self.settings, self.model, task)
        self._episodes(env, policy, "oracle", starts, keep_snapshot=True)
        self.emit("oracle_log", policy.log)


def spread(settings: Mapping[str, Any], directory: Path, jobs: Sequence[Job], take: Emit) -> None:
    """Run the jobs in `workers` processes (in this one if a single worker is asked for)."""
    count = min(settings["workers"], len(jobs))
    if count == 1:
        worker = Worker(settings, directory, take)
        for job in jobs:
            worker.run(job)
        return
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for item in [*jobs, *[None] * count]:
        todo.put(item)
    arguments = (settings, directory, todo, events)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        finished = 0
        while finished < count:
            try:
                kind, value = events.get(timeout=1.0)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    hint = " (killed, perhaps for lack of memory: use fewer workers or num_envs)" if dead[0] < 0 else ""
                    raise RuntimeError(f"a worker process died with exit code {dead[0]}{hint}") from None
                continue
            if kind == "error":
                of_input, text, trace = value
                if of_input:
                    raise ValueError(text)
                raise RuntimeError(f"a worker process failed:\n{trace}")
            if kind == "finished":
                finished += 1
            else:
                take(kind, value)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _work(settings: Mapping[str, Any], directory: Path, jobs: Any, events: Any) -> None:
    """A worker process: take jobs until there are none, tell of everything through `events`."""
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal reach the whole group
        signal.signal(number, signal.SIG_IGN)  # the main process decides
    emit: Emit = lambda kind, value: events.put((kind, value))  # noqa: E731
    try:
        worker = Worker(settings, directory, emit)
        while (job := jobs.get()) is not None:
            worker.run(job)
        emit("finished", None)
    except Exception as error:
        emit("error", (isinstance(error, (ValueError, FileNotFoundError)), str(error), traceback.format_exc()))


def load_model(settings: Mapping[str, Any]) -> WAM:
    """The WAM of the run's checkpoint; ValueError where a kind of model is given in its place."""
    wam = settings["wam"]
    if "_target_" in wam:
        raise ValueError(
            f"wam= names a kind of model to train ({wam['_target_'].rsplit('.', 1)[-1]}), but this command needs "
            "trained weights: wam=<shipped name, .safetensors file or run directory>; python -m wamrl.train makes them"
        )
    # Runs that were stopped before there was a setting `policy` go on without.
    own = {key: wam.get(key) for key in ("model_class", "policy")}
    return checkpoint.load(wam["checkpoint"], device=settings["device"], **own)


def make_env(
    settings: Mapping[str, Any], tasks: Sequence[str] | None, num_envs: int, *, snapshots: bool = False
) -> Any:
    """Simulators of `tasks` (None: of all that the run has), on the start states of its split."""
    options: dict[str, Any] = {"num_envs": num_envs, "split": settings["split"], "device": settings["device"]}
    if tasks is not None:
        options["tasks"] = list(tasks)
    if snapshots:
        options["snapshots"] = True
    return instantiate(settings["env"], **options)


def module_of(env: Any) -> Any:
    """The plug-in that `env` comes from: it may have `start_states` and `ExpertPolicy`."""
    return importlib.import_module(type(env).__module__)


def start_states(env: Any, task: str, split: str, num: int) -> Any:
    """The first `num` start states of a split, from the environment's method of that name or from its module."""
    own = getattr(env, "start_states", None) or module_of(env).start_states
    return own(task, split, num)


def model_policy(settings: Mapping[str, Any], model: WAM) -> ModelPolicy:
    """The model's own policy, which decides as often as the settings say."""
    every = settings["policy_replan_every"]
    every = settings["controller"]["replan_every"] if every is None else every
    return ModelPolicy(model, replan_every=every, seed=settings["seed"])


def oracle_policy(settings: Mapping[str, Any], model: WAM, task: str) -> PlannerPolicy:
    """The controller around the planner in the true simulator of `task`, at the oracle's budget."""
    oracle = OracleWAM(model, make_env(settings, [task], 1, snapshots=True))
    horizon = int(getattr(planner_policy(settings, model).planner, "horizon", oracle.spec.max_horizon))
    return planner_policy(settings, oracle, evaluations=settings["oracle_candidates"] * horizon)


def planner_policy(
    settings: Mapping[str, Any],
    model: WAM,
    *,
    shuffle: bool = False,
    evaluations: int | None = None,
    goals: Goals | None = None,
) -> PlannerPolicy:
    """The controller around the planner. shuffle: its scores mean nothing; evaluations: the budget of a plan.

    goals: of the episodes, where the setting `goal` says that there are some; without them the policy cannot act.
    """
    planner = instantiate(settings["planner"], **({"shuffle_scores": True} if shuffle else {}))
    options: dict[str, Any] = {"seed": settings["seed"]}
    if evaluations is not None:
        options["evaluations"] = evaluations
    if settings.get("goal") is not None:
        options["goal"] = not_yet if goals is None else goals
    controller = instantiate(settings["controller"], **options)
    return controller(model, planner)
