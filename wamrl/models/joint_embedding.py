"""The reference WAM: a joint-embedding latent model after TD-MPC2 (Hansen et al., 2024, arXiv:2310.16828).

A latent is the standardised observation beside learned features of it: an encoder alone, taught by few episodes, kept
the hand's place to two centimetres only, too coarse to imagine a grasp. An ensemble of residual MLPs predicts the next
latent from latent and action; heads read reward, success, value, policy and behaviour prior off a latent. Vectors are
decoded by undoing the standardisation. Targets of the feature prediction come from a moving average of the encoder.

How fast a thing moves is the small difference of two readings of its place, which networks of standardised coordinates
hardly see. Where the layout says which number is an earlier reading of which, they read the difference as well, in
units of what is usual.

Most objects lie still most of the time, and half a millimetre per step adds up: over an episode objects crept to the
goal untouched. So the dynamics learn the median change, by absolute errors, which is none where most things rest, and
not the mean. And imagination keeps to what the data of the task showed: a number that never changed in an episode stays
(a drawer slides along one axis), and none leaves the range of the data further than it has (a gripper opens no wider
than it can). Policies that know such numbers as constants went astray where they drifted.

Success is often a matter of a centimetre between two places (hand, object, goal). Networks of bare coordinates, taught
by few episodes, miss it, and the policy waits beside a goal that the model takes for reached. So every network also
reads how the observation's `points` lie to each other.

From images, the encoder reads the tokens of a frozen tokenizer beside the observation's vectors, and a head reads those
tokens off imagined latents, so that features are taught what the images show; the tokenizer decodes them.

Letters: B windows, T steps of a window, R rows, N candidates, M ensemble members, H actions, A action dims, D latent
dims (G + latent_dim), E value heads, G numbers of the observation's vectors, P token numbers of a frame (L x width).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Layout, Proposal, Spec, State, keys_of_images, task_id
from wamrl.models.images import ImageSubstrate, uint8_images
from wamrl.models.parts import (
    EnsembleLinear,
    check_values,
    ensemble_mlp,
    mlp,
    mlp_block,
    normalise,
    task_rows,
    weights_of_losses,
)
from wamrl.models.substrate import make_substrate
from wamrl.naming import unknown_name, whole_number
from wamrl.noise import NoiseKey

LOG_STD_MIN, LOG_STD_MAX = -3.0, 0.0
_NO_BOUND = 1e30  # checkpoints hold finite numbers only
_FAR, _NEAR = 0.15, 0.03  # metres: how far apart points usually are, and where contact and success are decided
_LEAST_CHANGE = 1e-4  # in one step: an object that nothing touched in the data jitters by a millionth, then is pushed


class JointEmbeddingWAM(WAM):
    """Encoder, latent dynamics ensemble, reward, success, values and policy in one set of weights.

    observation: key -> shape of the keys that the encoder reads and that are decoded: vectors, and perhaps one image.
    layout: see `Spec`.
    tokenizer: for an image, the substrate that reads it, as in `ImageSubstrate.config`; its weights are part of the
    model's and stay as they are.
    points: key -> first index of each place (x, y, z in metres) in that vector, of which the networks read every pair's
    relation; None is none, "auto" hand, object and goal of the `layout`, as far as it has them in one vector.
    latent_dim: learned features of a latent.
    members: dynamics networks, each with its own reward and success head; their disagreement is the uncertainty. They
    share their first layer, which all windows teach; the rest of each learns from its own share of them.
    values: value heads E, and as many of the success value.
    horizon: control steps that imagination is meant for. discount: per control step.
    reward_scale: the task's greatest reward per step. success_bonus: see `Spec`; a task's reward may hardly tell a
    success from a near one. The value heads work in units of (reward_scale + success_bonus) / (1 - discount).
    expectile: of the value regression; 0.5 is the mean over what the data did, higher leans to its better part.
    loss_weights: overrides of the weights in `loss`.
    """

    former = ("probe.",)  # weights of earlier versions' checkpoints that this one does without

    mean: Tensor
    std: Tensor
    change: Tensor
    moves: Tensor
    low: Tensor
    high: Tensor
    task_ids: Tensor
    pairs: Tensor
    readings: Tensor
    per_change: Tensor

    def __init__(
        self,
        *,
        observation: Mapping[str, Sequence[int]],
        action_dim: int,
        tasks: Sequence[str],
        control_dt_s: float,
        latent_dim: int = 128,
        width: int = 256,
        dynamics_width: int = 192,
        head_width: int = 128,
        task_dim: int = 16,
        members: int = 8,
        values: int = 4,
        horizon: int = 10,
        discount: float = 0.97,
        target_rate: float = 0.01,
        expectile: float = 0.7,
        reward_scale: float = 10.0,
        success_bonus: float = 10.0,
        loss_weights: Mapping[str, float] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        points: Mapping[str, Sequence[int]] | str | None = None,
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "latent_dim": latent_dim, "width": width, "dynamics_width": dynamics_width, "head_width": head_width,
            "task_dim": task_dim, "members": members, "values": values, "horizon": horizon,
        }  # fmt: skip
        for name, size in sizes.items():
            whole_number(name, size, 1)
        check_values(
            discount=discount,
            target_rate=target_rate,
            expectile=expectile,
            reward_scale=reward_scale,
            success_bonus=success_bonus,
        )
        self.substrate = _substrate(observation, tokenizer)
        images = self.substrate.keys if self.substrate else ()
        self.features = {key: math.prod(shape) for key, shape in observation.items() if key not in images}
        self.spec = Spec(
            observation={key: tuple(shape) for key, shape in observation.items()},
            action_dim=action_dim,
            tasks=tuple(tasks),
            chunk_length=horizon,
            max_horizon=horizon,
            discount=discount,
            control_dt_s=control_dt_s,
            provides=frozenset(
                {
                    "rollout",
                    "policy",
                    "behaviour",
                    "log_prob",
                    "value",
                    "success_value",
                    "decode",
                    "observe",
                    "reward",
                    "success",
                    "uncertainty",
                    "goal",
                }
            ),  # fmt: skip
            anatomy=Anatomy("feature", "joint-embedding", "action-conditioned rollout", "chunked"),
            ensemble_size=members,
            success_bonus=success_bonus,
            layout=Layout.of(layout, observation),
        )
        self.members, self.target_rate, self.expectile = members, target_rate, expectile
        self.value_unit = (reward_scale + success_bonus) / (1.0 - discount)
        usual = {
            "consistency": 5.0,
            "observation": 1.0,
            "reward": 0.5,
            "success": 0.5,
            "value": 10.0,
            "success_value": 1.0,
            "policy": 1.0,
            "behaviour": 1.0,
            "tokens": 1.0,
        }
        self.loss_weights = weights_of_losses(usual, loss_weights)
        total = sum(self.features.values())
        seen = total + (self.substrate.tokens * self.substrate.width if self.substrate else 0)
        pairs = list(itertools.combinations(_first_numbers(self.features, points, self.spec.layout), 2))
        coordinates = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2, 1) + torch.arange(3)
        self.register_buffer("pairs", coordinates.movedim(1, 0).flatten(), persistent=False)  # firsts, then seconds
        readings = _earlier_numbers(self.features, self.spec.layout)
        numbers = torch.tensor(readings, dtype=torch.int64).reshape(-1, 2)
        self.register_buffer("readings", numbers.mT.flatten(), persistent=False)  # those of now, then the earlier ones
        self.register_buffer("per_change", torch.ones(len(readings)))  # 1 over the usual change in a step, 0 if none
        relations = len(readings) + 7 * len(pairs)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("std", torch.ones(total))
        self.register_buffer("change", torch.ones(total))  # root mean square over one step, in units of std
        self.register_buffer("moves", torch.ones(len(tasks), total))  # 0 where a task's data never changed
        self.register_buffer("low", torch.full((len(tasks), total), -_NO_BOUND))  # of a task's data, standardised
        self.register_buffer("high", torch.full((len(tasks), total), _NO_BOUND))
        self.register_buffer("task_ids", torch.tensor([task_id(name) for name in tasks]))
        self.task_embedding = nn.Embedding(len(tasks), task_dim)
        nn.init.normal_(self.task_embedding.weight, std=1.0 / math.sqrt(task_dim))
        self.encoder = mlp(seen + relations + task_dim, [width, width], latent_dim)
        self.observed, latent_dim = total, total + latent_dim
        self.latent_dim = latent_dim
        self.dynamics_first = mlp_block(latent_dim + relations + task_dim + action_dim, dynamics_width)
        self.dynamics = ensemble_mlp(members, dynamics_width, [dynamics_width], latent_dim)
        head_in = latent_dim + relations + task_dim
        # Reward and success logit of the frame that an action led to; Meta-World's rewards read the action too.
        self.outcome = ensemble_mlp(members, head_in + action_dim, [head_width], 2)
        self.values = ensemble_mlp(values, head_in, [head_width], 1)
        self.policy = mlp(head_in, [width, width], 2 * action_dim)
        self.behaviour = mlp(head_in, [width, width], action_dim)
        if self.substrate is not None:
            self.token_head = mlp(latent_dim, [width], seen - total)
        nn.init.zeros_(self.values[-1].weight)  # type: ignore[arg-type]
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_values = copy.deepcopy(self.values).requires_grad_(False)
        self.success_values = ensemble_mlp(values, head_in, [head_width], 1)

    # ---- borders -------------------------------------------------------------------------------------------------

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store mean, std and change per observation key; a constant number keeps a deviation of one."""
        self.mean.copy_(torch.cat([torch.as_tensor(statistics[k]["mean"]).flatten() for k in self.features]))
        std = torch.cat([torch.as_tensor(statistics[k]["std"]).flatten() for k in self.features])
        self.std.copy_(torch.where(std < 1e-4, torch.ones_like(std), std))
        change = torch.cat([torch.as_tensor(statistics[k]["change"]).flatten() for k in self.features])
        self.change.copy_(change / self.std)
        if len(self.per_change):
            moves = change[self.readings.chunk(2)[0]]
            self.per_change.copy_(torch.where(moves > 0, 1.0 / moves.clamp(min=_LEAST_CHANGE), 0.0))

    def set_extent(self, extent: Mapping[str, Mapping[str, Mapping[str, Tensor]]], *, widen: bool = False) -> None:
        """Store what the data of each task showed (`EpisodeDataset.extent`), beyond which imagination does not go.

        A task that is not in it stays as it is, at first without bounds. widen: beside the bounds that a task has
        already, for a model that trains on.
        """
        for row, name in enumerate(self.spec.tasks):
            if name not in extent:
                continue
            found = {
                entry: torch.cat([torch.as_tensor(extent[name][key][entry]).flatten() for key in self.features])
                for entry in ("low", "high", "moves")
            }
            moves = found["moves"].to(self.moves)
            low, high = ((found[entry].to(self.mean) - self.mean) / self.std for entry in ("low", "high"))
            if widen and (self.low[row] > -_NO_BOUND).any():  # else it has none yet, and takes those of this data
                moves, low = torch.maximum(moves, self.moves[row]), torch.minimum(low, self.low[row])
                high = torch.maximum(high, self.high[row])
            self.moves[row], self.low[row], self.high[row] = moves, low, high

    def task_index(self, task: Tensor) -> Tensor:
        """Row of the task table for each `task_id` in `task`."""
        return task_rows(task, self.task_ids, self.spec.tasks)

    def _flatten(self, observation: TensorDict) -> Tensor:
        lead = observation.batch_dims
        flat = torch.cat([observation[key].flatten(lead).float() for key in self.features], dim=-1)
        return (flat - self.mean) / self.std

    def _tokens(self, observation: TensorDict) -> Tensor:
        """Token numbers [..., P] of the image; P is 0 for a model of vectors alone."""
        if self.substrate is None:
            return torch.empty(*observation.batch_size, 0, device=self.mean.device)
        with torch.no_grad():
            return self.substrate.encode(observation).flatten(-2)

    def _with_relations(self, z: Tensor) -> Tensor:
        """`z` [..., D], then what its numbers changed by since their earlier reading, then how its points lie.

        Of each pair of points that is the difference, coarse and fine, and the log of the distance.
        """
        if not self.pairs.numel() and not self.readings.numel():
            return z
        parts = [z]
        place = z[..., : self.observed] * self.std + self.mean
        if self.readings.numel():
            now, before = place.index_select(-1, self.readings).chunk(2, dim=-1)
            parts.append((now - before) * self.per_change)
        if self.pairs.numel():
            first, second = place.index_select(-1, self.pairs).chunk(2, dim=-1)
            between = first - second
            distance = torch.linalg.vector_norm(between.unflatten(-1, (-1, 3)), dim=-1)
            parts += [between / _FAR, torch.tanh(between / _NEAR), torch.log(0.1 + distance / 0.1)]
        return torch.cat(parts, dim=-1)

    def _latent(self, encoder: nn.Module, x: Tensor, tokens: Tensor, task: Tensor) -> Tensor:
        return torch.cat([x, normalise(encoder(torch.cat([self._with_relations(x), tokens, task], dim=-1)))], dim=-1)

    def _step(self, seen: Tensor, task: Tensor, action: Tensor, extent: Tensor | None = None) -> Tensor:
        """Next latents [M, X, D] from latents with their relations [M, X, ...]; extent: `_extent` of the rows."""
        x, features, _ = seen.tensor_split([self.observed, self.latent_dim], dim=-1)
        step, turn = self.dynamics(self.dynamics_first(torch.cat([seen, task, action], dim=-1))).tensor_split(
            [self.observed], dim=-1
        )
        ahead = x + self.change * step
        if extent is not None:
            moves, low, high = extent.chunk(3, dim=-1)
            ahead = torch.where(moves > 0, ahead, x)
            ahead = torch.maximum(torch.minimum(ahead, torch.maximum(high, x)), torch.minimum(low, x))
        return torch.cat([ahead, normalise(features + turn)], dim=-1)

    def _extent(self, row: Tensor) -> Tensor:
        """Which numbers move, their least and their greatest [X, 3 G], for rows [X] of the task table."""
        return torch.cat([self.moves, self.low, self.high], dim=-1)[row]

    def _policy(self, seen: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        return self.gaussian_of(self.policy(torch.cat([seen, task], dim=-1)))

    @staticmethod
    def gaussian_of(output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation [..., A] from what the policy network gives, [..., 2 A]."""
        mean, raw = output.chunk(2, dim=-1)
        return torch.tanh(mean), LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1.0)

    def gaussian(self, state: State) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of the policy's action, each [*state.batch, A]."""
        return self.gaussian_of(self.policy(self.policy_input(state)))

    def policy_input(self, state: State) -> Tensor:
        """What the policy network reads [*state.batch, ...]: latent, the relations of its points, and task."""
        return torch.cat([self._with_relations(state["z"]), self.task_embedding(state["task"])], dim=-1)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The weights of the policy and of the values, which no other part of the model reads."""
        return [*self.policy.parameters(), *self.values.parameters()]

    def _behaviour(self, seen: Tensor, task: Tensor) -> Tensor:
        return torch.tanh(self.behaviour(torch.cat([seen, task], dim=-1)))

    # ---- queries -------------------------------------------------------------------------------------------------

    def encode(self, context: Context) -> State:
        task = self.task_index(context.task)
        embedded = self.task_embedding(task)

        def latent(frame: TensorDict) -> Tensor:
            return self._latent(self.encoder, self._flatten(frame), self._tokens(frame), embedded)

        state = TensorDict({"z": latent(context.observation[:, -1]), "task": task}, batch_size=task.shape)
        if context.goal is not None:
            state["goal"] = latent(context.goal)
        return state

    def follow(self, state: State, noise: NoiseKey, *, share: float = 0.0) -> State:
        """Each row's own member of the ensemble in the entry `member` [R] (TS-infinity of Chua et al., 2018)."""
        draw = (noise.uniform(1)[:, 0] + share) % 1.0
        member = (draw * self.members).long().clamp(max=self.members - 1)
        return state.copy().set("member", member)

    def observe(self, state: State, action: Tensor, observation: TensorDict, reset: Tensor) -> State:
        """The encoded `observation`: one frame is all that this model reads, so nothing imagined or older stays."""
        return self.encode(Context.from_observation(observation))

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        own = 1 if "member" in state.keys() else self.members
        if futures not in (None, own):
            raise ValueError(
                f"futures is {futures}, but this state has {own}: the model's futures are its {self.members} ensemble "
                "members, or the one that `follow` chose; leave it None"
            )
        if actions is None:
            self.spec.require("video")
        assert actions is not None
        rows, num, horizon, _ = actions.shape
        flat = actions.flatten(0, 1)
        imagined = self._roll(state, num, horizon, lambda t, z: flat[:, t], with_frames=with_frames)
        return imagined

    def propose(
        self,
        state: State,
        num: int,
        *,
        mode: str = "sde",
        future: State | None = None,
        noise: NoiseKey | None = None,
        perturbation: Tensor | None = None,
        horizon: int | None = None,
        behaviour: int = 0,
    ) -> Proposal:
        if future is not None:
            self.spec.require("inverse")
        if behaviour:
            self.spec.require("behaviour")
        if not 0 <= behaviour <= num:
            raise ValueError(f"behaviour is {behaviour}, but must be from 0 to num={num}, of which it is a part")
        if mode not in ("ode", "sde"):
            raise ValueError(f"mode is '{mode}'; expected 'ode' (deterministic) or 'sde' (sampled)")
        rows, action_dim = state.batch_size[0], self.spec.action_dim
        horizon = perturbation.shape[2] if perturbation is not None else horizon or self.spec.chunk_length
        if mode == "sde":
            if noise is None:
                raise ValueError("mode='sde' samples, so it needs noise=NoiseKey; use mode='ode' for the mean action")
            draws = noise.normal(num, horizon, action_dim).flatten(0, 1)
        else:
            draws = torch.zeros(rows * num, horizon, action_dim, device=state["z"].device)
        task = self.task_embedding(state["task"]).repeat_interleave(num, 0)
        chain, log_prob = torch.empty_like(draws), torch.zeros(rows * num, device=draws.device)

        def act(t: int, z: Tensor) -> Tensor:
            nonlocal log_prob
            seen = self._with_relations(z)
            mean, log_std = self._policy(seen, task)
            action = mean + log_std.exp() * draws[:, t]
            if behaviour:
                action = action.unflatten(0, (rows, num))
                action[:, num - behaviour :] = self._behaviour(
                    *(x.unflatten(0, (rows, num))[:, num - behaviour :] for x in (seen, task))
                )
                action = action.flatten(0, 1)
            if perturbation is not None:
                action = action + perturbation.flatten(0, 1)[:, t]
            chain[:, t] = action
            log_prob = log_prob + _gaussian_log_prob(action, mean, log_std)
            return action.clamp(-1.0, 1.0)

        imagined = self._roll(state, num, horizon, act)
        chain = chain.view(rows, num, horizon, action_dim)
        return Proposal(
            actions=chain.clamp(-1.0, 1.0),
            chain=torch.stack([draws.view_as(chain), chain], dim=2),
            times=torch.tensor([0.0, 1.0], device=chain.device),
            log_prob=log_prob.view(rows, num, 1),
            imagined=imagined,
        )

    def log_prob(self, state: State, proposal: Proposal) -> Tensor:
        """[R, N, 1] log-density of the unclamped chunk, the policy reacting to what each action leads to."""
        if proposal.chain is None:
            raise ValueError("this Proposal holds no chain to replay; take one from propose()")
        chain = proposal.chain[:, :, -1]
        rows, num, horizon, _ = chain.shape
        chain = chain.flatten(0, 1)
        task = self.task_embedding(state["task"]).repeat_interleave(num, 0)
        total = chain.new_zeros(rows * num)

        def act(t: int, z: Tensor) -> Tensor:
            nonlocal total
            mean, log_std = self._policy(self._with_relations(z), task)
            total = total + _gaussian_log_prob(chain[:, t], mean, log_std)
            return chain[:, t].clamp(-1.0, 1.0)

        self._roll(state, num, horizon, act)
        return total.view(rows, num, 1)

    def _roll(
        self, state: State, num: int, horizon: int, act: Callable[[int, Tensor], Tensor], *, with_frames: bool = False
    ) -> Imagined:
        """Every member takes the action that `act(t, mean latent [R*N, D])` chooses for step t.

        Rows that follow one member (`follow`) are gathered by it, so that each network sees its own rows only.
        """
        rows = state.batch_size[0]
        alone = "member" in state.keys()
        members = 1 if alone else self.members
        row = state["task"].repeat_interleave(num, 0)
        extent = self._extent(row).expand(members, -1, -1)
        mean = state["z"].repeat_interleave(num, 0)
        if alone:
            member = state["member"].repeat_interleave(num, 0)
            slot, width = _places(member, self.members)
        seen = self._with_relations(state["z"]).repeat_interleave(num, 0).expand(members, -1, -1)
        frames, actions = [], []
        tasks = self.task_embedding(row).expand(members, -1, -1)

        def each(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            """`network`, which takes [members, X, ...], of inputs [M, R*N, ...]."""
            if not alone:
                return network(*inputs)
            sorted_in = [x.new_zeros(self.members * width, *x.shape[2:]).index_copy_(0, slot, x[0]) for x in inputs]
            out = network(*(x.unflatten(0, (self.members, width)) for x in sorted_in))
            return out.flatten(0, 1)[slot].unsqueeze(0)

        for t in range(horizon):
            action = act(t, mean)
            z = each(self._step, seen, tasks, action.expand(members, -1, -1), extent)
            mean, seen = z.mean(0), self._with_relations(z)
            frames.append(seen)
            actions.append(action)
        ahead = torch.stack(frames, dim=2)
        path = ahead[..., : self.latent_dim]
        taken = torch.stack(actions, dim=1).expand(members, -1, -1, -1)
        heads_in = torch.cat([ahead, tasks.unsqueeze(2).expand(-1, -1, horizon, -1), taken], dim=-1)

        def outcomes(x: Tensor) -> Tensor:  # each member's own head
            return self.outcome(x.flatten(1, 2)).unflatten(1, (-1, horizon))

        outcome = each(outcomes, heads_in)

        def future(x: Tensor) -> Tensor:
            return x.unflatten(1, (rows, num)).movedim(0, 2)

        leaf = TensorDict({"z": future(z), "task": future(row.expand(members, -1))}, batch_size=[rows, num, members])
        spread = None
        if alone:
            leaf.set("member", member.view(rows, num, 1))
        else:
            # Standard deviation over members, averaged over latent dims (torch.std is ten times slower here).
            spread = (path - path.mean(0)).square().mean(0).sqrt().mean(-1)
            spread = spread.view(rows, num, 1, horizon).expand(-1, -1, members, -1)
        return Imagined(
            leaf=leaf,
            evaluations=num * members * horizon,
            reward=future(outcome[..., 0]),
            success=future(torch.sigmoid(outcome[..., 1])),
            uncertainty=spread,
            frames=future(path) if with_frames else None,
        )

    def _values(self, network: nn.Sequential, z: Tensor, task: Tensor) -> Tensor:
        """[E, *batch] values, in units of `value_unit`, of latents [*batch, D] and tasks [*batch, C]."""
        return self._heads(network, torch.cat([self._with_relations(z), task], dim=-1))

    @staticmethod
    def _heads(network: nn.Sequential, x: Tensor) -> Tensor:
        """[E, *batch] of E networks side by side that read the same `x` [*batch, X]."""
        flat = x.flatten(0, -2)
        members = cast(EnsembleLinear, network[0]).weight.shape[0]
        return network(flat.expand(members, -1, -1)).view(members, *x.shape[:-1])

    def value(self, state: State) -> Tensor:
        task = self.task_embedding(state["task"])
        return self._values(self.values, state["z"], task).movedim(0, -1) * self.value_unit

    def success_value(self, state: State) -> Tensor:
        logit = self._values(self.success_values, state["z"], self.task_embedding(state["task"]))
        return torch.sigmoid(logit).movedim(0, -1) * self.value_unit

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        if isinstance(state, Imagined):
            if state.frames is None:
                raise ValueError("this Imagined holds no frames; call imagine(..., with_frames=True) to decode it")
            z = state.frames
        else:
            z = state["z"]
        for key in keys or ():
            if key not in self.spec.observation:
                raise unknown_name("observation key", key, self.spec.observation)
        flat = z[..., : self.observed] * self.std + self.mean
        parts = dict(zip(self.features, flat.split(list(self.features.values()), dim=-1), strict=True))
        chosen = {k: v.unflatten(-1, self.spec.observation[k]) for k, v in parts.items() if keys is None or k in keys}
        images = self.substrate.keys if self.substrate is not None else ()
        if self.substrate is not None and (self.substrate.decodes if keys is None else set(images) & set(keys)):
            shape = (self.substrate.tokens, self.substrate.width)
            decoded = self.substrate.decode(self.token_head(z).unflatten(-1, shape))
            chosen |= {key: uint8_images(value) for key, value in decoded.items()}
        return TensorDict(chosen, batch_size=z.shape[:-1])

    # ---- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: TensorDict, *, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses of a batch of windows; each ensemble member unrolls its own share of them, so members differ.

        batch: [B] with B a multiple of the ensemble size, the batch contract of `wamrl.data`.
        """
        action, valid = batch["action"], batch["valid"]
        windows, steps, action_dim = action.shape
        members = self.members
        if windows % members:
            raise ValueError(
                f"the batch has {windows} windows; it must be a multiple of the {members} ensemble members"
            )
        x = self._flatten(batch["observation"])  # [B, T+1, G]
        task = self.task_embedding(self.task_index(batch["task"]))
        tasks = task.unsqueeze(1).expand(-1, steps + 1, -1)
        tokens = self._tokens(batch["observation"])  # [B, T+1, P]
        with torch.no_grad():
            target = self._latent(self.target_encoder, x, tokens, tasks)
        online = self._latent(self.encoder, x, tokens, tasks)
        start = online[:, 0]
        mask = valid.float()
        count = mask.sum().clamp(min=1.0)

        # Latent prediction: member m unrolls windows m * B/M to (m + 1) * B/M.
        z = start.view(members, -1, start.shape[-1])
        member_task = task.view(members, -1, task.shape[-1])
        member_action = action.view(members, -1, steps, action_dim)
        predicted = [start]
        for t in range(steps):
            z = self._step(self._with_relations(z), member_task, member_action[:, :, t])
            predicted.append(z.flatten(0, 1))
        path = torch.stack(predicted, dim=1)  # [B, T+1, D], the first frame encoded, the others imagined
        before, after = path[:, :-1], path[:, 1:]
        missed, features = (after - target[:, 1:]).tensor_split([self.observed], dim=-1)
        losses = {"consistency": (features.square().mean(-1) * mask).sum() / count}
        # In units of what a number changes by in one step; one that never changes is not predicted.
        moves = (self.change > 0).float()
        missed = missed * moves / self.change.where(self.change > 0, 1.0)
        losses["observation"] = (missed.abs().sum(-1) / moves.sum().clamp(min=1) * mask).sum() / count
        if self.substrate is not None:
            error = (self.token_head(path) - tokens).square().mean(-1)
            losses["tokens"] = (error[:, 0] + (error[:, 1:] * mask).sum(1)).sum() / (windows + mask.sum())

        heads_in = torch.cat([self._with_relations(after), tasks[:, 1:], action], dim=-1)
        outcome = self.outcome(heads_in.view(members, -1, heads_in.shape[-1])).view(windows, steps, 2)
        reward_error = F.smooth_l1_loss(outcome[..., 0], batch["reward"], reduction="none")
        losses["reward"] = (reward_error * mask).sum() / count
        bce = F.binary_cross_entropy_with_logits(outcome[..., 1], batch["success"].float(), reduction="none")
        losses["success"] = (bce * mask).sum() / count

        # Value: expectile regression (Kostrikov et al., 2022) on one-step targets of the executed actions, each head
        # on its own target, so that heads disagree where data are few (Ghasemipour et al., 2022, arXiv:2205.13703).
        with torch.no_grad():
            ahead = self._values(self.target_values, target[:, 1:], tasks[:, 1:])
            goal = (batch["reward"] + self.spec.success_bonus * batch["success"]) / self.value_unit
            goal = goal + self.spec.discount * ahead * (~batch["terminated"]).float()
        value = self._values(self.values, before, tasks[:, :-1])
        gap = goal - value
        asymmetry = torch.where(gap > 0, self.expectile, 1.0 - self.expectile)
        losses["value"] = (asymmetry * gap.square() * mask).sum() / count / value.shape[0]

        # Policy: the expert's label where there is one, else what the model itself did in a successful episode.
        labelled = batch["label_valid"]
        wanted = torch.where(labelled.unsqueeze(-1), batch["label"], action).clamp(-1.0, 1.0)
        weight = (labelled | batch["imitate"].unsqueeze(1)).float() * mask
        # Encoded frames count fully; imagined ones, at a quarter, teach the policy to act on what the model predicts.
        frames = torch.cat([online[:, :-1], before[:, 1:]], dim=1)
        frame_tasks = torch.cat([tasks[:, :-1], tasks[:, 1:-1]], dim=1)
        seen = self._with_relations(frames)
        mean, log_std = self._policy(seen, frame_tasks)
        weight = torch.cat([weight, 0.25 * weight[:, 1:]], dim=1)
        wanted = torch.cat([wanted, wanted[:, 1:]], dim=1)
        losses["policy"] = (_imitation(mean, log_std, wanted) * weight).sum() / weight.sum().clamp(min=1.0)

        # Behaviour prior: what any successful episode did before its success, whoever acted. It knows recoveries that
        # no demonstration shows, and is less precise; a search decides where it is to be preferred.
        weight = (batch["episode_success"].unsqueeze(1) & (batch["steps_to_success"][:, :-1] > 0)).float() * mask
        weight = torch.cat([weight, 0.25 * weight[:, 1:]], dim=1)
        error = (self._behaviour(seen.detach(), frame_tasks.detach()) - wanted).square().sum(-1)
        losses["behaviour"] = (error * weight).sum() / weight.sum().clamp(min=1.0)

        # Success value: discount^(steps to the first success) as it was, on latents that it does not shape. The value
        # above follows shaped rewards, which also pay for waiting beside the goal; this one does not know them.
        attained = self.spec.discount ** batch["steps_to_success"][:, :-1]  # 0 after an infinite number of steps
        attained = torch.cat([attained, attained[:, 1:]], dim=1)
        weight = torch.cat([mask, 0.25 * mask[:, 1:]], dim=1)
        logit = self._heads(self.success_values, torch.cat([seen, frame_tasks], dim=-1).detach())
        bce = F.binary_cross_entropy_with_logits(logit, attained.expand_as(logit), reduction="none").mean(0)
        losses["success_value"] = (bce * weight).sum() / weight.sum().clamp(min=1.0)

        total = sum(self.loss_weights[name] * value for name, value in losses.items())
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def imitation(self, state: State, wanted: Tensor) -> Tensor:
        """[R] loss of the policy in `state` against actions `wanted` [R, A]: what `loss` takes of it, row by row."""
        return _imitation(*self.gaussian(state), wanted)

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target encoder and target values towards the online ones by `target_rate`."""
        for slow, fast in ((self.target_encoder, self.encoder), (self.target_values, self.values)):
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.target_rate)


def _first_numbers(
    features: Mapping[str, int], points: Mapping[str, Sequence[int]] | str | None, layout: Layout
) -> list[int]:
    """Where each point begins in the observation's numbers one after the other; ValueError when it is not in there."""
    if points == "auto":
        known = {key: [name for name in ("hand", "object", "goal") if layout.has(name, key=key)] for key in features}
        # A single point has no relation to another one.
        points = {key: [layout.place(n, key).start for n in names] for key, names in known.items() if len(names) > 1}
    if isinstance(points, str):
        raise ValueError(f"points is '{points}'; give {{key: [first indices]}}, null for none, or auto")
    found, offset = [], dict(zip(features, itertools.accumulate(features.values(), initial=0), strict=False))
    for key, firsts in (points or {}).items():
        if key not in features:
            raise ValueError(f"points names '{key}', but the model's vectors are {', '.join(features) or 'none'}")
        for first in firsts:
            if not 0 <= first <= features[key] - 3:
                raise ValueError(
                    f"points has {first} for '{key}', but a place is three of its {features[key]} numbers, so it "
                    f"begins at 0 to {features[key] - 3}"
                )
            found.append(offset[key] + first)
    return found


def _earlier_numbers(features: Mapping[str, int], layout: Layout) -> list[tuple[int, int]]:
    """Number and earlier reading in the observation's numbers one after the other."""
    offset = dict(zip(features, itertools.accumulate(features.values(), initial=0), strict=False))
    return [(offset[k] + now, offset[k] + before) for k in features for now, before in layout.earlier.get(k, ())]


def _places(member: Tensor, members: int) -> tuple[Tensor, int]:
    """Where each of X rows goes when they are gathered by `member` [X] into [members, width], and that width."""
    counts = torch.bincount(member, minlength=members)
    width = int(counts.max())
    order = torch.argsort(member, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(member), device=member.device) - (counts.cumsum(0) - counts)[member[order]]
    return member * width + rank, width


def _substrate(observation: Mapping[str, Sequence[int]], tokenizer: Mapping[str, Any] | None) -> ImageSubstrate | None:
    """The frozen tokenizer of the one image in `observation`; ValueError when the two do not belong together."""
    images = keys_of_images(observation)
    if tokenizer is None:
        if images:
            raise ValueError(
                f"'{images[0]}' are images, which this model reads through a frozen tokenizer: train one with "
                "python -m wamrl.train wam=tokenizer observation=[pixels], and give it as tokenizer=<its run>"
            )
        return None
    (key,) = tokenizer["keys"]
    if images != [key]:
        raise ValueError(
            f"the tokenizer reads the image '{key}', but observation={list(observation)} has "
            f"{', '.join(images) or 'no image'}; write observation=[{key},proprioception]"
        )
    if len(observation) == 1:
        raise ValueError(
            f"observation=[{key}] leaves out proprioception, and one image does not tell where the robot is "
            f"to the millimetre; write observation=[{key},proprioception]"
        )
    substrate = make_substrate(tokenizer, observation)
    if not isinstance(substrate, ImageSubstrate):
        raise ValueError(f"the reference model reads images through a tokenizer of images, not '{tokenizer['name']}'")
    return substrate


def _imitation(mean: Tensor, log_std: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of the mean; the spread is fitted to the mean's errors, by its own gradient only."""
    # 0.02 keeps the spread from outweighing the mean.
    return (mean - wanted).square().sum(-1) - 0.02 * _gaussian_log_prob(wanted, mean.detach(), log_std)


def _gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density summed over the last dim."""
    scaled = (x - mean) / log_std.exp()
    return (-0.5 * scaled.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
