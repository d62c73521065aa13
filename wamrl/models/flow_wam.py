"""A World Action Model by flow matching: any substrate, backbone and coupling in one class.

Futures are frames at every `frame_stride`-th control step of a chunk, written as their change from the present frame
where the substrate knows how much its numbers change, or `changes` asks for it. A coupling (`wamrl.models.coupling`)
says which tokens see which and how their noise times are drawn in training; its queries are the questions that one set
of weights answers.
Reward, success and value are read off the predicted tokens by small heads.

Imagination is by chunks: a horizon that is no multiple of `frame_stride` repeats its last action up to the next frame
(in a causal coupling no earlier frame can tell), steps between two frames are interpolated linearly and share
reward, success and uncertainty of the frame that follows, and a horizon beyond a chunk starts the next one from the
last imagined frame.

Letters: B windows, R rows, N candidates, M sampled futures, X rows of a batch inside the model, H actions of a chunk, h
steps asked for, A action dims, J frames of a chunk, L tokens per frame, D numbers per token, K denoising steps, E value
heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Layout, Proposal, Spec, State, task_id
from wamrl.models.coupling import POLICIES, Coupling, Stage
from wamrl.models.denoiser import Denoiser, Prefix
from wamrl.models.flow import gaussian_log_prob, interpolate, sde_sample, sde_step
from wamrl.models.frame_heads import FrameHeads
from wamrl.models.images import uint8_images
from wamrl.models.parts import check_values, task_rows, weights_of_losses
from wamrl.models.substrate import make_substrate
from wamrl.naming import is_number, unknown_name, whole_number
from wamrl.noise import NoiseKey

LEVELS = (1.0, 0.5, 0.25, 0.125)
"""Lengths of the steps that shortcuts are taught."""
ANATOMY = {"dit": "iterative denoising (DiT)", "mot": "iterative denoising (mixture of transformers)"}


class FlowWAM(WAM):
    """Flow matching over future frames and actions.

    observation: key -> shape of what the substrate reads. substrate: see `make_substrate`. backbone: `name` ("dit" or
    "mot") and its sizes. coupling: `segments` and `queries`, see `Coupling`; the queries become `Spec.provides`.
    chunk_length: H. frame_stride: control steps between predicted frames. max_horizon: the longest imagination; beyond
    H it goes on from its last frame. futures: M sampled per candidate; their disagreement is the uncertainty.
    action_steps, future_steps: K of the samplers. sde_scale: of the policy's SDE, see `wamrl.models.flow.sde_step`.
    policy: which query `propose` answers with: "policy", "joint" or "future_first"; None is the coupling's first. The
    attribute `policy_query` is the same, and can be set at any time.
    shortcut: above 0, the share of a batch that teaches the policy to take long steps at once (Frans et al., 2024,
    arXiv:2410.12557), for 1 or 2 action_steps.
    changes: predict the change from the present frame also where a part of the substrate does not know how much its
    numbers change, as images do not: they are taken to change by `USUAL_CHANGE` in a step. A future's token is then
    told what the present frame shows at its place, and all parts of a joint substrate count the same in its error.
    success_values: answer "success_value" too, as the reference WAM does.
    discount, reward_scale, success_bonus, expectile, values, target_rate: as in the reference WAM.
    loss_weights: of reward, success, value and success_value; two that multiply the segments' own weights: policy, of
    the actions that the policy denoises, and flows, of all other segments; and imagined, which multiplies those of the
    heads where these read the frames that a future's velocities lead to, beside the true ones.
    """

    task_ids: Tensor
    unit: Tensor

    def __init__(
        self,
        *,
        observation: Mapping[str, Sequence[int]],
        action_dim: int,
        tasks: Sequence[str],
        control_dt_s: float,
        substrate: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        backbone: Mapping[str, Any],
        coupling: Mapping[str, Any],
        chunk_length: int = 8,
        frame_stride: int = 4,
        max_horizon: int | None = None,
        futures: int = 2,
        action_steps: int = 4,
        future_steps: int = 4,
        sde_scale: float = 0.3,
        policy: str | None = None,
        shortcut: float = 0.0,
        head_width: int = 128,
        task_dim: int = 16,
        values: int = 4,
        discount: float = 0.97,
        target_rate: float = 0.01,
        changes: bool = False,
        success_values: bool = False,
        expectile: float = 0.7,
        reward_scale: float = 10.0,
        success_bonus: float = 10.0,
        loss_weights: Mapping[str, float] | None = None,
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        max_horizon = chunk_length if max_horizon is None else max_horizon
        sizes = {
            "chunk_length": chunk_length, "frame_stride": frame_stride, "max_horizon": max_horizon, "futures": futures,
            "action_steps": action_steps, "future_steps": future_steps, "head_width": head_width, "task_dim": task_dim,
            "values": values,
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
        if not (is_number(sde_scale) and sde_scale > 0):
            raise ValueError(f"sde_scale is {sde_scale}, but must be above 0: the SDE's steps have no density without")
        for name, given in (("substrate", substrate), ("backbone", backbone), ("coupling", coupling)):
            if given is None or isinstance(given, str):
                raise ValueError(
                    f"{name} is {given!r}, but is made of settings; a named one is chosen by wam/{name}=<name>"
                )
        if chunk_length % frame_stride:
            raise ValueError(
                f"chunk_length is {chunk_length} and frame_stride {frame_stride}, but a chunk must hold a whole number "
                "of frames: choose a frame_stride that divides it"
            )
        if set(coupling) != {"segments", "queries"}:
            raise ValueError(
                f"a coupling has segments and queries, but this one {', '.join(map(str, coupling)) or 'nothing'}; see "
                "configs/wam/coupling"
            )
        self.coupling = Coupling(**coupling)
        queries = self.coupling.queries
        answered = [name for name in POLICIES if name in queries]
        if not answered:
            raise ValueError(f"the coupling answers none of {', '.join(POLICIES)}, so that it could not act")
        acting = policy or answered[0]
        places = Layout.of(layout, observation)
        self.substrate = make_substrate(substrate, observation, places)
        unread = [key for key in observation if key not in self.substrate.keys]
        if unread:
            raise ValueError(
                f"no substrate of this model reads {', '.join(unread)}; leave it out of observation=[...], or name it "
                "among the keys of a substrate"
            )
        if not (is_number(shortcut) and 0.0 <= shortcut <= 1.0):
            raise ValueError(f"shortcut is {shortcut}, expected a share of the batch from 0 to 1")
        self.shortcut = shortcut
        for name, asked in (("changes", changes), ("success_values", success_values)):
            if not isinstance(asked, bool):
                raise ValueError(f"{name} is {asked!r}, expected true or false")
        self.changes = changes
        self.relative = changes or self.substrate.change is not None
        frames, frame = chunk_length // frame_stride, (self.substrate.tokens, self.substrate.width)
        self.denoiser = Denoiser(
            self.coupling,
            backbone,
            frame=frame,
            frames=frames,
            frame_stride=frame_stride,
            action=(chunk_length, action_dim),
            tasks=len(tasks),
            shortcut=shortcut > 0,
            beside_present=changes,
        )
        provides = {"decode"} if self.substrate.decodes else set()
        provides |= {"policy", "value", "observe", "goal"} | {
            q for q in ("rollout", "inverse", "video") if q in queries
        }
        if success_values:
            provides.add("success_value")
        if {"rollout", "video", "joint", "future_first"} & set(queries):
            provides |= {"reward", "success"} | ({"uncertainty"} if futures > 1 else set())
        self.spec = Spec(
            observation={key: tuple(shape) for key, shape in observation.items()},
            action_dim=action_dim,
            tasks=tuple(tasks),
            chunk_length=chunk_length,
            max_horizon=max_horizon,
            discount=discount,
            control_dt_s=control_dt_s,
            provides=frozenset(provides),
            anatomy=Anatomy(
                self.substrate.describe(),
                ANATOMY[str(backbone["name"])],
                "action-conditioned rollout and joint generation" if "rollout" in queries else acting,
                "chunked",
            ),
            frame_stride=frame_stride,
            ensemble_size=futures,
            success_bonus=success_bonus,
            layout=places,
        )
        self.policy_query = acting
        self.action_steps, self.future_steps, self.sde_scale = action_steps, future_steps, sde_scale
        self.target_rate = target_rate
        self.value_unit = (reward_scale + success_bonus) / (1.0 - discount)
        weights = {"policy": 1.0, "flows": 1.0, "reward": 0.5, "success": 0.5, "value": 10.0}
        weights |= {"success_value": 1.0, "imagined": 0.0}
        self.loss_weights = weights_of_losses(weights, loss_weights)
        # A future frame is (frame - present) / unit where changes are predicted; what never moves is not predicted.
        self.register_buffer("unit", torch.ones(frames, *frame))
        self.denoiser.moves.copy_(self.substrate.used)
        self.register_buffer("task_ids", torch.tensor([task_id(task) for task in tasks]))
        self.heads = FrameHeads(
            math.prod(frame),
            tasks=len(tasks),
            width=head_width,
            task_dim=task_dim,
            values=values,
            stride=frame_stride,
            discount=discount,
            success_bonus=success_bonus,
            unit=self.value_unit,
            expectile=expectile,
            success_values=success_values,
        )

    # ---- ways to act ---------------------------------------------------------------------------------------------

    @property
    def policy_query(self) -> str:
        """The query that `propose` answers with. Setting it to another of the coupling's policies adapts `spec`.

        Raises:
            ValueError: for a query that the coupling does not answer, or that the shortcuts were not taught to.
        """
        return self._policy_query

    @policy_query.setter
    def policy_query(self, query: str) -> None:
        queries = self.coupling.queries
        answered = [name for name in POLICIES if name in queries]
        if query not in answered:
            raise unknown_name("policy of this coupling", str(query), answered)
        chain = self._is_chain(queries[query])
        if self.shortcut and not chain:
            raise ValueError(
                f"shortcut={self.shortcut} teaches a policy that denoises the action alone to do so in long steps, but "
                f"'{query}' denoises a future too; train with shortcut=0 to act by it"
            )
        self._policy_query = query
        anatomy = self.spec.anatomy if "rollout" in queries else replace(self.spec.anatomy, coupling=query)
        provides = self.spec.provides - {"log_prob"} | ({"log_prob"} if chain else set())
        self.spec = replace(self.spec, provides=provides, anatomy=anatomy)

    @property
    def acting(self) -> str:
        """The action segment that the policy denoises."""
        names = self.coupling.queries[self.policy_query][-1].denoise
        return next(name for name in names if self.denoiser.kind(name) == "action")

    # ---- borders -------------------------------------------------------------------------------------------------

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hand the training data's statistics to the substrate, and take from it how much frames change."""
        self.substrate.set_normalisation(statistics)
        if self.relative:
            change = self.substrate.change_or_usual()
            steps = torch.arange(1, self.denoiser.frames + 1, device=change.device) * self.spec.frame_stride
            # Motion goes on for a while, and two frames far apart differ by sqrt(2) standard deviations at most.
            self.unit.copy_((change * steps[:, None, None]).clamp(max=math.sqrt(2.0)).where(change > 0, 1.0))
            self.denoiser.moves.copy_(self.substrate.used & (change > 0))

    def encode(self, context: Context) -> State:
        observation = context.observation[:, -1]
        with torch.no_grad():
            z = self.substrate.encode(observation).flatten(-2)
        state = TensorDict({"z": z, "task": task_rows(context.task, self.task_ids, self.spec.tasks)}, z.shape[:1])
        if context.goal is not None:
            with torch.no_grad():
                state["goal"] = self.substrate.encode(context.goal).flatten(-2)
        return state

    def observe(self, state: State, action: Tensor, observation: TensorDict, reset: Tensor) -> State:
        """The measured frame takes the place of the imagined one; task and goal stay, nothing else is remembered."""
        with torch.no_grad():
            z = self.substrate.encode(observation).flatten(-2)
        state = state.copy()
        state["z"] = z
        if "task" in observation.keys():
            state["task"] = task_rows(observation["task"], self.task_ids, self.spec.tasks)
        return state

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        self.spec.require("decode")
        if isinstance(state, Imagined):
            if state.frames is None:
                raise ValueError("this Imagined holds no frames; call imagine(..., with_frames=True) to decode it")
            z = state.frames
        else:
            z = state["z"]
        for key in keys or ():
            if key not in self.substrate.decodes:
                raise unknown_name("observation key", key, self.substrate.decodes)
        parts = self.substrate.decode(self._tokens_of(z), keys)
        chosen = {
            key: uint8_images(value) if len(self.spec.observation[key]) == 3 else value
            for key, value in parts.items()
            if keys is None or key in keys
        }
        return TensorDict(chosen, batch_size=z.shape[:-1])

    def _tokens_of(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.substrate.tokens, self.substrate.width))

    def _changes(self, frames: Tensor, present: Tensor) -> Tensor:
        """Future frames [X, J, L, D] of the substrate as what the flow generates."""
        if not self.relative:
            return frames * self.denoiser.moves
        return (frames - present.unsqueeze(1)) / self.unit * self.denoiser.moves

    def _frames(self, changes: Tensor, present: Tensor) -> Tensor:
        """Undo `_changes`."""
        if not self.relative:
            return changes
        return present.unsqueeze(1) + changes * self.denoiser.moves * self.unit

    # ---- queries -------------------------------------------------------------------------------------------------

    def imagine(
        self,
        state: State,
        actions: Tensor | None,
        *,
        futures: int | None = None,
        noise: NoiseKey | None = None,
        with_frames: bool = False,
    ) -> Imagined:
        """Futures by chunks, see the module.

        All candidates of a row share the noise of a future, so that they are compared under the same luck; without
        `noise` it is that of rows 0 to R - 1.
        """
        self.spec.require("video" if actions is None else "rollout")
        rows, device = state.batch_size[0], state["z"].device
        num, horizon = (1, self.spec.chunk_length) if actions is None else actions.shape[1:3]
        if horizon > self.spec.max_horizon:
            raise ValueError(
                f"actions has {horizon} steps, but this model imagines {self.spec.max_horizon} at most (max_horizon)"
            )
        samples = self.spec.ensemble_size if futures is None else futures
        if samples < 1:
            raise ValueError(f"futures is {futures}, expected at least 1")
        noise = NoiseKey.for_rows(rows, device=device) if noise is None else noise
        stage = self.coupling.queries["video" if actions is None else "rollout"][-1]
        (future,) = stage.denoise
        chunk = self.spec.chunk_length
        z, task, shared = state["z"], state["task"], True
        frames = []
        for number, first in enumerate(range(0, horizon, chunk)):
            prefix = self.denoiser.prefix(self._tokens_of(z), task)
            if shared:
                prefix, z, task = prefix.repeat(num), z.repeat_interleave(num, 0), task.repeat_interleave(num, 0)
            if actions is not None:
                part = actions[:, :, first : first + chunk].clamp(-1.0, 1.0)
                part = torch.cat([part, part[:, :, -1:].expand(-1, -1, chunk - part.shape[2], -1)], dim=2)
                part = part.flatten(0, 1) if shared else part.flatten(0, 1).repeat_interleave(samples, 0)
                (given,) = stage.given
                prefix = self.denoiser.extend(prefix, given, part, task)
            if shared:
                prefix = prefix.repeat(samples)
                z, task, shared = z.repeat_interleave(samples, 0), task.repeat_interleave(samples, 0), False
            start = self.denoiser.start(future, noise.fold(number), rows, samples, device=device)
            start = start.unsqueeze(1).expand(-1, num, *start.shape[1:]).flatten(0, 2)
            sample, _ = self.denoiser.sample(prefix, stage, {future: start}, task, self.future_steps)
            frames.append(self._frames(sample[future], self._tokens_of(z)).flatten(2))
            z = frames[-1][:, -1]
        return self._imagined(state, torch.cat(frames, dim=1), (rows, num, samples), horizon, with_frames)

    def _imagined(
        self, state: State, frames: Tensor, batch: tuple[int, int, int], horizon: int, with_frames: bool
    ) -> Imagined:
        """What the heads read off frames [R * N * M, J', L * D]."""
        rows, num, samples = batch
        stride = self.spec.frame_stride
        present = state["z"].repeat_interleave(num * samples, 0).unsqueeze(1)
        task = state["task"].repeat_interleave(num * samples, 0)
        before = torch.cat([present, frames[:, :-1]], dim=1)
        outcome = self.heads.outcome(before, frames, task)
        share = (torch.arange(1, stride + 1, device=frames.device) / stride)[None, None, :, None]
        between = before.unsqueeze(2) + share * (frames - before).unsqueeze(2)

        def by_step(x: Tensor) -> Tensor:
            return x.repeat_interleave(stride, 1)[:, :horizon].unflatten(0, batch)

        path = between.flatten(1, 2)[:, :horizon].unflatten(0, batch)
        uncertainty = None
        if samples > 1:
            moving = self.denoiser.moves.flatten().float()
            spread = frames.unflatten(0, batch).std(dim=2, correction=0)
            spread = (spread * moving).sum(-1) / moving.sum().clamp(min=1.0)
            uncertainty = spread.repeat_interleave(stride, -1)[..., :horizon].unsqueeze(2).expand(-1, -1, samples, -1)
        leaf = TensorDict({"z": path[:, :, :, -1], "task": task.unflatten(0, batch)}, batch_size=list(batch))
        return Imagined(
            leaf=leaf,
            evaluations=num * samples * horizon,
            reward=by_step(outcome[..., 0]),
            success=by_step(outcome[..., 1].sigmoid()),
            uncertainty=uncertainty,
            frames=path if with_frames else None,
        )

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
        """Chunks by the coupling's policy, or with `future` (a State at the chunk's end) by inverse dynamics.

        mode: "ode" is deterministic given the noise it starts from, which is zero without `noise`; "sde" draws noise
        at every step and keeps the chain. A whole chunk is sampled whatever `horizon`; the chain holds all of it.
        perturbation: is added to the chunk; a chunk is decided at once, so that nothing reacts to it.
        """
        if behaviour:
            self.spec.require("behaviour")
        if mode not in ("ode", "sde"):
            raise ValueError(f"mode is '{mode}'; expected 'ode' (deterministic) or 'sde' (sampled)")
        if mode == "sde" and noise is None:
            raise ValueError("mode='sde' samples, so it needs noise=NoiseKey; use mode='ode' without")
        steps = perturbation.shape[2] if perturbation is not None else horizon or self.spec.chunk_length
        if steps > self.spec.chunk_length:
            raise ValueError(
                f"{steps} steps were asked for, but this model proposes chunks of {self.spec.chunk_length}; "
                f"set planner.horizon={self.spec.chunk_length} or less"
            )
        query = self.policy_query
        if future is not None:
            self.spec.require("inverse")
            query = "inverse"
        stages = self.coupling.queries[query]
        rows, device = state.batch_size[0], state["z"].device
        task = state["task"].repeat_interleave(num, 0)
        prefix = self.denoiser.prefix(self._tokens_of(state["z"]), state["task"])
        if future is not None:
            (given,) = stages[0].given
            gap = self._changes(self._tokens_of(future["z"]).unsqueeze(1), self._tokens_of(state["z"]))[:, -1:]
            content = gap.new_zeros(rows, *self.denoiser.shape(given))
            content[:, -1:] = gap
            hidden = torch.ones(rows, self.denoiser.frames, dtype=torch.bool, device=device)
            hidden[:, -1] = False
            prefix = self.denoiser.extend(prefix, given, content, state["task"], hidden)
        prefix = prefix.repeat(num)
        known: dict[str, Tensor] = {}
        chain: list[Tensor] | None = None
        times = logs = None
        for number, stage in enumerate(stages):
            key = None if noise is None else noise.fold(number)
            for name, source in stage.given.items():
                if source in known:
                    prefix = self.denoiser.extend(prefix, name, known[source], task)
            starts = {n: self.denoiser.start(n, key and key.fold(i), rows, num, device=device).flatten(0, 1)
                      for i, n in enumerate(stage.denoise)}  # fmt: skip
            action = next((n for n in stage.denoise if self.denoiser.kind(n) == "action"), None)
            if action is not None and mode == "sde":
                if len(stage.denoise) > 1:
                    raise ValueError(
                        f"the policy '{query}' denoises {' and '.join(stage.denoise)} together, so that no step has a "
                        "density of the action alone; use mode='ode', which draws the noise it starts from"
                    )
                assert key is not None
                draws = (
                    key.fold(len(stage.denoise))
                    .normal(num, self.action_steps, *self.denoiser.shape(action))
                    .flatten(0, 1)
                )
                at, now = prefix, stage

                def velocity(x: Tensor, time: float, action: str = action, at: Prefix = at, now: Stage = now) -> Tensor:
                    return self.denoiser.velocity(at, now, {action: x}, x.new_full((len(x),), time), task)[action]

                sampled = sde_sample(velocity, starts[action], draws, scale=self.sde_scale, event_dims=2)
                chain, times, logs = sampled.points, sampled.times, sampled.log_prob.unflatten(0, (rows, num))
            else:
                budget = self.action_steps if action is not None else self.future_steps
                leap = query == self.policy_query  # shortcuts are taught to the policy alone
                samples, paths = self.denoiser.sample(prefix, stage, starts, task, budget, leap=leap)
                known |= samples
                if action is not None:
                    chain = paths[action]
                    times = torch.linspace(0.0, 1.0, len(chain), device=device)
        assert chain is not None
        actions = chain[-1].unflatten(0, (rows, num))[:, :, :steps]
        imagined = None
        if perturbation is not None:
            actions = actions + perturbation
        elif known_future := [n for n in known if self.denoiser.kind(n) == "future"]:
            present = self._tokens_of(state["z"]).repeat_interleave(num, 0)
            frames = self._frames(known[known_future[-1]], present).flatten(2)
            imagined = self._imagined(state, frames, (rows, num, 1), steps, True)
        return Proposal(
            actions=actions.clamp(-1.0, 1.0),
            chain=torch.stack(chain, dim=1).unflatten(0, (rows, num)),
            times=times,
            log_prob=logs,
            imagined=imagined,
        )

    def policy_parameters(self) -> list[nn.Parameter] | None:
        """Of the expert of actions, with their embedding and output, and of the values; the trunk is all the rest.

        None where actions share their expert with frames and futures, so that no weight is the policy's alone.
        """
        net, expert = self.denoiser, self.denoiser.backbone.expert_of
        if expert["action"] in (expert["frame"], expert["future"]):
            return None
        parts = (net.backbone.experts[expert["action"]], net.embed_action, net.to_action, self.heads.values)
        return [net.action_time, *(parameter for part in parts for parameter in part.parameters())]

    @property
    def policy_sees_present_alone(self) -> bool:
        """Whether no frame after the first one of a window teaches the policy anything."""
        futures = (name for name, segment in self.coupling.segments.items() if segment.kind == "future")
        return not any(self.coupling.sees(self.acting, name) for name in futures)

    @property
    def policy_denoises_actions_alone(self) -> bool:
        """Whether no future is denoised together with the policy's action, as `propose` asks for with mode="sde"."""
        return len(self.coupling.queries[self.policy_query][-1].denoise) == 1

    @staticmethod
    def _is_chain(stages: Sequence[Stage]) -> bool:
        """Whether a policy is one denoising chain of the action alone, so that its steps have densities."""
        return len(stages) == 1 and len(stages[0].denoise) == 1 and not stages[0].given

    def log_prob(self, state: State, proposal: Proposal) -> Tensor:
        """[R, N, K] log-densities of the stored SDE chain under the present weights, all steps in one pass."""
        self.spec.require("log_prob")
        if proposal.chain is None or proposal.times is None:
            raise ValueError("this Proposal holds no chain to replay; take one from propose(mode='sde')")
        rows, num, points = proposal.chain.shape[:3]
        count = points - 1
        times = proposal.times.tolist()
        before = proposal.chain[:, :, :-1].flatten(0, 2)
        (stage,) = self.coupling.queries[self.policy_query]
        (action,) = stage.denoise
        prefix = self.denoiser.prefix(self._tokens_of(state["z"]), state["task"]).repeat(num * count)
        task = state["task"].repeat_interleave(num * count, 0)
        time = proposal.times[:-1].to(before.device, before.dtype).repeat(rows * num)
        v = self.denoiser.velocity(prefix, stage, {action: before}, time, task)[action].unflatten(0, (rows, num, count))
        logs = []
        for k in range(count):
            mean, std = sde_step(proposal.chain[:, :, k], v[:, :, k], times[k], times[k + 1], self.sde_scale)
            logs.append(gaussian_log_prob(proposal.chain[:, :, k + 1], mean, std, 2))
        return torch.stack(logs, dim=-1)

    # ---- heads ---------------------------------------------------------------------------------------------------

    def value(self, state: State) -> Tensor:
        return self.heads.value(state["z"], state["task"]).movedim(0, -1) * self.value_unit

    def success_value(self, state: State) -> Tensor:
        self.spec.require("success_value")
        return self.heads.success_value(state["z"], state["task"]).sigmoid().movedim(0, -1) * self.value_unit

    # ---- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: TensorDict, *, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Velocity errors of all segments and the heads' losses, on the first H steps of each window.

        batch: [B], the batch contract of `wamrl.data`, of at least H steps.

        Raises:
            ValueError: for shorter windows.
        """
        horizon, stride = self.spec.chunk_length, self.spec.frame_stride
        rows, length = batch["action"].shape[:2]
        if length < horizon:
            raise ValueError(f"windows have {length} steps, but a chunk has {horizon}; set length={horizon} or more")
        device = batch["action"].device
        task = task_rows(batch["task"], self.task_ids, self.spec.tasks)
        with torch.no_grad():
            z = self.substrate.encode(batch["observation"][:, : horizon + 1 : stride])  # [B, J+1, L, D]
        present, later = z[:, 0], z[:, 1:]
        valid = batch["valid"][:, :horizon]
        arrived = valid[:, stride - 1 :: stride]  # the frame at the end of each stride was seen
        executed = batch["action"][:, :horizon].clamp(-1.0, 1.0)
        labelled = batch["label_valid"][:, :horizon]
        wanted = torch.where(labelled.unsqueeze(-1), batch["label"][:, :horizon], executed).clamp(-1.0, 1.0)
        imitated = (labelled | batch["imitate"].unsqueeze(1)) & valid
        changes = self._changes(later, present)

        data = {}
        for name in self.coupling.trained():
            segment = self.coupling.segments[name]
            if segment.kind != "frame":
                clean = {"label": wanted, "executed": executed}[segment.target]
                data[name] = changes if segment.kind == "future" else clean
        totals: dict[str, tuple[Tensor, Tensor]] = {}
        imagined: list[tuple[Tensor, Tensor]] = []
        share = self.substrate.shares(self.denoiser.moves) if self.changes else None
        found = self.denoiser.errors(present, data, task, noise, share)
        for (name, _), (square, time, estimate) in found.items():
            if self.denoiser.kind(name) == "future":
                weight = arrived & (time[:, -1:] < 1.0)  # clean or a goal: nothing to predict
                imagined.append((self._frames(estimate, present), weight))
            else:
                weight = (imitated if self.coupling.segments[name].target == "label" else valid) & (time < 1.0)
            error, count = totals.get(name, (torch.zeros((), device=device), torch.zeros((), device=device)))
            totals[name] = (error + (square * weight).sum(), count + weight.sum())
        losses = {f"flow_{name}": error / count.clamp(min=1.0) for name, (error, count) in totals.items()}
        total = torch.zeros((), device=device)
        for name in totals:
            weight = self.loss_weights["policy" if name == self.acting else "flows"]
            total = total + weight * self.coupling.segments[name].weight * losses[f"flow_{name}"]
        if self.shortcut:
            count = max(1, round(self.shortcut * rows))
            losses["shortcut"] = self._shortcut_loss(
                present[:count], wanted[:count], task[:count], imitated[:count], noise
            )
            total = total + self.loss_weights["policy"] * losses["shortcut"]
        heads = self.heads.losses(batch, z.flatten(2), task, arrived)
        total = total + sum(self.loss_weights[name] * value for name, value in heads.items())
        if self.loss_weights["imagined"]:
            for frames, seen in imagined:
                guessed = self.heads.imagined_losses(batch, z.flatten(2), frames.flatten(2), task, seen)
                total = total + self.loss_weights["imagined"] * sum(
                    self.loss_weights[name] * value for name, value in guessed.items()
                )
                heads |= {f"imagined_{name}": value for name, value in guessed.items()}
        return {"loss": total, **{name: value.detach() for name, value in {**losses, **heads}.items()}}

    def _shortcut_loss(
        self, present: Tensor, wanted: Tensor, task: Tensor, imitated: Tensor, noise: torch.Generator | None
    ) -> Tensor:
        """One step of length d is to lead where two of d / 2 lead, with d from 1 down to 1/8 (the paper's eq. 5)."""
        (stage,) = self.coupling.queries[self.policy_query]
        (action,) = stage.denoise
        rows, device = len(present), present.device
        level = torch.randint(len(LEVELS), (rows,), generator=noise, device=device)
        stride = torch.tensor(LEVELS, device=device)[level]
        place = torch.rand(rows, generator=noise, device=device)
        time = (place / stride).floor() * stride  # of the steps that begin at 0
        half = 0.5 * stride
        asked = half.where(half > 0.5 * LEVELS[-1], 0.0)  # the shortest steps follow the flow itself
        draw = torch.randn(wanted.shape, generator=noise, device=device)
        x = interpolate(draw, wanted, time[:, None, None])
        prefix = self.denoiser.prefix(present, task)

        def velocity(x: Tensor, time: Tensor, stride: Tensor) -> Tensor:
            return self.denoiser.velocity(prefix, stage, {action: x}, time, task, stride)[action]

        with torch.no_grad():
            first = velocity(x, time, asked)
            second = velocity(x + half[:, None, None] * first, time + half, asked)
        square = (velocity(x, time, stride) - 0.5 * (first + second)).square().mean(-1)
        return (square * imitated).sum() / imitated.sum().clamp(min=1)

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target values towards the online ones by `target_rate`."""
        self.heads.update_targets(self.target_rate)
