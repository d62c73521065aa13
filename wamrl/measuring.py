"""How good a model is while it is post-trained: its policy on the same starts, and its world model on held-out windows.

Letters: W windows, B rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from wamrl.agents.base import loss_weights
from wamrl.data import EpisodeDataset, episode_tensordict
from wamrl.envs.base import RowsEnv
from wamrl.envs.imagined_env import ImaginedEnv
from wamrl.evaluation import Episode, Start, run_episodes, summarise
from wamrl.interfaces import WAM, Policy, task_id
from wamrl.training import open_loop_errors

_IMAGINED_STEPS = 100  # control steps of an imagined episode that is measured
_IMAGINED_ROWS = 64


def finite(value: float | None) -> float | None:
    """`value`, or None where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Measurement:
    """What is known of a model at one moment.

    real: episodes in the simulator. imagined: success in its own imagination from the data's first frames, or None.
    world_error: see `RealWindows.error`; None without data. world_parts: see `RealWindows.parts`.
    """

    real: list[Episode] = field(default_factory=list)
    imagined: float | None = None
    world_error: float | None = None
    world_parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For results.json; errors that are not finite, which JSON has not, are None."""
        parts = {name: {key: finite(value) for key, value in part.items()} for name, part in self.world_parts.items()}
        found: dict[str, Any] = {"imagined_success": self.imagined, "world_error": finite(self.world_error),
                                 "world_parts": parts}  # fmt: skip
        if self.real:
            found["real"] = asdict(summarise(self.real))
            found["real_by_task"] = {
                task: asdict(summarise([e for e in self.real if e.task == task]))
                for task in sorted({e.task for e in self.real})
            }
        return found


class RealWindows:
    """Real episodes: windows for the world model's loss, and held-out ones that say whether it decays.

    Args:
        data: from train start states.
        model: what reads them.
        batch: windows W per draw. length: control steps of a window; None: 5, or the chunk of a model that learns by
            whole ones.
        fraction: of the episodes, held out. windows: of those that the error is measured on.
    """

    def __init__(
        self, data: EpisodeDataset, model: WAM, *, batch: int, length: int | None, fraction: float, windows: int
    ) -> None:
        self.data, self.batch, self.length = data, batch, length or window_length(model)
        self.training, self.validation = data.split(fraction, seed=0)
        self.added: TensorDict | None = None
        self.scale = {key: value["std"] for key, value in self.training.statistics().items()}
        horizon = min(10, model.spec.max_horizon)
        self.held_out = self.validation.sample(windows, horizon, torch.Generator().manual_seed(2))

    def draw(self, generator: torch.Generator) -> TensorDict:
        """Windows [W] in the batch contract of `WAM.loss`."""
        return self.training.sample(self.batch, self.length, generator)

    def add(self, batch: TensorDict, model: WAM) -> None:
        """Join what the policy did in a simulator, batch [B, T] of one control step per decision, to what is drawn.

        All successes count as worth imitating, and what the model holds for possible is widened to what it saw.
        """
        after = ("done", "terminated", "success", "simulator_error", "task_reward", *model.spec.observation)
        kept = batch.select("action", "task", *model.spec.observation, *(("next", key) for key in after)).cpu()
        self.added = kept if self.added is None else torch.cat([self.added, kept])
        self._join(kept, model)

    def _join(self, batch: TensorDict, model: WAM) -> None:
        fresh = _episodes(batch, model, self.training.indices)
        if fresh is None:
            return
        self.training = self.training.joined(fresh)
        widen = getattr(model, "set_extent", None)
        if widen is not None:
            widen(fresh.extent(self._usual), widen=True)

    @functools.cached_property
    def _usual(self) -> dict[str, dict[str, Tensor]]:
        """What the data's numbers usually change by, among others; asked for by every iteration that adds some."""
        return self.data.statistics()

    def state_dict(self) -> dict[str, Tensor]:
        """What was added, for a run that is to go on; the data itself is read again."""
        return {} if self.added is None else dict(self.added.flatten_keys(".").items())

    def load_state_dict(self, state: Mapping[str, Tensor], model: WAM) -> None:
        """What `state_dict` gave."""
        if state:
            self.added = TensorDict(dict(state), batch_size=state["action"].shape[:2]).unflatten_keys(".")
            self._join(self.added, model)

    @torch.no_grad()
    def error(self, model: WAM) -> float:
        """Of open-loop prediction, in standard deviations of the data, over the horizon.

        Of a model that does not roll out actions, the validation loss without the policy's and the values' parts, which
        are to move away from the data.
        """
        device = next(model.parameters()).device
        windows = self.held_out.to(device)
        if {"rollout", "decode"} <= set(model.spec.provides):
            errors = open_loop_errors(model, windows, scale=self.scale).get("state_error")
            if errors is not None:
                return sum(errors) / len(errors)
        with loss_weights(model, policy=0.0, value=0.0):
            return float(model.loss(windows, noise=torch.Generator(device=device).manual_seed(3))["loss"])

    @torch.no_grad()
    def parts(self, model: WAM) -> dict[str, dict[str, float]]:
        """How wrong `model` is about reward, success and life, those it has a loss for, on held-out windows.

        Returns by name:
            error: the part of `WAM.loss`, smooth L1 of rewards or cross-entropy in nats. floor: below which an error
            counts as none: 1 % of what the mean reward as a guess gets (1e-4 at least), and of a coin's ln 2.
        """
        if type(model).loss is WAM.loss:
            return {}
        device, members = next(model.parameters()).device, getattr(model, "members", 1)
        rows = max(members, len(self.held_out) // members * members)  # an ensemble shares them out
        windows = self.validation.sample(rows, window_length(model), torch.Generator().manual_seed(4)).to(device)
        losses = model.loss(windows, noise=torch.Generator(device=device).manual_seed(5))
        reward = windows["reward"][windows["valid"]]
        guess = float(F.smooth_l1_loss(reward.mean().expand_as(reward), reward))
        floors = {"reward": max(1e-4, 0.01 * guess), "success": 0.01 * math.log(2.0), "alive": 0.01 * math.log(2.0)}
        return {
            name: {"error": float(losses[name]), "floor": floor} for name, floor in floors.items() if name in losses
        }

    def first_frames(self, model: WAM) -> TensorDict:
        """The first frame of every episode, as `model` observes it."""
        at = self.data.offsets
        frames = {key: self.data.frames["observation"][key][at] for key in model.spec.observation}
        return TensorDict({**frames, "task": self.data._task}, batch_size=[len(at)])


def _episodes(batch: TensorDict, model: WAM, indices: Sequence[Mapping[str, Any]]) -> EpisodeDataset | None:
    """The episodes in batch [B, T], those that are cut off by its end included; None where there is none.

    A step in which the simulator failed shows nothing, and is left out. indices: of the data they join.
    """
    names = {task_id(task): task for task in model.spec.tasks}
    episodes, infos = [], []
    for row in batch:
        ends = (row["next", "done"][:, 0].nonzero()[:, 0] + 1).tolist()
        for first, end in zip([0, *ends], [*ends, len(row)], strict=True):
            end -= int(first < end and bool(row["next", "simulator_error"][end - 1]))
            if first >= end:
                continue
            steps, after = row[first:end], row["next"][first:end]
            success = after["success"][:, 0]
            # A learner's episode ends with its success, but the task goes on: it is cut short, not over.
            over = after["terminated"][:, 0] & ~success
            episodes.append(
                episode_tensordict(
                    {key: torch.cat([steps[key], after[key][-1:]]) for key in model.spec.observation},
                    action=steps["action"],
                    reward=after["task_reward"][:, 0],
                    success=success,
                    terminated=over,
                    truncated=after["done"][:, 0] & ~over,
                )
            )
            infos.append({"task": names[int(steps["task"][0])], "behaviour": "policy", "split": "train",
                          "steps": end - first, "success": bool(success.any())})  # fmt: skip
    return EpisodeDataset.from_episodes(episodes, infos, indices) if episodes else None


@dataclass(frozen=True)
class Measuring:
    """How models are measured. simulator: makes the environment of `split` with so many rows, or None."""

    simulator: Callable[[str, int], RowsEnv] | None
    split: str = "dev"
    episodes: int = 50
    first_start: int = 0
    rows: int = 10
    seed: int = 0

    def __call__(
        self, model: WAM, policy: Policy, windows: RealWindows | None = None, *, imagined: bool = True
    ) -> Measurement:
        """`policy` in the simulator and, with `imagined`, in what `model` imagines; the world model on `windows`."""
        model.eval()
        found = Measurement()
        if self.simulator is not None and self.episodes:
            env = self.simulator(self.split, self.rows)
            tasks = [task for task in env.tasks if task in model.spec.tasks]
            starts = [Start(task, self.first_start + number) for number in range(self.episodes) for task in tasks]
            found.real = run_episodes(
                env, policy, starts, method="policy", split=self.split, seed=self.seed, max_steps=env.max_steps
            )
            env.close()
        if windows is not None:
            found.world_error, found.world_parts = windows.error(model), windows.parts(model)
            needed = {"rollout", "reward", "success", "decode"}
            if imagined and self.episodes and needed <= set(model.spec.provides):
                found.imagined = self._imagined_success(model, policy, windows)
        return found

    def _imagined_success(self, model: WAM, policy: Policy, windows: RealWindows) -> float:
        device = next(model.parameters()).device
        frames = windows.first_frames(model).to(device)
        rows = min(_IMAGINED_ROWS, len(frames))
        env = ImaginedEnv(model, frames, rows, chunk=1, max_steps=_IMAGINED_STEPS, uncertainty=False, device=device)
        starts = [Start(task, i) for task in env.tasks for i in range(min(self.episodes, env._start_count(task)))]
        episodes = run_episodes(env, policy, starts, method="policy", split="train", seed=0, max_steps=_IMAGINED_STEPS)
        return summarise(episodes).success


def window_length(model: WAM) -> int:
    """Control steps of a training window: a flow-matching model takes whole chunks, a Gaussian policy any."""
    return 5 if hasattr(model, "gaussian") else max(5, model.spec.chunk_length)
