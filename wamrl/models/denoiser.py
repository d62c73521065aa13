"""The network of a flow-matching World Action Model: tokens of frames, futures and actions under a coupling's masks.

It knows no observations, rewards or plans: given clean and noisy segments of a sequence and their noise times, it gives
velocities, samples segments from noise, and draws the noisy sequences that it is trained on. What is clean and sees
nothing that is being denoised is encoded once, as a `Prefix`.

Letters: B windows, R rows, X rows of a batch, H actions of a chunk, A action dims, J frames of a chunk, L tokens per
frame, D numbers per token, K denoising steps, S tokens, P cached tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wamrl.models.coupling import Coupling, Stage
from wamrl.models.dit import Cache, DiT, Stream
from wamrl.models.flow import interpolate, ode_sample, sample_times
from wamrl.models.mot import MixtureOfTransformers
from wamrl.naming import unknown_name
from wamrl.noise import NoiseKey

BACKBONES: dict[str, type[DiT]] = {"dit": DiT, "mot": MixtureOfTransformers}

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

    parts: the segments, in the order of the cache. frame: [X, L, D], the present one. hidden: [X, P] bool, True for
    tokens that no later one may see, or None.
    """

    parts: tuple[str, ...]
    cache: Cache
    frame: Tensor
    hidden: Tensor | None = None

    def repeat(self, times: int) -> Prefix:
        """Every row `times` times in a row."""
        if times == 1:
            return self
        cache = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.cache]
        hidden = None if self.hidden is None else self.hidden.repeat_interleave(times, 0)
        return Prefix(self.parts, cache, self.frame.repeat_interleave(times, 0), hidden)


class Denoiser(nn.Module):
    """A backbone under a coupling, with embeddings of its tokens.

    coupling: its masks, times and segments. backbone: `name` ("dit" or "mot") and its sizes. frame: (L, D). frames: J.
    frame_stride: control steps between frames. action: (H, A). tasks: how many. shortcut: whether the backbone is told
    how far in time a velocity is to lead. beside_present: whether a future's token is also told what the present frame
    shows at its place. Raises ValueError for an unknown backbone, or sizes that it does not take.

    Contents of a segment are a frame [X, L, D], a future [X, J, L, D] or a chunk [X, H, A]; its noise times [X, G] have
    J groups for a future and one otherwise. `moves` [L, D] bool says which numbers of a future frame are generated.
    """

    moves: Tensor

    def __init__(
        self,
        coupling: Coupling,
        backbone: Mapping[str, Any],
        *,
        frame: tuple[int, int],
        frames: int,
        frame_stride: int,
        action: tuple[int, int],
        tasks: int,
        shortcut: bool,
        beside_present: bool = False,
    ) -> None:
        super().__init__()
        settings = dict(backbone)
        name = str(settings.pop("name", ""))
        if name not in BACKBONES:
            raise unknown_name("backbone", name, BACKBONES)
        known = set(inspect.signature(BACKBONES[name]).parameters) - {"shortcut"}
        for key in settings:
            if key not in known:
                raise unknown_name(f"setting of the backbone '{name}'", str(key), known)
        self.coupling, self.shortcut = coupling, shortcut
        self.frame, self.frames, self.action = frame, frames, action
        self.backbone = BACKBONES[name](**settings, shortcut=shortcut)
        (length, size), (horizon, action_dim) = frame, action
        self.register_buffer("moves", torch.ones(length, size, dtype=torch.bool))
        wide, narrow = self.backbone.width("future"), self.backbone.width("action")
        self.task_token = nn.Embedding(tasks, wide)
        self.embed_frame, self.embed_future = nn.Linear(size, wide), nn.Linear(size, wide)
        self.embed_present = nn.Linear(size, wide) if beside_present else None
        self.embed_action = nn.Linear(action_dim, narrow)
        self.place = nn.Parameter(0.02 * torch.randn(length, wide))
        self.frame_time = nn.Parameter(0.02 * torch.randn(frames, wide))
        self.action_time = nn.Parameter(0.02 * torch.randn(horizon, narrow))
        self.to_future, self.to_action = nn.Linear(wide, size), nn.Linear(narrow, action_dim)
        for layer in (self.to_future, self.to_action):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        step = torch.arange(1, frames + 1).repeat_interleave(length)
        self.tokens = {
            "frame": (torch.zeros(length + 1), torch.zeros(length + 1, dtype=torch.int64)),
            "future": (step * float(frame_stride), step - 1),
            "action": (torch.arange(horizon) + 0.5, torch.zeros(horizon, dtype=torch.int64)),
        }
        self._sequences: dict[tuple[tuple[Part, ...], tuple[Part, ...], torch.device], Tokens] = {}

    def kind(self, name: str) -> str:
        """What a segment's tokens stand for."""
        return self.coupling.segments[name].kind

    def groups(self, name: str) -> int:
        """How many noise times a segment has."""
        return self.frames if self.kind(name) == "future" else 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a segment's content, without its rows."""
        return self.action if self.kind(name) == "action" else (self.frames, *self.frame)

    # ---- velocities ----------------------------------------------------------------------------------------------

    def run(
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

        times: [X, groups of the part]. task: [X] numbers of tasks. hidden: [X, groups of the part] bool, tokens that
        only their own group sees. stride: [X] of all parts, see `Stream`.
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
        present = contents[("F", 0)] if prefix is None else prefix.frame
        streams = {
            expert: Stream(
                torch.cat([self._embed(self.kind(part[0]), contents[part], task, present) for part in own], dim=1),
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
                if self.kind(part[0]) == "action":
                    velocities[part] = self.to_action(own)
                elif self.kind(part[0]) == "future":
                    velocities[part] = self.to_future(own).unflatten(1, (self.frames, -1)) * self.moves
        return velocities, cache

    def _embed(self, kind: str, content: Tensor, task: Tensor, present: Tensor) -> Tensor:
        """Tokens [X, S, W] of a frame [X, L, D], future [X, J, L, D] or chunk [X, H, A]."""
        if kind == "action":
            return self.embed_action(content) + self.action_time
        if kind == "future":
            place = self.place if self.embed_present is None else self.place + self.embed_present(present).unsqueeze(1)
            return (self.embed_future(content) + place + self.frame_time.unsqueeze(1)).flatten(1, 2)
        return torch.cat([self.embed_frame(content) + self.place, self.task_token(task).unsqueeze(1)], dim=1)

    def _sequence(self, before: tuple[Part, ...], parts: tuple[Part, ...], device: torch.device) -> Tokens:
        """The tokens of `parts` behind a cached prefix of `before`; made once."""
        key = (before, parts, device)
        if key in self._sequences:
            return self._sequences[key]
        expert_of = {part: self.backbone.expert_of[self.kind(part[0])] for part in (*before, *parts)}
        whole = self.coupling.layout((*before, *parts), self.tokens, self.backbone.expert_of)
        ordered = tuple(part for part in whole.parts if part in parts)
        spans = [whole.spans[part] for part in ordered]
        rows, columns = _index(spans), _index([whole.spans[part] for part in (*before, *ordered)])
        experts = []
        for expert in sorted({expert_of[part] for part in ordered}):
            own = tuple(part for part in ordered if expert_of[part] == expert)
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

    # ---- sampling ------------------------------------------------------------------------------------------------

    def prefix(self, frame: Tensor, task: Tensor) -> Prefix:
        """The present frame [X, L, D], encoded once."""
        part = ("F", 0)
        _, cache = self.run([part], {part: frame}, {part: torch.ones_like(frame[:, :1, 0])}, task)
        return Prefix(("F",), cache, frame)

    def extend(self, prefix: Prefix, name: str, content: Tensor, task: Tensor, hidden: Tensor | None = None) -> Prefix:
        """`prefix` and the clean segment `name`. hidden: [X, groups] bool, of which nobody sees anything."""
        part = (name, 0)
        times = torch.ones(len(task), self.groups(name), device=task.device)
        flags = {} if hidden is None else {part: hidden}
        if hidden is not None:
            times = times.masked_fill(hidden, 0.0)
        _, new = self.run([part], {part: content}, {part: times}, task, hidden=flags, prefix=prefix)
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
                late_hidden = hidden.repeat_interleave(new[0][0].shape[2] // self.groups(name), 1)
            behind = torch.cat([behind, late_hidden], dim=1)
        return Prefix((*prefix.parts, name), cache, prefix.frame, behind)

    def velocity(
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
        times = {part: time.unsqueeze(1).expand(-1, self.groups(part[0])) for part in parts}
        found, _ = self.run(
            parts, {(name, 0): x for name, x in shown.items()}, times, task, prefix=prefix, stride=stride
        )
        return {name: found[(name, 0)] for name in contents}

    def start(self, name: str, noise: NoiseKey | None, rows: int, *shared: int, device: torch.device) -> Tensor:
        """Noise [rows, *shared, ...] that the sampler of a segment starts from; without a key its mean, zero."""
        shape = self.shape(name)
        if noise is None:
            return torch.zeros(rows, *shared, *shape, device=device)
        x = noise.normal(*shared, *shape)
        return x * self.moves if self.kind(name) == "future" else x

    def sample(
        self,
        prefix: Prefix,
        stage: Stage,
        starts: Mapping[str, Tensor],
        task: Tensor,
        steps: int,
        *,
        leap: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Samples of the segments of `stage` by the ODE, in lock step, and their paths.

        leap: whether this stage was taught shortcuts, so that it is told how long its steps are.
        """
        names = list(starts)
        shapes = [starts[name].shape[1:] for name in names]
        sizes = [math.prod(shape) for shape in shapes]

        def unpack(x: Tensor) -> dict[str, Tensor]:
            parts = x.split(sizes, dim=1)
            return {n: part.unflatten(1, shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

        def velocity(x: Tensor, time: float) -> Tensor:
            stride = x.new_full((len(x),), 1.0 / steps) if leap and self.shortcut else None
            found = self.velocity(prefix, stage, unpack(x), x.new_full((len(x),), time), task, stride)
            return torch.cat([found[name].flatten(1) for name in names], dim=1)

        path = ode_sample(velocity, torch.cat([starts[name].flatten(1) for name in names], dim=1), steps)
        points = [unpack(x) for x in path]
        return points[-1], {name: [point[name] for point in points] for name in names}

    # ---- training ------------------------------------------------------------------------------------------------

    def errors(
        self,
        present: Tensor,
        data: Mapping[str, Tensor],
        task: Tensor,
        noise: torch.Generator | None,
        share: Tensor | None = None,
    ) -> dict[Part, tuple[Tensor, Tensor, Tensor]]:
        """Squared velocity errors of a noisy sequence of all trained segments, drawn by the coupling.

        present: [B, L, D]. data: segment -> its clean content. Returns, of each part that has a loss, the errors [B, J]
        of a future's frames or [B, H] of a chunk's actions, the noise times [B, groups] at which they were made, and
        the clean content that the velocities lead to. share: [L, D] of each number in a frame's error, summing to one;
        None: all that move count the same.
        """
        rows, device = len(present), present.device
        parts = [("F", 0), *((name, c) for name in data for c in range(self.coupling.segments[name].copies))]
        contents: dict[Part, Tensor] = {("F", 0): present}
        times: dict[Part, Tensor] = {("F", 0): torch.ones(rows, 1, device=device)}
        targets: dict[Part, Tensor] = {}
        hidden: dict[Part, Tensor] = {}
        draws: dict[Part, Tensor] = {}
        for part in sorted(parts[1:], key=lambda part: self.coupling.rank(part[0])):
            segment, clean = self.coupling.segments[part[0]], data[part[0]]
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
                draws[part] = torch.randn(clean.shape, generator=noise, device=device)
                if segment.kind == "future":
                    draws[part] = draws[part] * self.moves
            wide = times[part][:, :, None, None] if segment.kind == "future" else times[part].unsqueeze(-1)
            contents[part] = interpolate(draws[part], clean, wide)
            targets[part] = clean - draws[part]
        found, _ = self.run(parts, contents, times, task, hidden=hidden)
        errors = {}
        for part in parts[1:]:
            if self.coupling.segments[part[0]].weight > 0:
                wrong = found[part] - targets[part]
                wide = times[part][:, :, None, None] if self.kind(part[0]) == "future" else times[part].unsqueeze(-1)
                estimate = data[part[0]] + (1.0 - wide) * wrong  # x + (1 - t) v, and x + (1 - t) (data - noise) is data
                if self.kind(part[0]) == "future":
                    square = wrong.square()
                    square = (
                        square.sum((-1, -2)) / self.moves.sum().clamp(min=1)
                        if share is None
                        else (square * share).sum((-1, -2))
                    )
                else:
                    square = wrong.square().mean(-1)
                errors[part] = (square, times[part], estimate)
        return errors

    def _draw_times(
        self, name: str, rows: int, noise: torch.Generator | None, device: torch.device, taken: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Noise times [B, groups] of a segment, and [B, groups] bool where others do not see it (None: all do).

        taken: [B, 1] bool, where the segment that it yields to is clean.
        """
        segment, groups = self.coupling.segments[name], self.groups(name)
        times = sample_times(rows, 1, generator=noise, device=device).expand(-1, groups)
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


def _index(spans: Sequence[slice]) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
