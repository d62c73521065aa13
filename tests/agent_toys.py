"""A task with a known optimum for learners, a small reference model for it, and a small flow-matching policy."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from wamrl import checkpoint, cli
from wamrl.data import EpisodeDataset, EpisodeWriter, episode_tensordict
from wamrl.envs.base import RowsEnv, seed_start_states
from wamrl.interfaces import WAM, Anatomy, Context, Plan, Proposal, Spec, State
from wamrl.models import flow
from wamrl.models.flow_wam import FlowWAM
from wamrl.models.joint_embedding import JointEmbeddingWAM
from wamrl.noise import NoiseKey

TASK = "toy/aim-v0"
OPTIMUM = (0.5, -0.3)
STEPS = 6
start_states = seed_start_states


class AimEnv(RowsEnv):
    """Reward 1 - |a - OPTIMUM|^2 in every control step, so that the best return is STEPS; success: within 0.25.

    state: where it stands, which the action moves and nothing depends on, and a constant.
    """

    control_dt_s, action_repeat, max_steps = 0.05, 1, STEPS

    def __init__(self, num_envs: int = 8, *, split: str = "train", seed: int = 0, device: str = "cpu", tasks=(TASK,),
                 nan_after: int | None = None, nan_row: int | None = None, succeeds: bool = False) -> None:  # fmt: skip
        super().__init__(tuple(tasks), num_envs, device=device, seed=seed)
        self.place, self.count = torch.zeros(num_envs, 2), torch.zeros(num_envs, dtype=torch.int64)
        self.nan_after, self.nan_row, self.taken, self.succeeds = nan_after, nan_row, 0, succeeds
        self._declare({"state": (3,)}, (2,))

    def _start_count(self, task: str) -> int:
        return 1000

    def _show(self, rows: Tensor) -> dict[str, Tensor]:
        return {"state": torch.cat([self.place[rows], torch.ones(len(rows), 1)], dim=-1)}

    def _begin(self, rows, start, snapshot):
        draw = torch.stack([torch.sin(start * 12.9), torch.cos(start * 78.2)], dim=-1)
        self.place[rows], self.count[rows] = draw.float(), 0
        return self._show(rows)

    def _advance(self, rows, action):
        self.taken, action = self.taken + 1, action.cpu()
        self.place[rows] = (self.place[rows] + 0.1 * action).clamp(-1, 1)
        self.count[rows] += 1
        away = (action - torch.tensor(OPTIMUM)).square().sum(-1, keepdim=True)
        shown = self._show(rows)
        reward = 1.0 - away
        if self.nan_after is not None and self.taken > self.nan_after:
            reward = reward * torch.nan
        if self.nan_row is not None:
            reward[rows == self.nan_row] = torch.nan
        shown.update({
            "reward": reward, "terminated": torch.zeros(len(rows), 1, dtype=torch.bool),
            "simulator_error": torch.zeros(len(rows), 1, dtype=torch.bool),
            "truncated": (self.count[rows] >= STEPS)[:, None],
            "success": (away < 0.0625) if self.succeeds else torch.zeros(len(rows), 1, dtype=torch.bool),
        })  # fmt: skip
        return shown


SIZES = {
    "observation": {"state": [3]}, "action_dim": 2, "tasks": [TASK], "control_dt_s": 0.05, "latent_dim": 8, "width": 32,
    "dynamics_width": 16, "head_width": 16, "members": 2, "values": 2, "horizon": 4, "discount": 0.9,
    "reward_scale": 1.0, "success_bonus": 0.0,
}  # fmt: skip


def reference_model(seed: int = 0, **sizes) -> JointEmbeddingWAM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return JointEmbeddingWAM(**{**SIZES, **sizes})


FLOW_SIZES = {
    "observation": {"state": [3]}, "action_dim": 2, "tasks": [TASK], "control_dt_s": 0.05, "chunk_length": 4,
    "frame_stride": 2, "head_width": 16, "action_steps": 3, "discount": 0.9, "reward_scale": 1.0, "success_bonus": 0.0,
}  # fmt: skip


def flow_config(*, backbone: str = "mot") -> dict:
    """Of wam=fast at a size for tests."""
    sizes = {"mot": {"width": 24, "action_width": 16}, "dit": {"width": 24}}[backbone]
    config = cli.plain(cli.compose("train", ["wam=fast"]).wam)
    return {**config, **FLOW_SIZES, "backbone": {"name": backbone, **sizes, "layers": 2, "heads": 2, "head_dim": 8}}


def flow_model(seed: int = 0, **options) -> FlowWAM:
    """A real Fast-WAM for the task, whose zero-initialised layers are not quite zero."""
    model = checkpoint.build(flow_config(**options), seed=seed)
    assert isinstance(model, FlowWAM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class FlowToy(WAM):
    """A flow-matching policy of K steps, a small network by the samplers of `wamrl.models.flow`."""

    def __init__(self, *, chunk: int = 2, steps: int = 4, scale: float = 0.7, seed: int = 0) -> None:
        super().__init__()
        self.spec = Spec(
            observation={"state": (3,)}, action_dim=2, tasks=(TASK,), chunk_length=chunk, max_horizon=chunk,
            discount=0.9, control_dt_s=0.05, provides=frozenset({"policy", "log_prob", "value"}),
            anatomy=Anatomy("feature", "flow", "none", "chunked"),
        )  # fmt: skip
        self.steps, self.scale = steps, scale
        size = chunk * 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(size + 4, 32), nn.SiLU(), nn.Linear(32, size))
            self.critic = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))
        nn.init.zeros_(self.critic[-1].weight)

    def encode(self, context: Context) -> State:
        return TensorDict({"s": context.observation["state"][:, -1]}, batch_size=context.task.shape)

    def value(self, state: State) -> Tensor:
        return self.critic(state["s"]) * 10.0

    def _velocity(self, s: Tensor):
        return lambda x, t: self.network(torch.cat([x, x.new_full((len(x), 1), t), s], dim=-1))

    def propose(self, state, num, *, mode="sde", future=None, noise: NoiseKey | None = None, perturbation=None,
                horizon=None, behaviour=0) -> Proposal:  # fmt: skip
        rows, size = state.batch_size[0], self.spec.chunk_length * self.spec.action_dim
        velocity = self._velocity(state["s"].repeat_interleave(num, 0))
        noise = noise or NoiseKey.for_rows(rows)
        first, log_prob = noise.normal(num, size).flatten(0, 1), None
        if mode == "ode":
            points = flow.ode_sample(velocity, first, self.steps)
        else:
            draws = torch.stack([noise.fold(k).normal(num, size).flatten(0, 1) for k in range(self.steps)], dim=1)
            sampled = flow.sde_sample(velocity, first, draws, scale=self.scale)
            points, log_prob = sampled.points, sampled.log_prob.view(rows, num, self.steps)
        shape = (rows, num, self.spec.chunk_length, self.spec.action_dim)
        stacked = torch.stack([x.view(shape) for x in points], dim=2)
        return Proposal(actions=stacked[:, :, -1].clamp(-1.0, 1.0), chain=stacked,
                        times=torch.tensor(flow.time_grid(self.steps)), log_prob=log_prob)  # fmt: skip

    def log_prob(self, state, proposal) -> Tensor:
        rows, num = proposal.chain.shape[:2]
        velocity = self._velocity(state["s"].repeat_interleave(num, 0))
        chain, times = proposal.chain.flatten(0, 1).flatten(2), proposal.times.tolist()
        logs = []
        for k in range(self.steps):
            mean, std = flow.sde_step(chain[:, k], velocity(chain[:, k], times[k]), times[k], times[k + 1], self.scale)
            logs.append(flow.gaussian_log_prob(chain[:, k + 1], mean, std, 1))
        return torch.stack(logs, dim=-1).view(rows, num, self.steps)


class Knowing:
    """A planner that knows the optimum."""

    horizon = 4

    def initial_state(self, model, rows):
        return TensorDict({}, batch_size=[rows])

    def plan(self, model, state, plan_state, noise, budget):
        rows = state.batch_size[0]
        good = torch.tensor(OPTIMUM).expand(rows, 1, 4, 2)
        candidates = torch.cat([good, torch.zeros_like(good)], dim=1)
        weights = torch.tensor([1.0, 0.0]).expand(rows, 2)
        plan = Plan(
            actions=good[:, 0],
            value=torch.zeros(rows),
            weights=weights,
            candidates=candidates,
            scores=weights,
            evaluations=torch.zeros(rows),
            searched=torch.ones(rows, dtype=torch.bool),
        )
        return plan, plan_state


def write_dataset(path: Path, *, episodes: int = 16) -> EpisodeDataset:
    """Random episodes of AimEnv on disk."""
    env = AimEnv(episodes)
    draw = torch.Generator().manual_seed(3)
    shown, frames, actions, rewards = env.reset(), [], [], []
    frames.append(shown["state"])
    for _ in range(STEPS):
        action = torch.rand(episodes, 2, generator=draw) * 2 - 1
        after = env.step(TensorDict({"action": action}, [episodes]))["next"]
        frames.append(after["state"])
        actions.append(action)
        rewards.append(after["reward"][:, 0])
    index = {"tasks": [TASK], "split": "train", "label_behaviours": [], "env": {"name": "toy", "control_dt_s": 0.05},
             "plan": None, "provenance": {"seed": 0}}  # fmt: skip
    writer = EpisodeWriter(path, index)
    for row in range(episodes):
        episode = episode_tensordict(
            {"state": torch.stack([f[row] for f in frames])}, action=torch.stack([a[row] for a in actions]),
            reward=torch.stack([r[row] for r in rewards]), success=torch.zeros(STEPS, dtype=torch.bool),
        )  # fmt: skip
        writer.write(f"episode-{row:03d}", episode, {"task": TASK, "behaviour": "random"})
    return EpisodeDataset.open(path)
