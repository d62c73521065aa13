"""Improve a World Action Model's policy by reinforcement learning: python -m wamrl.posttrain agent=ppo wam=<it>.

Load, measure, collect and learn, measure again. Where it trains is the choice of `env`: a simulator or env=imagined.
Every iteration begins with fresh episodes and draws its random numbers from the seed and its own number, so a killed
run that is resumed equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from tensordict import TensorDict

from wamrl import checkpoint, cli
from wamrl.agents.base import EpisodeEnv, Learner, value_unit
from wamrl.control import ModelPolicy
from wamrl.data import EpisodeDataset, start_frames
from wamrl.envs.base import RowsEnv
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.envs.vector import observation_keys
from wamrl.evaluation import Episode, Start, paired, run_episodes, summarise, write_episodes
from wamrl.files import write_json, write_text
from wamrl.interfaces import WAM, Layout, Policy, task_id
from wamrl.naming import RunError, unknown_name
from wamrl.provenance import versions
from wamrl.training import Log, find_state, interruptible, open_loop_errors, write_state

IMAGINED = "wamrl.imagined.make"
DECAY = 0.10  # growth of the world model's validation error that is said aloud


@dataclass
class Measurement:
    """What is known of a model at one moment.

    real: episodes in the simulator. imagined: success in its own imagination from the data's first frames, or None.
    world_error: of open-loop prediction on held-out windows (in standard deviations of the data, over the horizon), or
    the validation loss of a model that does not roll out; None without data.
    """

    real: list[Episode] = field(default_factory=list)
    imagined: float | None = None
    world_error: float | None = None

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        found: dict[str, Any] = {"imagined_success": self.imagined, "world_error": self.world_error}
        if self.real:
            found["real"] = asdict(summarise(self.real))
            found["real_by_task"] = {
                task: asdict(summarise([e for e in self.real if e.task == task]))
                for task in sorted({e.task for e in self.real})
            }
        return found


@dataclass(frozen=True)
class Measuring:
    """How models are measured. simulator: makes the environment of `split` with so many rows, or None."""

    simulator: Callable[[str, int], RowsEnv] | None
    split: str = "dev"
    episodes: int = 50
    first_start: int = 0
    rows: int = 10
    seed: int = 0


def posttrain(
    model: WAM,
    learner: Learner,
    env: RowsEnv | Callable[[], RowsEnv] | None,
    *,
    run_dir: str | Path,
    save_model: Callable[[Path, WAM, int], object],
    data: EpisodeDataset | None = None,
    frames: TensorDict | None = None,
    measuring: Measuring,
    iterations: int = 40,
    decisions: int = 128,
    num_envs: int = 16,
    real: bool = True,
    real_steps: int | None = None,
    max_seconds: float | None = None,
    success_ends: bool | None = None,
    seed: int = 0,
    world_batch: int = 64,
    world_length: int | None = None,
    validation_fraction: float = 0.05,
    validation_windows: int = 256,
    evaluate_every: int = 0,
    save_every: int = 5,
    identity: str = "",
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Improve `model` in place with `learner` and return what results.json holds, going on where `run_dir` left off.

    Args:
        model: with a policy. learner: of `wamrl.agents`.
        learner: how to improve it.
        env: where the learner collects, on train start states, or what makes it: it is then closed while the policy is
            measured, because some simulators allow one at a time. None for a learner that imagines by itself.
        run_dir: gets checkpoints/, log.csv, evaluation.csv, episodes.csv and results.json.
        save_model: `save_model(path, model, iteration)` writes a checkpoint.
        data: real episodes from train start states, for the world model's loss and its validation.
        frames: [F] start frames for a learner that imagines by itself.
        measuring: how the policy is measured before and after.
        iterations: of collecting and learning. decisions: of each row per iteration.
        decisions: of each row per iteration.
        num_envs: rows, for a learner that imagines by itself.
        real: whether `env` is a simulator, whose steps count.
        real_steps: control steps in it after which to stop.
        max_seconds: after which to stop.
        success_ends: whether a success ends the learner's episode; None: where the model has a success bonus.
        seed: of everything random.
        world_batch: windows per step of the world model's loss.
        world_length: control steps of a window; None: 5, or the chunk of a model that learns by whole ones.
        validation_fraction: of the episodes, held out. validation_windows: windows of those that are looked at.
        validation_windows: windows that the world model's error is measured on.
        evaluate_every: iterations between evaluations on the way; 0: only before and after.
        save_every: iterations between resume states.
        identity: of model, data and settings; a state of another one is refused.
        command: how to go on, for messages.
        quiet: no progress on stderr.

    Raises:
        LearningDiverged: rewards, losses or gradients stayed NaN or infinite.
        RunError: the disk is full; the last good state is kept.
        ValueError: `run_dir` holds another run, or model and learner do not fit together.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the state saved.
    """
    with torch.random.fork_rng(devices=[]):
        run = _Run(**{name: value for name, value in locals().items() if name != "quiet"})
        with _disk(run.checkpoints):
            return run.go(quiet=quiet)


class _Run:
    def __init__(self, **given: Any) -> None:
        self.given = given
        self.run_dir = Path(given["run_dir"])
        self.model: WAM = given["model"]
        self.learner: Learner = given["learner"]
        self.measuring: Measuring = given["measuring"]
        self.data: EpisodeDataset | None = given["data"]
        self.held_out: TensorDict | None = None
        self.scale: dict[str, Any] = {}
        world = None
        if self.data is not None:
            training, validation = self.data.split(given["validation_fraction"], seed=0)
            self.scale = {key: value["std"] for key, value in training.statistics().items()}
            horizon = min(10, self.model.spec.max_horizon)
            self.held_out = validation.sample(given["validation_windows"], horizon, torch.Generator().manual_seed(2))
            batch, length = given["world_batch"], given["world_length"] or _window(self.model)

            def world(generator: torch.Generator) -> TensorDict:
                return training.sample(batch, length, generator)

        self.learner.bind(self.model, world, rows=given["num_envs"], seed=given["seed"])
        self.env: RowsEnv | None = None
        self.collector: Any = None
        self.wrapped: EpisodeEnv | None = None
        self.iteration, self.steps, self.seconds = 0, 0, 0.0
        self.before: dict[str, Any] = {}
        self.before_real: list[bool] = []
        self.curve: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    # -- the loop

    def go(self, *, quiet: bool) -> dict[str, Any]:
        given = self.given
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.learner.kind == "sb3":
            self._open()  # its policy is measured too, and there is none without an environment
        if not self._restore():
            found = self.measure()
            self.before, self.before_real = found.plain(), [e.success for e in found.real]
            self.curve = [self._point(self.before)]
            self._save()
        before, started = self.seconds, time.perf_counter()
        log = Log(self.run_dir, self.iteration, tensorboard=False)
        reason = "all iterations done"
        try:
            with interruptible() as interrupted, log:
                while self.iteration < given["iterations"]:
                    self.seconds = before + time.perf_counter() - started
                    if interrupted():
                        self._save()
                        raise KeyboardInterrupt(
                            f"stopped after iteration {self.iteration} of {given['iterations']}; everything so far is "
                            f"saved. Go on with: {given['command']}"
                        )
                    if given["max_seconds"] is not None and self.seconds >= given["max_seconds"]:
                        reason = "max_seconds came first"
                        break
                    if given["real_steps"] is not None and self.steps >= given["real_steps"]:
                        reason = "the budget of real steps is spent"
                        break
                    self._iterate()
                    log.write("log", self.iteration, {"real_steps": float(self.steps), **self.metrics})
                    if not quiet:
                        self._tell()
                    every = given["evaluate_every"]
                    if every and self.iteration % every == 0 and self.iteration < given["iterations"]:
                        self._close(for_good=False)
                        self.curve.append(self._point(self.measure(imagined=False).plain()))
                    good = not getattr(getattr(self.learner, "updater", None), "streak", 0)
                    if self.iteration % given["save_every"] == 0 and good:
                        self._save()
            self.seconds = before + time.perf_counter() - started
            self._close(for_good=self.learner.kind != "sb3")
            after = self.measure()
            self._save()
        finally:
            self._close()
        return self._results(after, reason)

    def _open(self) -> None:
        """The environment that the learner collects in, with TorchRL's collector, unless they are open."""
        made = self.given["env"]
        if self.env is not None or made is None:
            return
        self.env = made if isinstance(made, RowsEnv) else made()
        if self.learner.kind == "sb3":
            self._attach(self.env)
            return
        from torchrl.collectors import Collector

        spec = self.model.spec
        self.wrapped = EpisodeEnv(
            self.env,
            keys=spec.observation,
            chunk=self.learner.chunk,
            discount=spec.discount,
            success_bonus=spec.success_bonus,
            value_unit=value_unit(self.model),
            success_ends=spec.success_bonus > 0 if self.given["success_ends"] is None else self.given["success_ends"],
        )
        self.collector = Collector(
            self.wrapped,
            self.learner.actor,
            frames_per_batch=self.wrapped.batch_size[0] * self.given["decisions"],
            total_frames=-1,
            reset_at_each_iter=True,  # so that an iteration depends on nothing but weights, seed and its number
            trust_policy=True,
            auto_register_policy_transforms=False,
        )

    def _close(self, *, for_good: bool = True) -> None:
        """Close the environment; not `for_good`: only where it can be made again as it was."""
        if not for_good and (isinstance(self.given["env"], RowsEnv) or self.learner.kind == "sb3"):
            return
        if self.collector is not None:
            self.collector.shutdown()
        if self.env is not None:
            self.env.close(raise_if_closed=False)
        self.env = self.collector = self.wrapped = None

    def _attach(self, env: RowsEnv) -> None:
        """Give Stable-Baselines3 its environment, and the data where it asks for demonstrations."""
        from wamrl.envs.sb3 import RowsSB3Env

        learner: Any = self.learner
        tasks = tuple(task_id(task) for task in env.tasks)
        keys = tuple(observation_keys(env))
        learner.attach(RowsSB3Env(env), decisions=self.given["decisions"], keys=keys, tasks=tasks)
        if learner.demonstrations:
            if self.data is None:
                raise ValueError("agent.demonstrations asks for data=<dataset>, and there is none")
            chosen = [n for n, episode in enumerate(self.data.episodes) if episode["task"] in env.tasks]
            learner.demonstrate(self.data.select(chosen).replay_buffer(1, 1)[:])

    def _iterate(self) -> None:
        self._open()
        seed = self.given["seed"] * 1_000_003 + self.iteration
        torch.manual_seed(seed)
        self.learner.begin(self.iteration)
        self.model.train()
        if self.collector is not None:
            assert self.wrapped is not None
            self.wrapped.set_seed(seed)
            batch = next(iter(self.collector)).clone()
            if self.given["real"]:
                self.steps += int(batch["next", "executed"].sum())
        elif self.learner.kind == "sb3":
            batch = TensorDict({}, batch_size=[])
        else:
            frames = self.given["frames"]
            chosen = torch.randint(
                len(frames), (self.given["num_envs"],), generator=torch.Generator().manual_seed(seed)
            )
            batch = frames[chosen]
        self.metrics = self.learner.learn(batch)
        if self.learner.kind == "sb3" and self.given["real"]:
            self.steps += int(self.metrics["steps"])
        self.model.eval()
        self.iteration += 1

    def _tell(self) -> None:
        shown = {name: self.metrics[name] for name in ("success", "reward", "kl", "loss_policy", "loss_world") if
                 name in self.metrics}  # fmt: skip
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        total = self.given["iterations"]
        print(f"iteration {self.iteration}/{total}  real steps {self.steps}  {text}", file=sys.stderr, flush=True)

    # -- measuring

    def measure(self, *, imagined: bool = True) -> Measurement:
        """The policy in the simulator and in imagination, and the world model on held-out windows."""
        self.model.eval()
        how, found = self.measuring, Measurement()
        policy = self._policy()
        if how.simulator is not None and how.episodes:
            env = how.simulator(how.split, how.rows)
            tasks = [task for task in env.tasks if task in self.model.spec.tasks]
            starts = [Start(t, how.first_start + i) for i in range(how.episodes) for t in tasks]
            found.real = run_episodes(
                env, policy, starts, method="policy", split=how.split, seed=how.seed, max_steps=env.max_steps
            )
            env.close()
        if self.held_out is not None:
            found.world_error = self._world_error()
            needed = {"rollout", "reward", "success", "decode"}
            imagined = imagined and self.learner.kind != "sb3"  # which may read keys that the model does not imagine
            if imagined and how.episodes and needed <= set(self.model.spec.provides):
                found.imagined = self._imagined_success(policy)
        return found

    def _policy(self) -> Policy:
        own = getattr(self.learner, "policy", None)
        return own() if own is not None else ModelPolicy(self.model, "ode", replan_every=self.learner.chunk)

    @torch.no_grad()
    def _world_error(self) -> float:
        assert self.held_out is not None
        device = next(self.model.parameters()).device
        windows = self.held_out.to(device)
        if {"rollout", "decode"} <= set(self.model.spec.provides):
            errors = open_loop_errors(self.model, windows, scale=self.scale)["state_error"]
            return sum(errors) / len(errors)
        return float(self.model.loss(windows, noise=torch.Generator(device=device).manual_seed(3))["loss"])

    def _imagined_success(self, policy: Policy) -> float:
        assert self.data is not None
        at = self.data.offsets
        frames = {key: self.data.frames["observation"][key][at] for key in self.model.spec.observation}
        batch = TensorDict({**frames, "task": self.data._task}, batch_size=[len(at)])
        device = next(self.model.parameters()).device
        env = ImaginedEnv(
            self.model,
            batch.to(device),
            min(64, len(at)),
            chunk=1,
            max_steps=100,
            uncertainty=False,
            device=device,
        )
        count = self.measuring.episodes
        starts = [Start(task, i) for task in env.tasks for i in range(min(count, env._start_count(task)))]
        episodes = run_episodes(env, policy, starts, method="policy", split="train", seed=0, max_steps=100)
        return summarise(episodes).success

    def _point(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        return {"iteration": self.iteration, "real_steps": self.steps, **measured}

    # -- what a run leaves behind

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"learner.{name}": tensor for name, tensor in self.learner.state_dict().items()}
        facts = {
            "iteration": self.iteration,
            "real_steps": self.steps,
            "seconds": self.seconds,
            "before": self.before,
            "before_real": self.before_real,
            "curve": self.curve,
            "identity": self.given["identity"],
        }
        write_state(self.checkpoints, tensors, facts)
        self.given["save_model"](self.checkpoints / "model.safetensors", self.model, self.iteration)

    def _restore(self) -> bool:
        found = find_state(self.checkpoints)
        if found is None:
            return False
        facts = json.loads((found / "state.json").read_text(encoding="utf-8"))
        if facts["identity"] != self.given["identity"]:
            raise ValueError(
                f"{found} is the state of another run (other model, data or settings); choose another run_dir, or go "
                "on with resume=<that directory> and no other settings"
            )
        tensors = load_file(found / "state.safetensors")
        parts: dict[str, dict[str, Any]] = {"model": {}, "learner": {}}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            parts[owner][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.learner.load_state_dict(parts["learner"])
        self.iteration, self.steps, self.seconds = facts["iteration"], facts["real_steps"], facts["seconds"]
        self.before, self.before_real, self.curve = facts["before"], facts["before_real"], facts["curve"]
        return True

    def _results(self, after: Measurement, reason: str) -> dict[str, Any]:
        plain = after.plain()
        results: dict[str, Any] = {
            "name": "posttrain",
            "iterations": self.iteration,
            "stopped": reason,
            "real_steps": self.steps,
            "seconds": round(self.seconds, 2),
            "skipped_steps": int(self.metrics.get("skipped", 0)),
            "split": self.measuring.split,
            "before": self.before,
            "after": plain,
            "curve": [*self.curve, self._point(plain)],
            "world": _decay(self.before.get("world_error"), after.world_error),
            "last_iteration": {name: value for name, value in self.metrics.items() if math.isfinite(value)},
            "seed": self.given["seed"],
            "versions": versions(),
        }
        if after.real and len(self.before_real) == len(after.real):
            pair = paired([e.success for e in after.real], self.before_real, names=("after", "before"))
            results["gain"] = asdict(pair)
            if after.imagined is not None and self.before.get("imagined_success") is not None:
                gained = after.imagined - self.before["imagined_success"]
                results["imagined_gain"] = gained
                results["imagined_gain_minus_real_gain"] = gained - pair.difference
        if after.real:
            write_episodes(self.run_dir / "episodes.csv", after.real)
        write_json(self.run_dir / "results.json", results)
        return results


def _window(model: WAM) -> int:
    """Control steps of a training window: a flow-matching model takes whole chunks, a Gaussian policy any."""
    return 5 if hasattr(model, "gaussian") else max(5, model.spec.chunk_length)


def _decay(before: float | None, after: float | None) -> dict[str, Any]:
    """The world model's validation error before and after, and whether it grew by more than a tenth."""
    if before is None or after is None:
        return {"error_before": before, "error_after": after, "growth": None, "decayed": None}
    growth = after / before - 1.0 if before else math.inf
    return {"error_before": before, "error_after": after, "growth": growth, "decayed": growth > DECAY}


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full disk stops the run with a message that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        found = find_state(folder)
        kept = f"the last whole state is kept in {found}" if found else "no state had been saved yet"
        raise RunError(
            f"the disk is full, so nothing more can be written; stopped, and {kept}. Make room and resume"
        ) from error


# ---------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `python -m wamrl.posttrain --help`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        folder, given = cli.rewritten("posttrain", given)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if "env=imagined" in given and not any(word.startswith("env.data=") for word in given):
        given.append("env.data=${dataset}")  # the start frames are those of the data
    settings = (folder / "config.yaml").read_text(encoding="utf-8") if folder else ""
    try:
        _command(given)
    except SystemExit as stopped:
        if folder and stopped.code == 2:
            # The settings of a refused resume are not those of the run.
            write_text(folder / "config.yaml", settings)
        raise


@cli.command(
    "posttrain",
    help="Improve the policy of a World Action Model by reinforcement learning, in a simulator or in its own "
    "imagination, while its world model is kept from decaying. Success is measured before and after on dev "
    "starts. Ctrl-C saves; resume=<run> goes on exactly where it stopped.",
    examples=[
        "agent=ppo env=metaworld/push-v3 wam=six data=data/rich",
        "agent=rft env=metaworld/push-v3 wam=six data=data/rich",
        "agent=distil env=imagined env@simulator=metaworld/push-v3 wam=six data=data/rich",
        "resume=outputs/posttrain/latest",
    ],
)
def _command(config: DictConfig, run_dir: Path) -> None:
    settings = cli.plain(config)
    torch.set_num_threads(settings["threads"])
    _check(settings)
    device = cli.device(settings["device"])
    imagined = settings["env"]["_target_"] == IMAGINED
    simulator = settings.get("simulator") or (None if imagined else settings["env"])
    if "_target_" not in settings["wam"]:
        name = settings["wam"]["checkpoint"]
        stored = checkpoint.read_metadata(name)
        model = checkpoint.load(name, device=device, model_class=settings["wam"].get("model_class"))
        sizes, start = stored.model, stored.content_sha256
        normalisation = stored.normalisation
    else:
        if simulator is None:
            raise ValueError("a model made anew learns nothing from its own imagination; choose a simulator for env")
        model, sizes, normalisation = _fresh(settings, simulator, device)
        start = None
    learner: Learner = instantiate(settings["agent"], _convert_="all")
    data = None
    if settings["dataset"] is not None:
        keys = None if learner.kind == "sb3" else list(model.spec.observation)
        data = _known(EpisodeDataset.open(settings["dataset"], keys=keys), model)
    env: RowsEnv | Callable[[], RowsEnv] | None = None
    if learner.kind != "imagine":

        def make() -> RowsEnv:
            return _simulator(settings["env"], model, "train", settings["num_envs"], device)

        env = _imagination(settings, model, device) if imagined else make
    frames = None
    if learner.kind == "imagine":
        if settings["dataset"] is None:
            raise ValueError("this agent imagines from real frames; name them with data=<dataset>")
        frames = _frames(settings, model).to(device)
    measuring = Measuring(
        simulator=None if simulator is None else lambda split, rows: _simulator(simulator, model, split, rows, device),
        split=settings["evaluate"],
        episodes=settings["episodes"],
        first_start=settings["first_start"],
        seed=settings["seed"],
    )
    stored_config = {**settings, "wam": sizes}
    provenance = {"seed": settings["seed"], "initial": start, "agent": settings["agent"], "device": device}
    results = posttrain(
        model,
        learner,
        env,
        run_dir=run_dir,
        save_model=lambda path, model, step: checkpoint.save(
            path, model, config=stored_config, provenance={**provenance, "step": step}, normalisation=normalisation
        ),
        data=data,
        frames=frames,
        measuring=measuring,
        real=not imagined and learner.kind != "imagine",
        identity=_identity(settings, start),
        command=f"python -m wamrl.posttrain resume={run_dir}",
        **{name: settings[name] for name in _LOOP},
    )
    print(summary(results))


_LOOP = ("iterations", "decisions", "num_envs", "real_steps", "max_seconds", "success_ends", "seed", "world_batch",
         "world_length",
         "validation_fraction", "validation_windows", "evaluate_every", "save_every")  # fmt: skip
_FREE = ("iterations", "real_steps", "max_seconds", "save_every", "threads", "run_dir", "resume", "device")


def _identity(settings: Mapping[str, Any], start: str | None) -> str:
    import hashlib

    kept = {name: value for name, value in settings.items() if name not in _FREE}
    return hashlib.sha256(json.dumps([kept, start], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check(settings: Mapping[str, Any]) -> None:
    for name, least in (("iterations", 1), ("num_envs", 1), ("decisions", 1), ("episodes", 0), ("first_start", 0),
                        ("evaluate_every", 0), ("save_every", 1), ("world_batch", 1), ("world_length", 1)):  # fmt: skip
        value = settings[name]
        if value is None and name == "world_length":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if settings["evaluate"] not in ("dev", "test"):
        raise unknown_name("evaluate", str(settings["evaluate"]), ("dev", "test"))
    if settings["evaluate"] == "test" and not settings["final_report"]:
        raise ValueError(
            "evaluate=test: choosing settings on the test starts would spoil them for the report. Use evaluate=dev, "
            "and final_report=true once, for the numbers that are published"
        )
    if settings["env"].get("split") not in (None, "train"):
        raise ValueError(f"env.split is {settings['env']['split']}, but learners see train start states only")


def _known(data: EpisodeDataset, model: WAM) -> EpisodeDataset:
    """The episodes of tasks that the model knows."""
    kept = [number for number, episode in enumerate(data.episodes) if episode["task"] in model.spec.tasks]
    if not kept:
        raise ValueError(f"the data holds {', '.join(data.tasks)}, of which the model knows none")
    return data.select(kept)


def _frames(settings: Mapping[str, Any], model: WAM) -> TensorDict:
    wanted = settings["env"].get("tasks") if settings["env"]["_target_"] == IMAGINED else None
    tasks = wanted or [t for t in model.spec.tasks if t in EpisodeDataset.open(settings["dataset"]).tasks]
    first = bool(settings["env"].get("first_only", False))
    return start_frames(settings["dataset"], keys=tuple(model.spec.observation), tasks=tasks, first_only=first)


def _imagination(settings: Mapping[str, Any], model: WAM, device: str) -> RowsEnv:
    """The model itself as the environment."""
    if settings["dataset"] is None:
        raise ValueError("env=imagined begins at real frames; name them with data=<dataset>")
    left_out = ("_target_", "wam", "data", "tasks", "first_only", "num_envs")
    options = {name: value for name, value in settings["env"].items() if name not in left_out}
    if settings["uncertainty_limit"] is not None:
        options["uncertainty_limit"] = settings["uncertainty_limit"]
    if options.get("uncertainty_limit") is None:
        options["uncertainty"] = False  # no learner reads it, and one future per row is several times cheaper
    steps = options.get("max_steps")
    if steps is not None and steps > model.spec.max_horizon:
        raise ValueError(
            f"env.max_steps is {steps}, but the model was trained to imagine {model.spec.max_horizon} control steps; "
            "choose at most that, or train it with wam.horizon and length raised"
        )
    return ImaginedEnv(model, _frames(settings, model).to(device), settings["num_envs"], device=device, **options)


def _simulator(env: Mapping[str, Any], model: WAM, split: str, rows: int, device: str) -> RowsEnv:
    given = {name: value for name, value in env.items() if name != "split"}
    made = instantiate(given, split=split, num_envs=max(rows, len(given.get("tasks") or ())), device=device)
    checkpoint.check_compatible(
        model.spec,
        observation={key: tuple(made.observation_spec[key].shape[1:]) for key in made.observation_spec.keys()},
        action_dim=made.action_spec.shape[-1],
        tasks=made.tasks,
        control_dt_s=made.control_dt_s,
    )
    return made


def _fresh(
    settings: Mapping[str, Any], env: Mapping[str, Any], device: str
) -> tuple[WAM, dict[str, Any], dict[str, Any]]:
    """An untrained model for an environment, normalised by 20 control steps of random actions in 32 episodes."""
    made = instantiate(env, split="train", num_envs=max(32, len(env.get("tasks") or ())), device=device)
    wanted = settings["observation"] or [
        key for key in ("state", "proprioception") if key in made.observation_spec.keys()
    ]
    draw = torch.Generator().manual_seed(settings["seed"])
    shown = [made.reset().select(*wanted).cpu()]
    for _ in range(20):
        action = torch.rand(made.action_spec.shape, generator=draw) * 2.0 - 1.0
        request = TensorDict({"action": action.to(device)}, batch_size=made.batch_size, device=made.device)
        shown.append(made.step(request)["next"].select(*wanted).cpu())
    path = torch.stack(shown)
    statistics = {
        key: {
            "mean": path[key].flatten(0, 1).mean(0),
            "std": path[key].flatten(0, 1).std(0).clamp_min(1e-3),
            "change": (path[key][1:] - path[key][:-1]).flatten(0, 1).square().mean(0).sqrt(),
        }
        for key in wanted
    }
    sizes = {
        **{name: value for name, value in settings["wam"].items() if name != "checkpoint"},
        "observation": {key: list(made.observation_spec[key].shape[1:]) for key in wanted},
        "action_dim": made.action_spec.shape[-1],
        "tasks": list(made.tasks),
        "control_dt_s": float(made.control_dt_s),
    }
    layout = Layout.of(made.layout, sizes["observation"])
    if layout != Layout():
        sizes["layout"] = layout.to_dict()
    made.close()
    model = checkpoint.build(sizes, seed=settings["seed"], model_class=sizes["_target_"])
    model.set_normalisation(statistics)  # type: ignore[operator]
    return model.to(device), sizes, statistics


def summary(results: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{results['iterations']} iterations, {results['real_steps']} real steps ({results['stopped']})"]
    for name in ("before", "after"):
        real = results[name].get("real")
        if real:
            lines.append(
                f"{name}: success {real['success']:.0%} ({100 * real['low']:.0f} to {100 * real['high']:.0f} %, "
                f"n={real['n']}), return {real['episode_return']:.1f} on {results['split']} starts"
            )
    if "gain" in results:
        gain = results["gain"]
        lines.append(f"gain: {gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")
    if "imagined_gain" in results:
        lines.append(f"imagined gain {results['imagined_gain']:+.3f}, minus the real one "
                     f"{results['imagined_gain_minus_real_gain']:+.3f}")  # fmt: skip
    world = results["world"]
    if world["growth"] is not None:
        lines.append(f"world model's validation error {world['error_before']:.4f} -> {world['error_after']:.4f}")
    if world["decayed"]:
        lines.append(
            f"WARNING: THE WORLD MODEL DECAYED by {world['growth']:.0%} (more than {DECAY:.0%}); its imagination and "
            "its plans are worse than before. Raise agent.world_weight or lower the learning rates"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
