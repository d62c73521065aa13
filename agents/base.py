"""What learners share: the environment as they see it, one optimiser step with the world model's loss in it, windows.

Letters: B rows, T decisions of a batch, C control steps of one decision (`chunk`), A action dims, W windows.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from wamrl.interfaces import WAM, Context, State
from wamrl.naming import RunError, is_number, whole_number

WorldBatch = Callable[[torch.Generator], TensorDict]
"""Draws real windows [W] in the batch contract of `WAM.loss`."""


class LearningDiverged(RunError):
    """Rewards, losses or gradients stayed NaN or infinite; the last good checkpoint is kept on disk."""


class EpisodeEnv(EnvBase):
    """Another environment as learners see it: chunks of actions, success as an end, rewards in units of the critic.

    The reward of a decision is the sum over its control steps, discounted within the decision, of reward +
    `success_bonus` * success, divided by `value_unit`: what `WAM.value` estimates, in the unit of its heads. With
    `success_ends`, success is an absorbing state: the episode terminates and what that step was worth is paid for ever,
    (r + bonus) / (1 - discount), which is what the model's values mean by a success and saves the steps after it.

    Keys of a row: the observation keys of `env` that `keys` names and `task`; `success` bool [1], at any control step
    of the decision; `executed` int64 [1], its control steps; `task_reward` float32 [1], the sum of the task's rewards;
    `simulator_error` bool [1], whether the simulator failed in it.

    Args:
        env: rows in the layout of wamrl's environments; actions [B, A].
        keys: observation keys that the learner reads.
        chunk: control steps per decision; above 1 actions are [B, C, A].
        discount: per control step. success_bonus, value_unit: as in the model.
        success_bonus: what a control step in success is worth beside its reward.
        value_unit: what rewards are divided by.
        success_ends: whether a success terminates.
    """

    batch_locked = True

    def __init__(
        self,
        env: EnvBase,
        *,
        keys: Iterable[str],
        chunk: int = 1,
        discount: float = 0.97,
        success_bonus: float = 0.0,
        value_unit: float = 1.0,
        success_ends: bool = True,
    ) -> None:
        super().__init__(device=env.device, batch_size=env.batch_size)
        if env.action_spec.ndim != 2:
            raise ValueError(
                f"the environment's actions have shape {tuple(env.action_spec.shape[1:])} per row, but learners give "
                "one action per control step; make it with chunk=1 and set the learner's own chunk"
            )
        if not isinstance(env.action_spec, Bounded):
            raise ValueError("learners give continuous actions in [-1, 1], but this environment takes one-hot ones")
        self.env, self.chunk, self.discount = env, chunk, discount
        self.success_bonus, self.value_unit, self.success_ends = success_bonus, value_unit, success_ends
        self.keys = tuple(keys)
        self.tasks, self.row_tasks = tuple(env.tasks), tuple(env.row_tasks)
        self.max_steps, self.control_dt_s = env.max_steps, env.control_dt_s
        self._shown: TensorDict | None = None
        rows, action_dim = env.action_spec.shape
        device = env.device
        entries: dict[str, Any] = {key: env.observation_spec[key].clone() for key in (*self.keys, "task", "success")}
        entries["executed"] = Unbounded((rows, 1), dtype=torch.int64, device=device)
        entries["simulator_error"] = env.observation_spec["success"].clone()
        entries["task_reward"] = Unbounded((rows, 1), dtype=torch.float32, device=device)
        self.observation_spec = Composite(entries, shape=self.batch_size, device=device)
        shape = (rows, action_dim) if chunk == 1 else (rows, chunk, action_dim)
        self.action_spec = Bounded(-1.0, 1.0, shape=shape, dtype=torch.float32, device=device)
        self.reward_spec = Unbounded((rows, 1), dtype=torch.float32, device=device)
        self.full_done_spec = env.full_done_spec.clone()

    def _set_seed(self, seed: int | None) -> None:
        self.env.set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if self._shown is None or mask is None or bool(mask.all()):
            self._shown = self.env.reset()
        else:
            request = self._shown.exclude("reward", "snapshot").set("_reset", mask.reshape(-1, 1))
            self._shown = self.env.reset(request).exclude("_reset")
        rows = self.batch_size[0]
        out = self._shown.select(*self.keys, "task", "success", "done", "terminated", "truncated").clone()
        out["executed"] = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        out["task_reward"] = torch.zeros(rows, 1, device=self.device)
        out["simulator_error"] = torch.zeros(rows, 1, dtype=torch.bool, device=self.device)
        return out

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        assert self._shown is not None, "step was called before reset"
        rows = self.batch_size[0]
        action = tensordict["action"].detach().clamp(-1.0, 1.0).reshape(rows, self.chunk, -1)
        asked = tensordict.get("_step", None)
        live = torch.ones(rows, 1, dtype=torch.bool, device=self.device) if asked is None else asked.reshape(rows, 1)
        reward, plain = torch.zeros(rows, 1, device=self.device), torch.zeros(rows, 1, device=self.device)
        executed = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        success, terminated, truncated, failed = (torch.zeros_like(live) for _ in range(4))
        after = self._shown
        for number in range(self.chunk):
            if not bool(live.any()):
                break
            request = TensorDict({"action": action[:, number]}, batch_size=[rows], device=self.device)
            if not bool(live.all()):
                request["_step"] = live
            after = self.env.step(request)["next"]
            won = after["success"] & live
            gained = after["reward"] + self.success_bonus * won.float()
            over = after["terminated"] & live
            if self.success_ends:
                # Rewards of the absorbing state follow at once: r + discount r + discount^2 r + ...
                gained = torch.where(won, gained / (1.0 - self.discount), gained)
                over = over | won
            reward = torch.where(live, reward + self.discount**number * gained / self.value_unit, reward)
            plain = torch.where(live, plain + after["reward"], plain)
            executed += live
            success, terminated = success | won, terminated | over
            truncated = truncated | (after["truncated"] & live & ~over)
            failed = failed | (after["simulator_error"] & live)
            live = live & ~terminated & ~truncated
        self._shown = after
        out = after.select(*self.keys, "task").clone()
        for key, value in {
            "success": success, "executed": executed, "task_reward": plain, "reward": reward,
            "terminated": terminated, "truncated": truncated, "done": terminated | truncated,
            "simulator_error": failed,
        }.items():  # fmt: skip
            out[key] = value
        return out

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment behind it."""
        self.env.close(raise_if_closed=False)
        super().close(raise_if_closed=raise_if_closed)


@runtime_checkable
class Learner(Protocol):
    """Improves a model's policy in place; what `python -m wamrl.posttrain` drives.

    chunk: control steps per decision of its `actor`. kind: "collect" learns from batches of the actor in an
    environment; "imagine" rolls the model out by itself and is handed real start frames instead.
    """

    chunk: int
    kind: str

    def bind(self, model: WAM, world: WorldBatch | None, *, rows: int, seed: int) -> None:
        """Take the model, where real windows come from (None: nowhere), the rows B of a batch, and the seed."""
        ...

    def begin(self, iteration: int) -> None:
        """Seed everything random of that iteration: a resumed run draws what an uninterrupted one did."""
        ...

    @property
    def actor(self) -> Any:
        """A TensorDict module that writes `action` and what `learn` needs beside it; for TorchRL's collectors."""
        ...

    def learn(self, batch: TensorDict) -> dict[str, float]:
        """One iteration on batch [B, T] of the collector ("imagine": start frames [B]); what to log of it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that goes on from iteration to iteration beside the model's weights."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave."""
        ...


def encode(model: WAM, observation: TensorDictBase, *, gradient: bool = False) -> State:
    """State [R] of observations [R]; without `gradient` learning does not reach the encoder."""
    keys = (*model.spec.observation, "task")
    with contextlib.nullcontext() if gradient else torch.no_grad():
        return model.encode(Context.from_observation(observation.select(*keys)))


def value_unit(model: WAM) -> float:
    """What rewards and values are divided by so that values are about 1: the unit of the model's own value heads."""
    return float(getattr(model, "value_unit", 1.0 / (1.0 - model.spec.discount)))


def require_log_prob(model: WAM, learner: str) -> None:
    """Raise ValueError when `model` has no policy whose log-probs can be replayed."""
    missing = [query for query in ("policy", "log_prob", "value") if query not in model.spec.provides]
    if missing:
        raise ValueError(
            f"agent={learner} needs a policy with log-probs and a critic, but this model "
            f"({model.spec.anatomy.backbone}, {model.spec.anatomy.coupling}) does not answer "
            f"{', '.join(missing)}; use agent=rft, which imitates, or a model that does, such as wam=reference"
        )


def check_horizon(model: WAM, name: str, horizon: int, longest: int) -> None:
    """Raise ValueError for a horizon that the model is not meant for."""
    if isinstance(horizon, bool) or not isinstance(horizon, int) or not 1 <= horizon <= longest:
        raise ValueError(
            f"{name} is {horizon!r}, but this model is meant for 1 to {longest} control steps; what lies beyond is "
            "made up. Choose a shorter one, or train the model with wam.horizon and length raised"
        )


def reference_of(model: WAM) -> WAM:
    """A frozen copy: the policy that learning may not move too far from."""
    frozen = copy.deepcopy(model).eval()
    return frozen.requires_grad_(False)


@contextlib.contextmanager
def loss_weights(model: WAM, **weights: float) -> Iterator[None]:
    """Weights of the parts of `WAM.loss` for a while, where the model names them (`model.loss_weights`)."""
    own = getattr(model, "loss_weights", None)
    if own is None:
        yield
        return
    before = dict(own)
    own.update({name: weight for name, weight in weights.items() if name in own})
    try:
        yield
    finally:
        own.clear()
        own.update(before)


def require_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf, above: float | None = None
) -> None:
    """Raise ValueError unless `value` is a finite number from `least` to `most`, and above `above`."""
    if is_number(value) and least <= value <= most and (above is None or value > above):
        return
    bounds = {"above": above, "at least": least, "at most": most}
    told = " and ".join(
        f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None and abs(bound) < math.inf
    )
    raise ValueError(f"{name} is {value!r}, but must be a number {told}".strip())


def noise_bounds(noise: object) -> tuple[float, float]:
    """The least and the greatest standard deviation of an action; ValueError for anything else than two of them."""
    found = tuple(noise) if isinstance(noise, Sequence) else ()
    if len(found) != 2 or not all(is_number(each) for each in found) or not 0.0 < found[0] <= found[1]:
        raise ValueError(
            f"noise is {noise!r}, but must be the least and the greatest deviation of an action, above 0: [0.05, 0.5]"
        )
    return float(found[0]), float(found[1])


@dataclass(frozen=True)
class Rates:
    """How fast which weights learn from what: the settings that all learners share.

    learning_rate: of the policy, the critic and the learner's own modules. world_learning_rate: of everything else in
    the model; the same where no weights are its policy's alone. world_weight: of `WAM.loss` in the objective; 0 leaves
    it out, and the world model's weights alone. imitation_weight: of the imitation of the data's labels inside
    `WAM.loss`, where the model can tell it apart. clip_norm: of the whole gradient. non_finite_limit: steps in a row
    that may be left out because something is NaN or infinite, before `LearningDiverged`.
    """

    learning_rate: float
    world_learning_rate: float
    world_weight: float
    imitation_weight: float
    clip_norm: float = 1.0
    non_finite_limit: int = 20

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            require_number(name, getattr(self, name), above=0.0)
        for name in ("world_learning_rate", "world_weight", "imitation_weight"):
            require_number(name, getattr(self, name), least=0.0)
        whole_number("non_finite_limit", self.non_finite_limit, 1)


class Updater:
    """One optimiser for a model and a learner's own modules, with the world model's loss in the objective.

    Steps whose loss or gradient is not finite are left out and counted; `rates.non_finite_limit` of them in a row raise
    `LearningDiverged`.

    Args:
        model: trained in place.
        world: where real windows come from, or None.
        rates: how fast what learns.
        modules: the learner's own.
        keep_values: whether the values inside `WAM.loss` keep their weight; a learner whose critic they are trains them
            itself.
        train_all: whether everything else is trained without the world model's loss too.
    """

    def __init__(
        self,
        model: WAM,
        world: WorldBatch | None,
        rates: Rates,
        *,
        modules: Iterable[nn.Module] = (),
        keep_values: bool = False,
        train_all: bool = False,
    ) -> None:
        learning_rate, world_learning_rate = rates.learning_rate, rates.world_learning_rate
        world_weight = rates.world_weight
        if world_weight and world is None:
            raise ValueError(
                f"world_weight is {world_weight}, but there are no real windows to keep the world model on; name them "
                "with data=<dataset>, or give it up with agent.world_weight=0"
            )
        self.model, self.world = model, world
        self.world_weight = world_weight
        self.weights = {"policy": rates.imitation_weight, **({} if keep_values else {"value": 0.0})}
        self.clip_norm, self.limit = rates.clip_norm, rates.non_finite_limit
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A model says which weights are its policy's and critic's alone; else all of them are trained alike.
        chosen = getattr(model, "policy_parameters", lambda: None)()
        if chosen is None and (world_weight or train_all) and world_learning_rate != learning_rate:
            raise ValueError(
                f"world_learning_rate is {world_learning_rate:g} and learning_rate {learning_rate:g}, but no weights "
                f"of this model ({model.spec.anatomy.backbone}) are its policy's alone, so that all of them learn at "
                f"one rate; set agent.world_learning_rate={learning_rate:g}, or choose a model whose actions have an "
                "expert of their own, such as wam/backbone=mot"
            )
        policy = trained if chosen is None else list(chosen)
        self.policy = policy
        held = {id(parameter) for parameter in policy}
        rest = [parameter for parameter in trained if id(parameter) not in held]
        own = [parameter for module in modules for parameter in module.parameters() if id(parameter) not in held]
        groups: list[dict[str, Any]] = [{"params": [*policy, *own], "lr": learning_rate}]
        joins = bool(world_weight or train_all)
        if rest and joins:
            groups.append({"params": rest, "lr": world_learning_rate})
        self.left_alone = [] if joins else rest
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.learning_rates = [float(group["lr"]) for group in groups]
        self.optimiser = torch.optim.Adam(groups, fused=True)
        self.skipped = self.streak = 0
        self.device = next(model.parameters()).device
        # What to learn from is chosen on the CPU, as data is; the model draws its noise where it is. On a CPU both are
        # one and the same stream.
        self.generator = torch.Generator()
        self.noise = self.generator if self.device.type == "cpu" else torch.Generator(device=self.device)

    def begin(self, seed: int, iteration: int) -> None:
        """Seed what is drawn in an iteration."""
        for generator in (self.generator, self.noise):
            generator.manual_seed(seed * 1_000_003 + iteration)

    def world_loss(self) -> Tensor:
        """`WAM.loss` of fresh real windows, times its weight; zero when that is zero."""
        if not self.world_weight:
            return torch.zeros(())
        assert self.world is not None
        batch = self.world(self.generator).to(self.device)
        with loss_weights(self.model, **self.weights):
            return self.world_weight * self.model.loss(batch, noise=self.noise)["loss"]

    def step(self, loss: Tensor) -> bool:
        """Minimise `loss`; False when the step was left out."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.left_alone:
            parameter.grad = None  # nobody reads it, and it would add up
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if not math.isfinite(float(loss.detach() + norm)):
            self.optimiser.zero_grad(set_to_none=True)
            self.skip("the loss or its gradient")
            return False
        self.streak = 0
        self.optimiser.step()
        if self.world_weight:
            getattr(self.model, "update_targets", lambda: None)()
        return True

    @property
    def learning_rate(self) -> float:
        """Of the policy, at present."""
        return float(self.optimiser.param_groups[0]["lr"])

    def scale(self, share: float) -> None:
        """Learning rates of `share` of those asked for."""
        for group, rate in zip(self.optimiser.param_groups, self.learning_rates, strict=True):
            group["lr"] = share * rate

    def slow_down(self) -> None:
        """Halve the learning rate of the policy, for good."""
        self.optimiser.param_groups[0]["lr"] *= 0.5

    def skip(self, what: str) -> None:
        """Count a step that was left out because `what` is not finite."""
        self.skipped += 1
        self.streak += 1
        if self.streak >= self.limit:
            raise LearningDiverged(
                f"{what} was NaN or infinite for {self.streak} steps in a row; stopped. The last good checkpoint is "
                "kept. Lower agent.learning_rate, or look for extreme rewards in the environment"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser's moments, the policy's learning rate and the counts."""
        found = {"skipped": torch.tensor([self.skipped, self.streak])}
        found["learning_rate"] = torch.tensor(self.learning_rate, dtype=torch.float64)
        for index, values in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave."""
        self.skipped, self.streak = (int(number) for number in state["skipped"])
        whole = self.optimiser.state_dict()
        for name, tensor in state.items():
            if name.startswith("optimiser."):
                index, key = name.removeprefix("optimiser.").split(".", 1)
                whole["state"].setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict(whole)
        self.optimiser.param_groups[0]["lr"] = float(state["learning_rate"])


class CollectingLearner:
    """What learners of kind "collect" share: their `bind` sets `seed`, `updater` and `_acting`, which collects."""

    kind = "collect"
    seed: int
    updater: Updater
    _acting: Any
    iteration = 0

    @property
    def actor(self) -> Any:
        """See `Learner`."""
        return self._acting

    def begin(self, iteration: int) -> None:
        """See `Learner`."""
        self.iteration = iteration
        self._acting.begin(self.seed, iteration)
        self.updater.begin(self.seed, iteration)


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a `state_dict` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def finite_rewards(batch: TensorDict) -> Tensor:
    """[B, T] whether the reward of each decision is finite; nothing is learned from one that is not."""
    return (torch.isfinite(batch["next", "reward"]) & torch.isfinite(batch["next", "task_reward"]))[..., 0]


def shuffled_rewards(batch: TensorDict, generator: torch.Generator) -> TensorDict:
    """`batch` [B, T] with its finite rewards dealt out anew: the null control, from which nothing can be learned."""
    reward = batch["next", "reward"]
    finite = torch.isfinite(reward)
    known = reward[finite]
    batch["next", "reward"] = reward.masked_scatter(finite, known[torch.randperm(len(known), generator=generator)])
    return batch


def batch_metrics(batch: TensorDict) -> dict[str, float]:
    """What a batch [B, T], whose rows begin with fresh episodes, says of the policy that collected it.

    `success` is that of the first episode of every row, a failure where the batch ends before it does: of all episodes
    that ended, those that succeed would count too often, as they are the shorter ones. `episodes` ended. `skipped_rows`
    are those with a reward that is NaN or infinite; what of them is left out depends on the learner.
    """
    after = batch["next"]
    done = after["done"].long()
    first = done.cumsum(1) == done  # up to the row's first end
    reward, executed, finite = after["task_reward"], after["executed"], finite_rewards(batch)[..., None]
    if not bool(finite.all()):
        reward, executed = reward[finite], executed[finite]
    return {
        "episodes": float(done.sum()),
        "success": float((after["success"] & first).any(1).float().mean()),
        "reward": float(reward.sum() / executed.sum().clamp(min=1)),
        "steps": float(after["executed"].sum()),
        "skipped_rows": float((~finite).any(1).sum()),
    }
