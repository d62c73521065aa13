"""A World Action Model as an environment: episodes that begin at real frames and go on in imagination.

A row follows one of the model's sampled futures (for an ensemble: one of its members, the same for the whole episode),
so that its transitions fit together; the spread over all futures is the uncertainty, and `uncertainty=False` does
without it and imagines the row's own future only, which is several times cheaper. The observation is decoded from
the imagined state by the model, so that policies which know nothing of latents can act on it; the first one of
an episode is the real frame itself.

`wamrl.envs.vector.RowsVectorEnv` gives it to Gymnasium and `wamrl.envs.sb3.RowsSB3Env` to Stable-Baselines3;
`gymnasium.make_vec("wamrl.imagined:wamrl/Imagined-v0", wam=..., data=...)` builds all of it from files.

A model that imagines a frame every S control steps only (`Spec.frame_stride`) can be stepped in two ways. A `chunk`
that is a multiple of S goes from frame to frame. A shorter one, which divides S, stays at the frame where the stride
began until the stride is over: each step imagines all of the stride anew, under the same noise, from the actions taken
so far, the last of them held in place of those to come, and shows how far that has got by now. The stride's last step,
for which every action is known, shows exactly what their chunk would have.

Letters: B rows, R chosen rows, F frames, M futures, K control steps of one action (`chunk`), S control steps of the
model's stride, A action dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded

from wamrl.envs.base import RowsEnv, Shown
from wamrl.interfaces import WAM, Context, State, task_id
from wamrl.naming import unknown_name, whole_number
from wamrl.noise import NoiseKey

_BLOCK = 256  # rows per call of the model on a CPU, whose caches hold no more (measured with the reference WAM)


class ImaginedEnv(RowsEnv):
    """B imagined episodes side by side, advanced in batches by the model.

    Keys of a row, beside those of `RowsEnv`: the observation keys that the model decodes; `success_probability`
    float32 [1] of the success head, of which `success` says whether it reached `success_threshold`; `uncertainty`
    float32 [1] where the model has one; both are the greatest of a chunk. The reward is the sum over the chunk.

    A row is truncated after `max_steps` control steps, when its uncertainty exceeds `uncertainty_limit`, or when the
    model gives NaN or infinity (`simulator_error`). It terminates where the model has an `alive` head that falls
    below one half (rewards after that count as 0), and with `stop_on_success` at success.

    The same start gives the same episode, whatever the number of rows (up to rounding in the model): what is random
    in it is keyed by its task, its start, the round in which the env drew it (`start_round`) and the env's seed.

    Args:
        model: answers `rollout`, `reward`, `success` and `decode`.
        frames: [F] real observations to start from: the model's keys and `task` (`wamrl.data.start_frames`).
        num_envs: rows B.
        tasks: those to start from; None is all that the frames hold. Start number i of a task is its i-th frame.
        chunk: control steps K of one action. 1: actions are [B, A]; above it they are [B, K, A]. It has to divide the
            model's stride S, or to be a multiple of it.
        max_steps: control steps of an episode; None is the model's `max_horizon`, for which it is meant.
        uncertainty: whether rows carry it, in a model that has one. False asks the model for one future per row
            (`WAM.follow`), not for all of them.
        uncertainty_limit: None never truncates; needs a model with `uncertainty`, in whose units it is.
        success_threshold: of the probability.
        stop_on_success: whether success terminates; the simulators of this library go on.
        keys: observation keys to decode; None is all of the model's.
        snapshots: whether rows carry `snapshot` [S], from which `reset` restores them exactly.
        seed: of the order of the starts and of what is random in the model.
        device: where the model is and observations are put.

    Raises:
        ValueError: a model that lacks a query, wants more history than one frame, or imagines in strides that `chunk`
            does not fit; frames that do not fit it; settings out of range.
    """

    _share = 0.0  # how far episodes turn on the draw of their future, see `WAM.follow`

    def __init__(
        self,
        model: WAM,
        frames: TensorDict,
        num_envs: int = 1,
        *,
        tasks: str | Sequence[str] | None = None,
        chunk: int = 1,
        max_steps: int | None = None,
        uncertainty: bool = True,
        uncertainty_limit: float | None = None,
        success_threshold: float = 0.5,
        stop_on_success: bool = False,
        keys: Sequence[str] | None = None,
        snapshots: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        spec = model.spec
        spec.require("rollout", "reward", "success", "decode", *(() if uncertainty_limit is None else ("uncertainty",)))
        whole_number("chunk", chunk, 1)
        self.max_steps = whole_number("max_steps", spec.max_horizon if max_steps is None else max_steps, 1)
        if spec.history != 1:
            raise ValueError(
                f"the model wants {spec.history} frames of history, but start frames are single; use a model with "
                "spec.history=1"
            )
        if spec.action_kind != "continuous":
            raise ValueError(f"the model's actions are {spec.action_kind}, but ImaginedEnv takes continuous ones only")
        stride = spec.frame_stride
        if chunk % stride and stride % chunk:
            raise ValueError(
                f"the model imagines a frame every {stride} control steps, which chunk={chunk} neither divides nor "
                f"fills; use chunk={stride} or a multiple, whose actions are taken together, or chunk=1 to step singly"
            )
        if chunk > spec.max_horizon:
            raise ValueError(f"chunk is {chunk}, but the model is meant for at most {spec.max_horizon} control steps")
        if uncertainty_limit is not None and not uncertainty_limit > 0:
            raise ValueError(f"uncertainty_limit is {uncertainty_limit}, but must be above 0, or null")
        if not 0.0 < success_threshold <= 1.0:
            raise ValueError(f"success_threshold is {success_threshold}, but a probability lies in (0, 1]")
        self.keys = tuple(spec.observation) if keys is None else tuple(keys)
        for key in self.keys:
            if key not in spec.observation:
                raise unknown_name("observation key of the model", key, spec.observation)
        names = _frame_tasks(frames, model)
        tasks = names if tasks is None else ((tasks,) if isinstance(tasks, str) else tuple(tasks))
        for task in tasks:
            if task not in names:
                raise unknown_name("task among the start frames", task, names)
        super().__init__(tasks, num_envs, device=device, seed=seed)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != self.device.type:
            raise ValueError(
                f"the model is on {parameter.device}, but the env on {self.device}; load the model with "
                f"device='{self.device}' or make the env with device='{parameter.device}'"
            )
        if uncertainty_limit is not None and not uncertainty:
            raise ValueError(f"uncertainty_limit is {uncertainty_limit}, but uncertainty=false asks for none; drop one")
        self.model, self.chunk, self.layout = model, chunk, spec.layout
        self._uncertainty = uncertainty
        # Rows per call: with one future per row, each network of an ensemble sees a share of them only.
        self._block = _BLOCK * (1 if uncertainty else spec.ensemble_size)
        # Actions [B, S, A] of the stride that a row is in, those to come held; None where a chunk fills strides.
        self._known = torch.zeros(num_envs, stride, spec.action_dim, device=self.device) if chunk < stride else None
        self.uncertainty_limit, self.success_threshold = uncertainty_limit, success_threshold
        self.stop_on_success = stop_on_success
        self.control_dt_s, self.action_repeat = spec.control_dt_s, 1
        self._frames = frames.select(*spec.observation, "task").to(self.device)
        self._frames_of = {task: (frames["task"] == task_id(task)).nonzero()[:, 0].cpu() for task in tasks}
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._identity = torch.zeros_like(self._steps)  # of the episode, for the model's noise
        self._future = torch.zeros(num_envs, device=self.device)  # which of M futures: floor(M * this)
        with torch.no_grad():
            first = self._frames[self._frames_of[tasks[0]][:1]]
            self._state: State = self._encode(first, torch.zeros(1, dtype=torch.int64)).repeat(num_envs)
        self._snapshots = snapshots
        if snapshots:
            self.snapshot_size = self._pack(torch.arange(1), first.select(*self.keys)).shape[1]
        shapes: dict[str, Any] = {key: tuple(spec.observation[key]) for key in self.keys}
        for key, shape in shapes.items():
            if frames[key].dtype == torch.uint8:
                shapes[key] = Bounded(0, 255, shape=(num_envs, *shape), dtype=torch.uint8, device=self.device)
        shapes["success_probability"] = Bounded(0.0, 1.0, shape=(num_envs, 1), device=self.device)
        if self._carries_uncertainty():
            shapes["uncertainty"] = (1,)
        self._declare(shapes, (spec.action_dim,) if chunk == 1 else (chunk, spec.action_dim))

    @property
    def config(self) -> dict[str, Any]:
        """What, beside model and frames, makes an equal environment: `ImaginedEnv(model, frames, **config)`."""
        return {
            "num_envs": self.batch_size[0],
            "tasks": list(self.tasks),
            "chunk": self.chunk,
            "max_steps": self.max_steps,
            "uncertainty": self._uncertainty,
            "uncertainty_limit": self.uncertainty_limit,
            "success_threshold": self.success_threshold,
            "stop_on_success": self.stop_on_success,
            "keys": list(self.keys),
            "snapshots": self._snapshots,
        }

    def _start_count(self, task: str) -> int:
        return len(self._frames_of[task])

    @torch.no_grad()
    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        if snapshot is not None:
            shown = self._unpack(rows, snapshot)
        else:
            assert start is not None
            pairs = zip(rows.tolist(), start.tolist(), strict=True)
            at = [self._frame(self.row_tasks[row], number) for row, number in pairs]
            frame = self._frames[torch.tensor(at, device=self.device)]
            rows = rows.to(self.device)
            mixed = self.start_round.to(self.device)[rows] * 0x9E3779B97F4A7 + start.to(self.device) * 0x9E3779B1
            self._identity[rows] = (self._task_ids[rows] + mixed) % (1 << 62)
            self._steps[rows] = 0
            if self._known is not None:
                self._known[rows] = 0.0
            self._future[rows] = (self._draw(rows).uniform(1)[:, 0] + self._share) % 1.0
            self._put(rows, self._encode(frame, rows))
            shown = frame.select(*self.keys)
        zero = torch.zeros(rows.numel(), 1, device=self.device)
        shown.set("success_probability", zero)
        if self._carries_uncertainty():
            shown.set("uncertainty", zero.clone())
        if self._snapshots:
            shown.set("snapshot", self._pack(rows, shown.select(*self.keys)))
        return dict(shown.items())

    def _draw(self, rows: Tensor) -> NoiseKey:
        """The key by which episodes choose their future."""
        identity = self._identity[rows.to(self.device)]
        return NoiseKey(row=identity, step=torch.zeros_like(identity), seed=self._seed).fold(0)

    def _encode(self, frame: TensorDict, rows: Tensor) -> State:
        """State [R] of frames [R]; without uncertainty, each row follows the one future that it will show."""
        state = self.model.encode(Context.from_observation(frame))
        return state if self._uncertainty else self.model.follow(state, self._draw(rows), share=self._share)

    def _carries_uncertainty(self) -> bool:
        return self._uncertainty and "uncertainty" in self.model.spec.provides

    def _frame(self, task: str, number: int) -> int:
        frames = self._frames_of[task]
        if number >= len(frames):
            raise ValueError(f"`start` asks for frame {number} of '{task}', but there are {len(frames)}, from 0")
        return int(frames[number])

    @torch.no_grad()
    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        count, everyone = rows.numel(), rows.numel() == self.batch_size[0]
        rows = rows.to(self.device)
        state = self._state if everyone else self._state[rows]
        action = self._filled(rows, action.reshape(count, 1, self.chunk, -1))
        if self.device.type == "cpu" and count > self._block:
            parts = [slice(i, i + self._block) for i in range(0, count, self._block)]
            found = [self._imagine(rows[part], state[part], action[part]) for part in parts]
            leaf = cast(TensorDict, torch.cat([one for one, _ in found]))
            after = cast(TensorDict, torch.cat([one for _, one in found]))
        else:
            leaf, after = self._imagine(rows, state, action)
        finite = ~after["simulator_error"]
        if not bool(finite.all()):
            assert self._rows is not None
            for key in self.keys:
                fits = finite.view(-1, *[1] * (after[key].dim() - 1))
                after[key] = torch.where(fits, after[key], self._rows[key][rows])
            leaf = cast(TensorDict, torch.where(finite[:, 0], leaf, state))
            for key in ("reward", "success_probability", "uncertainty"):
                if key in after.keys():
                    after[key] = after[key].masked_fill(~finite, 0.0)
        self._put(rows, leaf)
        self._steps[rows] += self.chunk
        over = after["terminated"] & finite
        success = (after["success_probability"] >= self.success_threshold) & finite
        truncated = (self._steps[rows] >= self.max_steps)[:, None] | ~finite
        if self.uncertainty_limit is not None:
            truncated = truncated | (after["uncertainty"] > self.uncertainty_limit)
        after.set("success", success)
        after.set("terminated", over | success if self.stop_on_success else over)
        after.set("truncated", truncated)
        if self._snapshots:
            after.set("snapshot", self._pack(rows, after.select(*self.keys)))
        return dict(after.items())

    def _within(self, rows: Tensor) -> Tensor:
        """[R] how many control steps ago the stride began that `rows` are in."""
        return self._steps[rows] % (1 if self._known is None else self._known.shape[1])

    def _filled(self, rows: Tensor, action: Tensor) -> Tensor:
        """`action` [R, 1, K, A] with those taken before it in this stride, and its last held to the stride's end."""
        if self._known is None:
            return action
        begun, place = self._within(rows)[:, None], torch.arange(self._known.shape[1], device=self.device)
        index = (place - begun).clamp(0, self.chunk - 1).unsqueeze(-1).expand(-1, -1, action.shape[-1])
        later = action[:, 0].gather(1, index)
        self._known[rows] = torch.where((place < begun).unsqueeze(-1), self._known[rows], later)
        return self._known[rows].unsqueeze(1)

    def _imagine(self, rows: Tensor, state: State, action: Tensor) -> tuple[State, TensorDict]:
        """What `rows` go on from and show after `action` [R, 1, K or S, A] was imagined from `state` [R]."""
        begun, part = self._within(rows), self._known is not None
        noise = NoiseKey(row=self._identity[rows], step=self._steps[rows] - begun, seed=self._seed)
        imagined = self.model.imagine(
            state, action, futures=None if self._uncertainty else 1, noise=noise, with_frames=part
        )
        assert imagined.reward is not None and imagined.success is not None
        futures = imagined.leaf.batch_size[2]
        index = torch.arange(len(rows), device=self.device)
        mine = (self._future[rows] * futures).long().clamp(max=futures - 1)
        leaf = imagined.leaf[:, 0][index, mine]
        at = begun[:, None] + torch.arange(self.chunk, device=self.device)  # [R, K] of the imagined steps

        def own(head: Tensor) -> Tensor:
            """[R, K] of a head [R, 1, M, H], in the row's own future."""
            return head[index, 0, mine].gather(1, at)

        if part:
            assert imagined.frames is not None
            frame = imagined.frames[index, 0, mine, at[:, -1]]
            seen = replace(imagined, frames=frame[:, None, None, None])
            shown = self.model.decode(seen, self.keys).select(*self.keys)[:, 0, 0, 0]
            leaf = cast(TensorDict, torch.where(begun + self.chunk == action.shape[2], leaf, state))
        else:
            shown = self.model.decode(leaf, self.keys).select(*self.keys)
        reward = own(imagined.reward)
        over = torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device)
        if imagined.alive is not None:
            alive = own(imagined.alive) >= 0.5
            reward, over = reward * alive, ~alive.all(1, keepdim=True)
        shown.set("reward", reward.sum(1, keepdim=True))
        shown.set("success_probability", own(imagined.success).amax(1, keepdim=True))
        if self._carries_uncertainty():
            assert imagined.uncertainty is not None
            shown.set("uncertainty", own(imagined.uncertainty).amax(1, keepdim=True))
        finite = torch.ones_like(over)
        for value in shown.values():
            if value.is_floating_point():
                finite = finite & value.flatten(1).isfinite().all(1, keepdim=True)
        shown.set("simulator_error", ~finite)
        shown.set("terminated", over)
        return leaf, shown

    def _put(self, rows: Tensor, state: State) -> None:
        if rows.numel() == self.batch_size[0]:
            self._state = state
        else:
            self._state = self._state.clone()
            self._state[rows.to(self.device)] = state

    # -- snapshots: everything as float64, which holds float32 and 32-bit halves of integers exactly

    def _pack(self, rows: Tensor, shown: TensorDict) -> Tensor:
        rows = rows.to(self.device)
        parts = [self._steps[rows], self._identity[rows], self._future[rows]]
        parts += [] if self._known is None else [self._known[rows]]
        parts += [self._state[rows].get(key) for key in self._leaves()] + [shown[key] for key in self.keys]
        return torch.cat([_to_double(part) for part in parts], dim=1)

    def _unpack(self, rows: Tensor, snapshot: Tensor) -> TensorDict:
        rows, at = rows.to(self.device), 0

        def take(like: Tensor) -> Tensor:
            nonlocal at
            size = like[:1].numel() * (2 if like.dtype == torch.int64 else 1)
            at += size
            return _from_double(snapshot[:, at - size : at].to(self.device), like)

        self._steps[rows], self._identity[rows] = take(self._steps), take(self._identity)
        self._future[rows] = take(self._future)
        if self._known is not None:
            self._known[rows] = take(self._known)
        state = self._state[rows].clone()
        for key in self._leaves():
            state.set(key, take(self._state.get(key)))
        self._put(rows, state)
        shown = {key: take(self._frames[key]) for key in self.keys}
        return TensorDict(shown, batch_size=[rows.numel()], device=self.device)

    def _leaves(self) -> list[Any]:
        return sorted(self._state.keys(include_nested=True, leaves_only=True), key=str)


def _to_double(x: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], -1)
    if x.dtype == torch.int64:
        return torch.cat([flat >> 32, flat & 0xFFFFFFFF], dim=1).double()
    return flat.double()


def _from_double(x: Tensor, like: Tensor) -> Tensor:
    if like.dtype == torch.int64:
        high, low = x.long().chunk(2, dim=1)
        x = (high << 32) | low
    return x.to(like.dtype).reshape(x.shape[0], *like.shape[1:])


def _frame_tasks(frames: TensorDict, model: WAM) -> tuple[str, ...]:
    """The tasks that the frames hold, in the model's order; ValueError when the frames do not fit the model."""
    spec = model.spec
    if frames.batch_dims != 1 or frames.batch_size[0] == 0:
        raise ValueError(f"frames have batch {list(frames.batch_size)}, but must be [F] with at least one frame")
    for key, shape in {**spec.observation, "task": ()}.items():
        if key not in frames.keys():
            raise ValueError(f"the start frames lack '{key}'; they have {', '.join(sorted(map(str, frames.keys())))}")
        if tuple(frames[key].shape[1:]) != tuple(shape):
            raise ValueError(
                f"the start frames have '{key}' of shape {tuple(frames[key].shape[1:])}, but the model reads "
                f"{tuple(shape)}; do they come from another environment?"
            )
        if frames[key].is_floating_point() and not bool(frames[key].isfinite().all()):
            raise ValueError(f"the start frames hold NaN or infinity in '{key}'; leave those frames out")
    numbers = set(frames["task"].tolist())
    known = {task_id(name): name for name in spec.tasks}
    strange = numbers - set(known)
    if strange:
        raise unknown_name(
            "task id among the start frames", str(min(strange)), spec.tasks, hint="The model knows these."
        )
    return tuple(name for number, name in known.items() if number in numbers)
