"""The loop of post-training: measure, collect and learn again and again, measure.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from wamrl.agents.base import Learner, finite_rewards
from wamrl.control import ModelPolicy
from wamrl.data import EpisodeDataset
from wamrl.envs.base import RowsEnv
from wamrl.evaluation import paired, paired_return, write_episodes
from wamrl.experience import Experience, MakeEnv, experience_of
from wamrl.files import write_json
from wamrl.interfaces import WAM
from wamrl.measuring import Measurement, Measuring, RealWindows, finite
from wamrl.naming import RunError
from wamrl.provenance import versions
from wamrl.training import Log, find_state, interruptible, write_state

DECAY = 0.10  # growth of the world model's validation error that is said aloud


def posttrain(
    model: WAM,
    learner: Learner,
    env: RowsEnv | MakeEnv | None,
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
    refresh: bool = False,
    evaluate_every: int = 0,
    save_every: int = 5,
    identity: str = "",
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Improve `model` in place with `learner` and return what results.json holds, going on where `run_dir` left off.

    Args:
        model: with a policy.
        learner: how to improve it, one of `wamrl.agents`.
        env: where the learner collects, on train start states, or what makes it: it is then closed while the policy is
            measured, because some simulators allow one at a time. None for a learner that imagines by itself.
        run_dir: gets checkpoints/, log.csv, episodes.csv and results.json.
        save_model: `save_model(path, model, iteration)` writes a checkpoint.
        data: real episodes from train start states, for the world model's loss and its validation.
        frames: [F] start frames for a learner that imagines by itself.
        measuring: how the policy is measured before and after.
        iterations: of collecting and learning.
        decisions: of each row per iteration.
        num_envs: rows, for a learner that imagines by itself.
        real: whether `env` is a simulator, whose steps count.
        real_steps: control steps in it after which to stop.
        max_seconds: after which to stop.
        success_ends: whether a success ends the learner's episode; None: where the model has a success bonus.
        seed: of everything random.
        world_batch: windows per step of the world model's loss.
        world_length: control steps of such a window; None: see `RealWindows`.
        validation_fraction: of the episodes, held out.
        validation_windows: of those, that the world model's error is measured on.
        refresh: whether what the learner's actor does in `env`, a simulator, joins the episodes of `data`.
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
    if refresh and (data is None or not real or learner.kind != "collect" or learner.chunk != 1):
        raise ValueError(
            "refresh=true (the default of agent=expert_iteration) adds real roll-outs to the episodes that the world "
            "model is trained on, so it needs data=<dataset>, a simulator as env, and an agent that collects control "
            "step by control step"
        )
    windows = None
    if data is not None:
        windows = RealWindows(data, model, batch=world_batch, length=world_length, fraction=validation_fraction,
                              windows=validation_windows)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        learner.bind(model, None if windows is None else windows.draw, rows=num_envs, seed=seed)
        if refresh and not learner.updater.world_weight:  # type: ignore[attr-defined]
            raise ValueError("refresh=true adds real roll-outs to the world model's loss, but agent.world_weight is 0")
        experience = experience_of(learner, model, env, frames=frames, data=data, rows=num_envs, decisions=decisions,
                                   success_ends=success_ends)  # fmt: skip
        run = _Run(
            model, learner, experience, windows, measuring, Path(run_dir), save_model, seed, identity, real, refresh
        )
        with _disk(run.checkpoints):
            return run.go(
                iterations=iterations, real_steps=real_steps, max_seconds=max_seconds, evaluate_every=evaluate_every,
                save_every=save_every, command=command, quiet=quiet,
            )  # fmt: skip


class _Run:
    def __init__(
        self,
        model: WAM,
        learner: Learner,
        experience: Experience,
        windows: RealWindows | None,
        measuring: Measuring,
        run_dir: Path,
        save_model: Callable[[Path, WAM, int], object],
        seed: int,
        identity: str,
        real: bool,
        refresh: bool,
    ) -> None:
        self.model, self.learner, self.experience, self.windows = model, learner, experience, windows
        self.measuring, self.run_dir, self.save_model = measuring, run_dir, save_model
        self.seed, self.identity, self.real, self.refresh = seed, identity, real, refresh
        self.checkpoints = run_dir / "checkpoints"
        self.data = None if windows is None else windows.data.fingerprint()
        self.iteration, self.steps, self.seconds = 0, 0, 0.0
        self.before: dict[str, Any] = {}
        self.before_real: list[bool] = []
        self.before_returns: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}

    def go(
        self,
        *,
        iterations: int,
        real_steps: int | None,
        max_seconds: float | None,
        evaluate_every: int,
        save_every: int,
        command: str,
        quiet: bool,
    ) -> dict[str, Any]:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.learner.kind == "sb3":
            self.experience.open()  # its policy is measured too, and there is none before it has seen an environment
            self.experience.close(for_good=False)
        if not self._restore():
            found = self._measure()
            self.before, self.before_real = found.plain(), [e.success for e in found.real]
            self.before_returns = [e.episode_return for e in found.real]
            self.curve = [self._point(self.before)]
            self._save()
        before, started = self.seconds, time.perf_counter()
        log = Log(self.run_dir, self.iteration, tensorboard=False)
        reason = "all iterations done"
        try:
            with interruptible() as interrupted, log:
                while self.iteration < iterations:
                    self.seconds = before + time.perf_counter() - started
                    if interrupted():
                        self._save()
                        raise KeyboardInterrupt(
                            f"stopped after iteration {self.iteration} of {iterations}; everything so far is saved. "
                            f"Go on with: {command}"
                        )
                    if max_seconds is not None and self.seconds >= max_seconds:
                        reason = "max_seconds came first"
                        break
                    if real_steps is not None and self.steps >= real_steps:
                        reason = "the budget of real steps is spent"
                        break
                    self._iterate()
                    log.write("log", self.iteration, {"real_steps": float(self.steps), **self.metrics})
                    if not quiet:
                        self._tell(iterations)
                    if evaluate_every and self.iteration % evaluate_every == 0 and self.iteration < iterations:
                        self.experience.close(for_good=False)
                        self.curve.append(self._point(self._measure(imagined=False).plain()))
                    good = not getattr(getattr(self.learner, "updater", None), "streak", 0)
                    if self.iteration % save_every == 0 and good:
                        self._save()
            self.seconds = before + time.perf_counter() - started
            self.experience.close(for_good=False)
            after = self._measure()
            if evaluate_every and self.iteration % evaluate_every == 0 and self.curve[-1]["iteration"] < self.iteration:
                self.curve.append(self._point(after.plain()))  # a run that is made longer would have it on its way
            self._save()
        finally:
            self.experience.close()
        return self._results(after, reason)

    def _iterate(self) -> None:
        self.experience.open()
        seed = self.seed * 1_000_003 + self.iteration
        torch.manual_seed(seed)
        self.learner.begin(self.iteration)
        self.model.train()
        batch = self.experience.batch(seed)
        if self.windows is not None and self.refresh:
            whole = finite_rewards(batch).all(1)
            if bool(whole.any()):
                self.windows.add(batch[whole], self.model)
        self.metrics = self.learner.learn(batch)
        if self.real:
            self.steps += int(self.metrics["steps"])
        self.model.eval()
        self.iteration += 1

    def _tell(self, iterations: int) -> None:
        shown = {name: self.metrics[name] for name in ("success", "reward", "kl", "loss_policy", "loss_world") if
                 name in self.metrics}  # fmt: skip
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        print(f"iteration {self.iteration}/{iterations}  real steps {self.steps}  {text}", file=sys.stderr, flush=True)

    def _measure(self, *, imagined: bool = True) -> Measurement:
        own = getattr(self.learner, "policy", None)
        policy = own() if own is not None else ModelPolicy(self.model, "ode", replan_every=self.learner.chunk)
        # A policy of Stable-Baselines3 may read keys that the model does not imagine.
        return self.measuring(self.model, policy, self.windows, imagined=imagined and self.learner.kind != "sb3")

    def _point(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        return {"iteration": self.iteration, "real_steps": self.steps, **measured}

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"learner.{name}": tensor for name, tensor in self.learner.state_dict().items()}
        if self.windows is not None:
            tensors |= {f"windows.{name}": tensor for name, tensor in self.windows.state_dict().items()}
        facts = {
            "iteration": self.iteration,
            "real_steps": self.steps,
            "seconds": self.seconds,
            "before": self.before,
            "before_real": self.before_real,
            "before_returns": self.before_returns,
            "curve": self.curve,
            "identity": self.identity,
            "data": self.data,
        }
        write_state(self.checkpoints, tensors, facts)
        self.save_model(self.checkpoints / "model.safetensors", self.model, self.iteration)

    def _restore(self) -> bool:
        found = find_state(self.checkpoints)
        if found is None:
            return False
        facts = json.loads((found / "state.json").read_text(encoding="utf-8"))
        if facts["identity"] != self.identity:
            raise ValueError(
                f"{found} is the state of another run (other model, data or settings); choose another run_dir, or go "
                "on with resume=<that directory> and no other settings"
            )
        if facts.get("data", self.data) != self.data:  # states of earlier versions do not say
            raise ValueError(
                f"the data has changed since the run in {found.parent.parent} began: its held-out windows would be "
                "others now. Bring the data back as it was, or begin in another run_dir"
            )
        tensors = load_file(found / "state.safetensors")
        parts: dict[str, dict[str, Any]] = {"model": {}, "learner": {}, "windows": {}}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            parts[owner][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.learner.load_state_dict(parts["learner"])
        if self.windows is not None:
            self.windows.load_state_dict(parts["windows"], self.model)
        self.iteration, self.steps, self.seconds = facts["iteration"], facts["real_steps"], facts["seconds"]
        self.before, self.before_real, self.curve = facts["before"], facts["before_real"], facts["curve"]
        self.before_returns = facts.get("before_returns", [])  # states of earlier versions have none
        return True

    def _results(self, after: Measurement, reason: str) -> dict[str, Any]:
        plain = after.plain()
        known = self.curve[-1]["iteration"] == self.iteration > 0
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
            "curve": self.curve if known else [*self.curve, self._point(plain)],
            "world": {
                **_decay(self.before.get("world_error"), after.world_error),
                "parts": {
                    name: _decay(before["error"], after.world_parts[name]["error"], before["floor"])
                    for name, before in self.before.get("world_parts", {}).items()  # earlier states have none
                },
            },
            "last_iteration": {name: value for name, value in self.metrics.items() if math.isfinite(value)},
            "seed": self.seed,
            "versions": versions(),
        }
        if after.real and len(self.before_real) == len(after.real):
            pair = paired([e.success for e in after.real], self.before_real, names=("after", "before"))
            results["gain"] = asdict(pair)
            if len(self.before_returns) == len(after.real):
                returns = paired_return(
                    [e.episode_return for e in after.real], self.before_returns, names=("after", "before")
                )
                results["return_gain"] = asdict(returns)
            if after.imagined is not None and self.before.get("imagined_success") is not None:
                gained = after.imagined - self.before["imagined_success"]
                results["imagined_gain"] = gained
                results["imagined_gain_minus_real_gain"] = gained - pair.difference
        if after.real:
            write_episodes(self.run_dir / "episodes.csv", after.real)
        write_json(self.run_dir / "results.json", results)
        return results


def _decay(before: float | None, after: float | None, floor: float = 0.0) -> dict[str, Any]:
    """The world model's validation error before and after, and whether it grew by more than a tenth.

    floor: what its growth is relative to at least. Numbers that are not finite, which JSON has not, are None; an error
    that became one has decayed.
    """
    found: dict[str, Any] = {"error_before": finite(before), "error_after": finite(after), "growth": None,
                             "decayed": None}  # fmt: skip
    if before is None or after is None or not math.isfinite(before):
        return found
    unit = max(before, floor)
    growth = after / unit - 1.0 if unit else math.inf
    return {**found, "growth": finite(growth), "decayed": not growth <= DECAY}  # NaN too


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full disk, or a quota or limit that is reached, stops the run with a message that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        found = find_state(folder)
        kept = f"the last whole state is kept in {found}" if found else "no state had been saved yet"
        raise RunError(
            f"the disk is full, so nothing more can be written; stopped, and {kept}. Make room and resume"
        ) from error
