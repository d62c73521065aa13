"""A World Action Model by flow matching: any substrate, backbone and coupling in one class.

Futures are frames at every `frame_stride`-th control step of a chunk, written as their change from the present frame
where the substrate knows how much its numbers change. A coupling (`wamrl.models.coupling`) says which tokens see which
and how their noise times are drawn in training; its queries are the questions that one set of weights answers.
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

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.interfaces import WAM, Anatomy, Context, Imagined, Layout, Proposal, Spec, State, task_id
from wamrl.models.coupling import POLICIES, Coupling, Stage
from wamrl.models.dit import Cache, DiT, Stream
from wamrl.models.flow import gaussian_log_prob, interpolate, ode_sample, sample_times, sde_sample, sde_step
from wamrl.models.images import uint8_images
from wamrl.models.joint_embedding import ensemble_mlp, mlp, task_rows
from wamrl.models.mot import MixtureOfTransformers
from wamrl.models.substrate import make_substrate
from wamrl.naming import unknown_name
from wamrl.noise import NoiseKey

BACKBONES: dict[str, type[DiT]] = {"dit": DiT, "mot": MixtureOfTransformers}
LEVELS = (1.0, 0.5, 0.25, 0.125)
"""Lengths of the steps that shortcuts are taught."""
ANATOMY = {"dit": "iterative denoising (DiT)", "mot": "iterative denoising (mixture of transformers)"}


Part = tuple[str, int]
"""A segment of the coupling and the number of its copy."""


@dataclass(frozen=True)
class Tokens:
    """A sequence of S tokens behind P cached ones.

    parts: in order. mask: [1, 1, S, P + S] bool. same: [S, P + S] bool, tokens that share a noise time. inside: per
    part, the group of each of its tokens within it. experts: (number, its parts, their tokens, group of each token).
    """

    parts: tuple[Part, ...]
    mask: Tensor
    same: Tensor
    inside: list[Tensor]
    experts: list[tuple[int, tuple[Part, ...], list[int], Tensor]]


@dataclass(frozen=True)
class Prefix:
    """Clean tokens that are encoded once.

    parts: the segments, in the order of the cache. hidden: [X, P] bool, True for tokens that no later one may see, or
    None.
    """

    parts: tuple[str, ...]
    cache: Cache
    hidden: Tensor | None = None

    def repeat(self, times: int) -> Prefix:
        """Every row `times` times in a row."""
        if times == 1:
            return self
        cache = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.cache]
        return Prefix(self.parts, cache, None if self.hidden is None else self.hidden.repeat_interleave(times, 0))


class FlowWAM(WAM):
    """Flow matching over future frames and actions.

    observation: key -> shape of what the substrate reads. substrate: see `make_substrate`. backbone: `name` ("dit" or
    "mot") and its sizes. coupling: `segments` and `queries`, see `Coupling`; the queries become `Spec.provides`.
    chunk_length: H. frame_stride: control steps between predicted frames. max_horizon: the longest imagination; beyond
    H it goes on from its last frame. futures: M sampled per candidate; their disagreement is the uncertainty.
    action_steps, future_steps: K of the samplers. sde_scale: of the policy's SDE, see `wamrl.models.flow.sde_step`.
    policy: which query `propose` answers with: "policy", "joint" or "future_first"; None is the coupling's first.
    shortcut: above 0, the share of a batch that teaches the policy to take long steps at once (Frans et al., 2024,
    arXiv:2410.12557), for 1 or 2 action_steps.
    discount, reward_scale, success_bonus, expectile, values, target_rate: as in the reference WAM.
    loss_weights: of reward, success and value; those of the flows are the segments'.
    """

    task_ids: Tensor
    unit: Tensor
    moves: Tensor

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
        expectile: float = 0.7,
        reward_scale: float = 10.0,
        success_bonus: float = 10.0,
        loss_weights: Mapping[str, float] | None = None,
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if chunk_length < 1 or frame_stride < 1 or chunk_length % frame_stride:
            raise ValueError(
                f"chunk_length is {chunk_length} and frame_stride {frame_stride}, but a chunk must hold a whole number "
                "of frames: choose a frame_stride that divides it"
            )
        for name, value in (("futures", futures), ("action_steps", action_steps), ("future_steps", future_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        self.coupling = Coupling(**coupling)
        queries = self.coupling.queries
        answered = [name for name in POLICIES if name in queries]
        if not answered:
            raise ValueError(f"the coupling answers none of {', '.join(POLICIES)}, so that it could not act")
        self.policy_query = policy or answered[0]
        if self.policy_query not in answered:
            raise unknown_name("policy of this coupling", self.policy_query, answered)
        places = Layout.of(layout, observation)
        self.substrate = make_substrate(substrate, observation, places)
        settings = dict(backbone)
        name = str(settings.pop("name", ""))
        if name not in BACKBONES:
            raise unknown_name("backbone", name, BACKBONES)
        if not 0.0 <= shortcut <= 1.0:
            raise ValueError(f"shortcut is {shortcut}, expected a share of the batch from 0 to 1")
        if shortcut and not self._is_chain(queries[self.policy_query]):
            raise ValueError(
                f"shortcut={shortcut} teaches a policy that denoises the action alone to do so in long steps, but "
                f"'{self.policy_query}' denoises a future too; set shortcut=0"
            )
        self.shortcut = shortcut
        self.backbone = BACKBONES[name](**settings, shortcut=shortcut > 0)
        provides = {"decode"} if self.substrate.decodes else set()
        provides |= {"policy", "value", "observe", "goal"} | {
            q for q in ("rollout", "inverse", "video") if q in queries
        }
        if self._is_chain(queries[self.policy_query]):
            provides.add("log_prob")
        if {"rollout", "video", "joint", "future_first"} & set(queries):
            provides |= {"reward", "success"} | ({"uncertainty"} if futures > 1 else set())
        self.spec = Spec(
            observation={key: tuple(shape) for key, shape in observation.items()},
            action_dim=action_dim,
            tasks=tuple(tasks),
            chunk_length=chunk_length,
            max_horizon=max_horizon or chunk_length,
            discount=discount,
            control_dt_s=control_dt_s,
            provides=frozenset(provides),
            anatomy=Anatomy(
                self.substrate.describe(),
                ANATOMY[name],
                "action-conditioned rollout and joint generation" if "rollout" in queries else self.policy_query,
                "chunked",
            ),
            frame_stride=frame_stride,
            ensemble_size=futures,
            success_bonus=success_bonus,
            layout=places,
        )
        self.action_steps, self.future_steps, self.sde_scale = action_steps, future_steps, sde_scale
        self.expectile, self.target_rate = expectile, target_rate
        self.value_unit = (reward_scale + success_bonus) / (1.0 - discount)
        self.loss_weights = {"reward": 0.5, "success": 0.5, "value": 10.0, **(loss_weights or {})}
        self.frames = chunk_length // frame_stride
        length, size = self.substrate.tokens, self.substrate.width
        # A future frame is (frame - present) / unit where the substrate knows its changes; what never moves is not
        # predicted.
        self.register_buffer("unit", torch.ones(self.frames, length, size))
        self.register_buffer("moves", self.substrate.used.clone())
        self.register_buffer("task_ids", torch.tensor([task_id(task) for task in tasks]))
        wide, narrow = self.backbone.width("future"), self.backbone.width("action")
        self.task_token = nn.Embedding(len(tasks), wide)
        self.embed_frame, self.embed_future = nn.Linear(size, wide), nn.Linear(size, wide)
        self.embed_action = nn.Linear(action_dim, narrow)
        self.place = nn.Parameter(0.02 * torch.randn(length, wide))
        self.frame_time = nn.Parameter(0.02 * torch.randn(self.frames, wide))
        self.action_time = nn.Parameter(0.02 * torch.randn(chunk_length, narrow))
        self.to_future, self.to_action = nn.Linear(wide, size), nn.Linear(narrow, action_dim)
        for layer in (self.to_future, self.to_action):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        flat = length * size
        self.head_task = nn.Embedding(len(tasks), task_dim)
        self.outcome = mlp(2 * flat + task_dim, [head_width, head_width], 2)
        self.values = ensemble_mlp(values, flat + task_dim, [head_width, head_width], 1)
        nn.init.zeros_(self.values[-1].weight)  # type: ignore[arg-type]
        self.target_values = copy.deepcopy(self.values).requires_grad_(False)
        step = torch.arange(1, self.frames + 1).repeat_interleave(length)
        self._tokens = {
            "frame": (torch.zeros(length + 1), torch.zeros(length + 1, dtype=torch.int64)),
            "future": (step * float(frame_stride), step - 1),
            "action": (torch.arange(chunk_length) + 0.5, torch.zeros(chunk_length, dtype=torch.int64)),
        }
        self._sequences: dict[tuple[tuple[Part, ...], tuple[Part, ...], torch.device], Tokens] = {}

    # ---- borders -------------------------------------------------------------------------------------------------

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hand the training data's statistics to the substrate, and take from it how much frames change."""
        self.substrate.set_normalisation(statistics)
        change = self.substrate.change
        if change is not None:
            steps = torch.arange(1, self.frames + 1, device=change.device) * self.spec.frame_stride
            # Motion goes on for a while, and two frames far apart differ by sqrt(2) standard deviations at most.
            self.unit.copy_((change * steps[:, None, None]).clamp(max=math.sqrt(2.0)).where(change > 0, 1.0))
            self.moves.copy_(self.substrate.used & (change > 0))

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
        """The measured frame takes the place of the imagined one; this model remembers nothing else."""
        with torch.no_grad():
            z = self.substrate.encode(observation).flatten(-2)
        task = state["task"]
        if "task" in observation.keys():
            task = task_rows(observation["task"], self.task_ids, self.spec.tasks)
        return TensorDict({"z": z, "task": task}, batch_size=state.batch_size)

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
        if self.substrate.change is None:
            return frames * self.moves
        return (frames - present.unsqueeze(1)) / self.unit * self.moves

    def _frames(self, changes: Tensor, present: Tensor) -> Tensor:
        """Undo `_changes`."""
        if self.substrate.change is None:
            return changes
        return present.unsqueeze(1) + changes * self.moves * self.unit

    # ---- sequences -----------------------------------------------------------------------------------------------

    def _sequence(self, before: tuple[Part, ...], parts: tuple[Part, ...], device: torch.device) -> Tokens:
        """The tokens of `parts` behind a cached prefix of `before`; made once."""
        key = (before, parts, device)
        if key in self._sequences:
            return self._sequences[key]
        whole = self.coupling.layout((*before, *parts), self._tokens, self.backbone.expert_of)
        ordered = tuple(part for part in whole.parts if part in parts)
        spans = [whole.spans[part] for part in ordered]
        rows, columns = _index(spans), _index([whole.spans[part] for part in (*before, *ordered)])
        experts = []
        for expert in sorted({self.backbone.expert_of[self._kind(part)] for part in ordered}):
            own = tuple(part for part in ordered if self.backbone.expert_of[self._kind(part)] == expert)
            group, first = [], 0
            for part in own:
                inside = whole.group[whole.spans[part]] - whole.groups[part].start
                group.append(inside + first)
                first += int(inside[-1]) + 1
            sizes = [whole.spans[part].stop - whole.spans[part].start for part in own]
            experts.append((expert, own, sizes, torch.cat(group).to(device)))
        self._sequences[key] = Tokens(
            parts=ordered,
            mask=whole.mask[rows][:, columns].to(device)[None, None],
            same=(whole.group[rows].unsqueeze(1) == whole.group[columns]).to(device),
            inside=[(whole.group[span] - whole.groups[part].start).to(device)
                    for part, span in zip(ordered, spans, strict=True)],
            experts=experts,
        )  # fmt: skip
        return self._sequences[key]

    def _embed(self, kind: str, content: Tensor, task: Tensor) -> Tensor:
        """Tokens [X, S, W] of a frame [X, L, D], future [X, J, L, D] or chunk [X, H, A]."""
        if kind == "action":
            return self.embed_action(content) + self.action_time
        if kind == "future":
            return (self.embed_future(content) + self.place + self.frame_time.unsqueeze(1)).flatten(1, 2)
        return torch.cat([self.embed_frame(content) + self.place, self.task_token(task).unsqueeze(1)], dim=1)

    def _run(
        self,
        parts: Sequence[Part],
        contents: Mapping[Part, Tensor],
        times: Mapping[Part, Tensor],
        task: Tensor,
        *,
        hidden: Mapping[Part, Tensor] | None = None,
        prefix: Prefix | None = None,
        stride: Tensor | None = None,
    ) -> tuple[dict[Part, Tensor], Cache]:
        """Velocities of `parts` (in the shape of their contents), and their keys and values.

        times: [X, groups of the part]. hidden: [X, groups of the part] bool, tokens that only their own group sees.
        stride: [X] of all parts, see `Stream`.
        """
        before = () if prefix is None else tuple((name, 0) for name in prefix.parts)
        sequence = self._sequence(before, tuple(parts), task.device)
        mask = sequence.mask
        if hidden or (prefix is not None and prefix.hidden is not None):
            behind = []
            if prefix is not None:
                length = prefix.cache[0][0].shape[2]
                behind = [task.new_zeros(len(task), length, dtype=torch.bool)]
                behind = behind if prefix.hidden is None else [prefix.hidden]
            for part, inside in zip(sequence.parts, sequence.inside, strict=True):
                flags = (hidden or {}).get(part)
                empty = task.new_zeros(len(task), len(inside), dtype=torch.bool)
                behind.append(empty if flags is None else flags[:, inside])
            mask = mask & (sequence.same | ~torch.cat(behind, dim=1).unsqueeze(1)).unsqueeze(1)
        streams = {
            expert: Stream(
                torch.cat([self._embed(self._kind(part), contents[part], task) for part in own], dim=1),
                torch.cat([times[part] for part in own], dim=1),
                group,
                None if stride is None else stride.unsqueeze(1).expand(-1, int(group[-1]) + 1),
            )
            for expert, own, _, group in sequence.experts
        }
        outputs, cache = self.backbone(streams, mask, None if prefix is None else prefix.cache)
        velocities: dict[Part, Tensor] = {}
        for expert, own_parts, sizes, _ in sequence.experts:
            for part, own in zip(own_parts, outputs[expert].split(sizes, dim=1), strict=True):
                kind = self._kind(part)
                if kind == "action":
                    velocities[part] = self.to_action(own)
                elif kind == "future":
                    velocities[part] = self.to_future(own).unflatten(1, (self.frames, -1)) * self.moves
        return velocities, cache

    def _kind(self, part: Part) -> str:
        return self.coupling.segments[part[0]].kind

    # ---- sampling ------------------------------------------------------------------------------------------------

    def _prefix(self, z: Tensor, task: Tensor) -> Prefix:
        """The present frame z [X, L * D], encoded once."""
        part = ("F", 0)
        _, cache = self._run([part], {part: self._tokens_of(z)}, {part: torch.ones_like(z[:, :1])}, task)
        return Prefix(("F",), cache)

    def _extend(self, prefix: Prefix, name: str, content: Tensor, task: Tensor, hidden: Tensor | None = None) -> Prefix:
        """`prefix` and the clean segment `name`. hidden: [X, groups] bool, of which nobody sees anything."""
        part = (name, 0)
        groups = self.frames if self._kind(part) == "future" else 1
        times = torch.ones(len(task), groups, device=task.device)
        flags = {} if hidden is None else {part: hidden}
        if hidden is not None:
            times = times.masked_fill(hidden, 0.0)
        _, new = self._run([part], {part: content}, {part: times}, task, hidden=flags, prefix=prefix)
        cache = [
            (torch.cat([old[0], late[0]], dim=2), torch.cat([old[1], late[1]], dim=2))
            for old, late in zip(prefix.cache, new, strict=True)
        ]
        behind = prefix.hidden
        if hidden is not None or behind is not None:
            length = prefix.cache[0][0].shape[2]
            if behind is None:
                behind = torch.zeros(len(task), length, dtype=torch.bool, device=task.device)
            late_hidden = torch.zeros(len(task), new[0][0].shape[2], dtype=torch.bool, device=task.device)
            if hidden is not None:
                late_hidden = hidden.repeat_interleave(new[0][0].shape[2] // groups, 1)
            behind = torch.cat([behind, late_hidden], dim=1)
        return Prefix((*prefix.parts, name), cache, behind)

    def _velocity(
        self,
        prefix: Prefix,
        stage: Stage,
        contents: Mapping[str, Tensor],
        time: Tensor,
        task: Tensor,
        stride: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Velocities of the segments that `stage` denoises, all at `time` [X]; stride: [X], see `Stream`."""
        shown = {**contents, **{name: contents[twin] for name, twin in stage.tied.items()}}
        parts = [(name, 0) for name in shown]
        times = {
            part: time.unsqueeze(1).expand(-1, self.frames if self._kind(part) == "future" else 1) for part in parts
        }
        found, _ = self._run(
            parts, {(name, 0): x for name, x in shown.items()}, times, task, prefix=prefix, stride=stride
        )
        return {name: found[(name, 0)] for name in contents}

    def _shape(self, name: str) -> tuple[int, ...]:
        if self.coupling.segments[name].kind == "action":
            return (self.spec.chunk_length, self.spec.action_dim)
        return (self.frames, self.substrate.tokens, self.substrate.width)

    def _start(self, name: str, noise: NoiseKey | None, rows: int, *shared: int, device: torch.device) -> Tensor:
        """Noise [rows, *shared, ...] that the sampler of a segment starts from; without a key its mean, zero."""
        shape = self._shape(name)
        if noise is None:
            return torch.zeros(rows, *shared, *shape, device=device)
        x = noise.normal(*shared, *shape)
        return x * self.moves if self.coupling.segments[name].kind == "future" else x

    def _denoise(
        self, prefix: Prefix, stage: Stage, starts: Mapping[str, Tensor], task: Tensor, steps: int
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Samples of the segments of `stage` by the ODE, in lock step, and their paths."""
        names = list(starts)
        shapes = [starts[name].shape[1:] for name in names]
        sizes = [math.prod(shape) for shape in shapes]

        def unpack(x: Tensor) -> dict[str, Tensor]:
            parts = x.split(sizes, dim=1)
            return {n: part.unflatten(1, shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

        def velocity(x: Tensor, time: float) -> Tensor:
            stride = x.new_full((len(x),), 1.0 / steps) if self.shortcut else None
            found = self._velocity(prefix, stage, unpack(x), x.new_full((len(x),), time), task, stride)
            return torch.cat([found[name].flatten(1) for name in names], dim=1)

        path = ode_sample(velocity, torch.cat([starts[name].flatten(1) for name in names], dim=1), steps)
        points = [unpack(x) for x in path]
        return points[-1], {name: [point[name] for point in points] for name in names}

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
            prefix = self._prefix(z, task)
            if shared:
                prefix, z, task = prefix.repeat(num), z.repeat_interleave(num, 0), task.repeat_interleave(num, 0)
            if actions is not None:
                part = actions[:, :, first : first + chunk].clamp(-1.0, 1.0)
                part = torch.cat([part, part[:, :, -1:].expand(-1, -1, chunk - part.shape[2], -1)], dim=2)
                part = part.flatten(0, 1) if shared else part.flatten(0, 1).repeat_interleave(samples, 0)
                (given,) = stage.given
                prefix = self._extend(prefix, given, part, task)
            if shared:
                prefix = prefix.repeat(samples)
                z, task, shared = z.repeat_interleave(samples, 0), task.repeat_interleave(samples, 0), False
            start = self._start(future, noise.fold(number), rows, samples, device=device)
            start = start.unsqueeze(1).expand(-1, num, *start.shape[1:]).flatten(0, 2)
            sample, _ = self._denoise(prefix, stage, {future: start}, task, self.future_steps)
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
        outcome = self._outcome(before, frames, task)
        share = (torch.arange(1, stride + 1, device=frames.device) / stride)[None, None, :, None]
        between = before.unsqueeze(2) + share * (frames - before).unsqueeze(2)

        def by_step(x: Tensor) -> Tensor:
            return x.repeat_interleave(stride, 1)[:, :horizon].unflatten(0, batch)

        path = between.flatten(1, 2)[:, :horizon].unflatten(0, batch)
        uncertainty = None
        if samples > 1:
            moving = self.moves.flatten().float()
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
        prefix = self._prefix(state["z"], state["task"])
        if future is not None:
            (given,) = stages[0].given
            gap = self._changes(self._tokens_of(future["z"]).unsqueeze(1), self._tokens_of(state["z"]))[:, -1:]
            content = gap.new_zeros(rows, *self._shape(given))
            content[:, -1:] = gap
            hidden = torch.ones(rows, self.frames, dtype=torch.bool, device=device)
            hidden[:, -1] = False
            prefix = self._extend(prefix, given, content, state["task"], hidden)
        prefix = prefix.repeat(num)
        known: dict[str, Tensor] = {}
        chain: list[Tensor] | None = None
        times = logs = None
        for number, stage in enumerate(stages):
            key = None if noise is None else noise.fold(number)
            for name, source in stage.given.items():
                if source in known:
                    prefix = self._extend(prefix, name, known[source], task)
            starts = {n: self._start(n, key and key.fold(i), rows, num, device=device).flatten(0, 1)
                      for i, n in enumerate(stage.denoise)}  # fmt: skip
            action = next((n for n in stage.denoise if self.coupling.segments[n].kind == "action"), None)
            if action is not None and mode == "sde":
                if len(stage.denoise) > 1:
                    raise ValueError(
                        f"the policy '{query}' denoises {' and '.join(stage.denoise)} together, so that no step has a "
                        "density of the action alone; use mode='ode', which draws the noise it starts from"
                    )
                assert key is not None
                draws = key.fold(len(stage.denoise)).normal(num, self.action_steps, *self._shape(action)).flatten(0, 1)
                at, now = prefix, stage

                def velocity(x: Tensor, time: float, action: str = action, at: Prefix = at, now: Stage = now) -> Tensor:
                    return self._velocity(at, now, {action: x}, x.new_full((len(x),), time), task)[action]

                sampled = sde_sample(velocity, starts[action], draws, scale=self.sde_scale, event_dims=2)
                chain, times, logs = sampled.points, sampled.times, sampled.log_prob.unflatten(0, (rows, num))
            else:
                budget = self.action_steps if action is not None else self.future_steps
                samples, paths = self._denoise(prefix, stage, starts, task, budget)
                known |= samples
                if action is not None:
                    chain = paths[action]
                    times = torch.linspace(0.0, 1.0, len(chain), device=device)
        assert chain is not None
        actions = chain[-1].unflatten(0, (rows, num))[:, :, :steps]
        imagined = None
        if perturbation is not None:
            actions = actions + perturbation
        elif known_future := [n for n in known if self.coupling.segments[n].kind == "future"]:
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
        prefix = self._prefix(state["z"], state["task"]).repeat(num * count)
        task = state["task"].repeat_interleave(num * count, 0)
        time = proposal.times[:-1].to(before.device, before.dtype).repeat(rows * num)
        v = self._velocity(prefix, stage, {action: before}, time, task)[action].unflatten(0, (rows, num, count))
        logs = []
        for k in range(count):
            mean, std = sde_step(proposal.chain[:, :, k], v[:, :, k], times[k], times[k + 1], self.sde_scale)
            logs.append(gaussian_log_prob(proposal.chain[:, :, k + 1], mean, std, 2))
        return torch.stack(logs, dim=-1)

    # ---- heads ---------------------------------------------------------------------------------------------------

    def _outcome(self, before: Tensor, after: Tensor, task: Tensor) -> Tensor:
        """Mean reward and success logit [X, J, 2] of the steps between frames [X, J, L * D]."""
        tasks = self.head_task(task).unsqueeze(1).expand(-1, before.shape[1], -1)
        return self.outcome(torch.cat([before, after, tasks], dim=-1))

    def _values(self, network: nn.Module, z: Tensor, task: Tensor) -> Tensor:
        """[E, *batch] values, in units of `value_unit`."""
        x = torch.cat([z, self.head_task(task)], dim=-1)
        members = network[0].weight.shape[0]  # type: ignore[index]
        return network(x.flatten(0, -2).expand(members, -1, -1)).view(members, *x.shape[:-1])

    def value(self, state: State) -> Tensor:
        return self._values(self.values, state["z"], state["task"]).movedim(0, -1) * self.value_unit

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

        names = self.coupling.trained()
        parts = [("F", 0), *((n, c) for n in names if n != "F" for c in range(self.coupling.segments[n].copies))]
        contents: dict[Part, Tensor] = {("F", 0): present}
        times: dict[Part, Tensor] = {("F", 0): torch.ones(rows, 1, device=device)}
        targets: dict[Part, Tensor] = {}
        hidden: dict[Part, Tensor] = {}
        draws: dict[Part, Tensor] = {}
        for part in sorted(parts, key=lambda part: self.coupling.rank(part[0])):
            segment = self.coupling.segments[part[0]]
            if segment.kind == "frame":
                continue
            data = changes if segment.kind == "future" else executed if segment.target == "executed" else wanted
            if segment.same_as is not None:
                twin = (segment.same_as, part[1])
                times[part], draws[part] = times[twin], draws[twin]
            else:
                taken = None
                if segment.yields_to is not None:
                    taken = times[(segment.yields_to, 0)][:, -1:] == 1.0
                times[part], skipped = self._draw_times(part[0], rows, noise, device, taken)
                if skipped is not None:
                    hidden[part] = skipped
                draws[part] = torch.randn(data.shape, generator=noise, device=device)
                if segment.kind == "future":
                    draws[part] = draws[part] * self.moves
            wide = times[part][:, :, None, None] if segment.kind == "future" else times[part].unsqueeze(-1)
            contents[part] = interpolate(draws[part], data, wide)
            targets[part] = data - draws[part]
        found, _ = self._run(parts, contents, times, task, hidden=hidden)

        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=device)
        for name in names:
            segment = self.coupling.segments[name]
            if segment.weight <= 0 or segment.kind == "frame":
                continue
            error, count = torch.zeros((), device=device), torch.zeros((), device=device)
            for part in (p for p in parts if p[0] == name):
                square = (found[part] - targets[part]).square()
                if segment.kind == "future":
                    square = square.sum((-1, -2)) / self.moves.sum().clamp(min=1)
                    weight = arrived & (times[part][:, -1:] < 1.0)  # clean or a goal: nothing to predict
                else:
                    square = square.mean(-1)
                    weight = (imitated if segment.target == "label" else valid) & (times[part] < 1.0)
                error, count = error + (square * weight).sum(), count + weight.sum()
            losses[f"flow_{name}"] = error / count.clamp(min=1.0)
            total = total + segment.weight * losses[f"flow_{name}"]
        if self.shortcut:
            count = max(1, round(self.shortcut * rows))
            losses["shortcut"] = self._shortcut_loss(
                present[:count], wanted[:count], task[:count], imitated[:count], noise
            )
            total = total + losses["shortcut"]
        heads = self._head_losses(batch, z.flatten(2), task, arrived)
        total = total + sum(self.loss_weights[name] * value for name, value in heads.items())
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
        prefix = self._prefix(present.flatten(1), task)

        def velocity(x: Tensor, time: Tensor, stride: Tensor) -> Tensor:
            return self._velocity(prefix, stage, {action: x}, time, task, stride)[action]

        with torch.no_grad():
            first = velocity(x, time, asked)
            second = velocity(x + half[:, None, None] * first, time + half, asked)
        square = (velocity(x, time, stride) - 0.5 * (first + second)).square().mean(-1)
        return (square * imitated).sum() / imitated.sum().clamp(min=1)

    def _draw_times(
        self, name: str, rows: int, noise: torch.Generator | None, device: torch.device, taken: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Noise times [B, groups] of a segment, and [B, groups] bool where others do not see it (None: all do).

        taken: [B, 1] bool, where the segment that it yields to is clean.
        """
        segment = self.coupling.segments[name]
        groups = self.frames if segment.kind == "future" else 1
        times = sample_times(segment.times, rows, 1, generator=noise, device=device).expand(-1, groups)
        draw = torch.rand(rows, 4, 1, generator=noise, device=device)
        times = torch.where(draw[:, 3] < segment.start, 0.0, times)
        if not (segment.clean or segment.absent) and taken is None:
            return times, None
        clean, absent = draw[:, 0] < segment.clean, draw[:, 1] < segment.absent
        if taken is not None:
            clean, absent = clean & ~taken, absent | taken
        times = torch.where(clean, 1.0, times)
        hidden = absent.expand(-1, groups)
        if segment.goal:
            early = torch.arange(groups, device=device) < groups - 1
            skipped = clean & (draw[:, 2] < segment.goal) & early
            times, hidden = times.masked_fill(skipped, 0.0), hidden | skipped
        return times, hidden

    def _head_losses(self, batch: TensorDict, z: Tensor, task: Tensor, arrived: Tensor) -> dict[str, Tensor]:
        """Reward, success and value off true frames z [B, J+1, L * D]."""
        stride, frames = self.spec.frame_stride, self.frames
        reward = batch["reward"][:, : frames * stride].unflatten(1, (frames, stride))
        success = batch["success"][:, : frames * stride].unflatten(1, (frames, stride)).float()
        mask = arrived.float()
        count = mask.sum().clamp(min=1.0)
        outcome = self._outcome(z[:, :-1], z[:, 1:], task)
        reward_error = F.smooth_l1_loss(outcome[..., 0], reward.mean(-1), reduction="none")
        bce = F.binary_cross_entropy_with_logits(outcome[..., 1], success.mean(-1), reduction="none")
        tasks = task.unsqueeze(1).expand(-1, frames)
        # Expectile regression of the return over a stride and the value after it, as in the reference WAM.
        with torch.no_grad():
            ahead = self._values(self.target_values, z[:, 1:], tasks)
            fade = self.spec.discount ** torch.arange(stride, device=z.device)
            gain = ((reward + self.spec.success_bonus * success) * fade).sum(-1) / self.value_unit
            ended = batch["terminated"][:, : frames * stride].unflatten(1, (frames, stride)).any(-1)
            goal = gain + self.spec.discount**stride * ahead * (~ended).float()
        value = self._values(self.values, z[:, :-1], tasks)
        gap = goal - value
        asymmetry = torch.where(gap > 0, self.expectile, 1.0 - self.expectile)
        return {
            "reward": (reward_error * mask).sum() / count,
            "success": (bce * mask).sum() / count,
            "value": (asymmetry * gap.square() * mask).sum() / count / value.shape[0],
        }

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target values towards the online ones by `target_rate`."""
        torch._foreach_lerp_(list(self.target_values.parameters()), list(self.values.parameters()), self.target_rate)


def _index(spans: Sequence[slice]) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
