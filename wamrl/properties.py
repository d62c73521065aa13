"""Five properties of a World Action Model as checks with thresholds: a score card for any checkpoint.

Interactability, causality, persistence, physical plausibility, generalization. Positions stand in the key `state`,
where its layout says; of a model that does not decode it, as one of images, they are read off its latents (`read_out`).
What a model has no part in (a camera, for a model of states) is "not applicable", with the reason.

Letters: N windows or episodes, M sampled futures, H steps, A action dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from wamrl.evaluation import Recording, Start, imagined_frames, noise_keys
from wamrl.interfaces import WAM, Context, Imagined, Layout, Proposal, State
from wamrl.noise import NoiseKey
from wamrl.probe import LinearProbe

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """One line of the score card.

    value: None where it is not applicable. at_least: whether the threshold is a floor.
    """

    group: str
    name: str
    value: float | None
    threshold: float
    at_least: bool
    unit: str
    detail: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not applicable"
        return "pass" if (self.value >= self.threshold if self.at_least else self.value <= self.threshold) else "fail"


@dataclass(frozen=True)
class Windows:
    """Stretches of real episodes.

    first: [N] observations. actions: [N, H, A]. measured: [N, H, G] of the key `state`. noise: the keys [N] of the
    episodes and steps that they begin at; None is those of rows 0 to N - 1.
    """

    first: TensorDict
    actions: Tensor
    measured: Tensor
    noise: NoiseKey | None = None


def windows_of(recordings: Sequence[Recording], horizon: int, *, every: int = 5) -> Windows:
    """Windows of `horizon` steps, beginning at every `every`-th step of the recorded episodes.

    Raises ValueError when there are fewer than two.
    """
    first: list[TensorDict] = []
    actions: list[Tensor] = []
    measured: list[Tensor] = []
    begins: list[tuple[Start, int]] = []
    for recording in recordings:
        for start, seen in recording.observations.items():
            done = recording.actions[start]
            for t in range(0, len(done) - horizon + 1, every):
                first.append(seen[t])
                begins.append((start, t))
                actions.append(torch.stack(done[t : t + horizon]))
                measured.append(torch.stack([o["state"] for o in seen[t + 1 : t + horizon + 1]]))
    if len(first) < 2:  # one to fit an inverse model on, one to try it on
        raise ValueError(
            f"the recorded episodes have {len(first)} windows of {horizon} control steps, but the checks need at least "
            "2; use more episodes or a shorter horizon"
        )
    stacked: Any = torch.stack(first)
    noise = noise_keys(begins, stacked)
    return Windows(stacked, torch.stack(actions).clamp(-1, 1), torch.stack(measured).float(), noise)


def imagined_states(model: WAM, state: State, actions: Tensor, noise: NoiseKey | None) -> Tensor:
    """[N, M, H, G] decoded key `state` of the futures of `actions` [N, H, A], however long."""
    return imagined_frames(model, state, actions, ("state",), noise=noise)["state"].float()


@torch.no_grad()
def decoded(model: WAM, state: State) -> Tensor:
    """[N, G] decoded key `state` of the states [N], nothing imagined."""
    return model.decode(state, ("state",))["state"].float()


def encoded(model: WAM, first: TensorDict) -> State:
    """The states [N] of single frames [N]."""
    with torch.no_grad():
        return model.encode(Context.from_observation(first.select(*model.spec.observation, "task")))


class ReadOut(WAM):
    """`model` with a linear read-out of its latents, `probe`, for the decoder of `state` that it lacks."""

    def __init__(self, model: WAM, probe: LinearProbe, layout: Layout) -> None:
        super().__init__()
        self.model, self.probe = model, probe
        self.spec = replace(model.spec, layout=layout, provides=model.spec.provides | {"decode"})

    def encode(self, context: Context) -> State:
        return self.model.encode(context)

    def follow(self, state: State, noise: NoiseKey, *, share: float = 0.0) -> State:
        return self.model.follow(state, noise, share=share)

    def imagine(self, state: State, actions: Tensor | None, **options: Any) -> Imagined:
        return self.model.imagine(state, actions, **options)

    def propose(self, state: State, num: int, **options: Any) -> Proposal:
        return self.model.propose(state, num, **options)

    def decode(self, state: State | Imagined, keys: tuple[str, ...] | None = None) -> TensorDict:
        """`state` alone, off the entry "z" of a state or the frames of an `Imagined`."""
        latents = state.frames if isinstance(state, Imagined) else state["z"]
        assert latents is not None
        return TensorDict({"state": self.probe(latents)}, batch_size=latents.shape[:-1])


def tells_positions(layout: Layout) -> bool:
    """Whether the checks find hand, object and gripper in `state`."""
    return layout.has("hand", "object") and "gripper" in layout.places["state"]


def read_out(model: WAM, layout: Layout, recordings: Sequence[Recording]) -> ReadOut:
    """`model`, with `state` read off its latents by a probe fitted on every frame of the recorded episodes.

    layout: the environment's, of `state`.

    Raises ValueError for a model whose states hold no latent in the entry "z".
    """
    frames: Any = torch.stack([o for r in recordings for seen in r.observations.values() for o in seen])
    states = [encoded(model, some) for some in frames.split(256)]  # images take much memory
    if "z" not in states[0].keys():
        raise ValueError(
            f"the model does not decode 'state', and its states have {', '.join(map(str, states[0].keys()))}, but no "
            "latent 'z' to read hand and object off; give its state the entry 'z', in the space of Imagined.frames, or "
            "train it with 'state' among its keys"
        )
    latents = torch.cat([state["z"].flatten(1).float() for state in states])
    return ReadOut(model, LinearProbe(latents, frames["state"].flatten(1).float()), layout)


def position_error_cm(model: WAM, windows: Windows) -> float:
    """Mean of the larger of hand and object error of `state` decoded off encoded true frames, nothing imagined."""
    gap = 100 * (decoded(model, encoded(model, windows.first)) - windows.first["state"].float())
    hand, thing = (gap[:, model.spec.layout.place(name)].norm(dim=-1) for name in ("hand", "object"))
    return float(torch.maximum(hand, thing).mean())


# ------------------------------------------------------------------------------------------------ interactability


def interactability(model: WAM, windows: Windows, thresholds: Mapping[str, float], *, seed: int = 0) -> list[Check]:
    """Whether futures follow the actions.

    shuffle_ratio: mean distance of the hand between futures of aligned and of shuffled actions, over the spread of the
    sampled futures of the same actions. displacement_r2: how much of the imagined hand displacement a linear map of the
    commanded one (the summed xyz actions) explains; the simulator's own value stands in the detail.
    """
    state, hand = encoded(model, windows.first), model.spec.layout.place("hand")
    aligned = imagined_states(model, state, windows.actions, windows.noise)
    order = torch.randperm(len(windows.actions), generator=torch.Generator().manual_seed(seed))
    shuffled = imagined_states(model, state, windows.actions[order], windows.noise)
    apart = (aligned.mean(1) - shuffled.mean(1))[..., hand].norm(dim=-1).mean().item()
    many = aligned.shape[1] > 1
    between = (aligned - aligned.mean(1, keepdim=True))[..., hand].norm(dim=-1).mean().item() if many else 0.0
    ratio = apart / between if between > 0 else None
    commanded = windows.actions[..., :3].sum(1).double().numpy()
    imagined = (aligned.mean(1)[:, -1, hand] - decoded(model, state)[:, hand]).double().numpy()
    real = (windows.measured[:, -1, hand] - windows.first["state"].float()[:, hand]).double().numpy()
    steps = windows.actions.shape[1]
    return [
        Check("interactability", "shuffle_ratio", ratio, thresholds["shuffle_ratio"], True, "times the futures' spread",
              f"shuffled actions move the hand {100 * apart:.2f} cm away, sampled futures differ by "
              f"{100 * between:.2f} cm"
              if many else "the model samples one future, so it has no noise to compare with"),
        Check("interactability", "displacement_r2", linear_r2(commanded, imagined), thresholds["displacement_r2"], True,
              "",               f"over {steps} steps and {len(real)} windows; the simulator's own is "
              f"{linear_r2(commanded, real):.3f}"),
    ]  # fmt: skip


def linear_r2(x: Floats, y: Floats) -> float:
    """Share of the variance of y [N, D] that the least-squares affine map of x [N, C] explains."""
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    total = ((y - y.mean(0)) ** 2).sum()
    return float(1 - ((y - fitted) ** 2).sum() / total) if total > 0 else 0.0


# ------------------------------------------------------------------------------------------------ causality


def causality(model: WAM, windows: Windows, thresholds: Mapping[str, float], *, seed: int = 0) -> list[Check]:
    """Whether the past is deaf to the future: earlier outputs bit-equal, and their gradients exactly zero.

    Actions after each step k are replaced. A model that imagines a frame every S control steps shows steps between two
    of them by interpolation, so that k is the last step of a stride. No step is imagined beyond its `max_horizon`.
    """
    rows, stride = min(4, len(windows.actions)), model.spec.frame_stride
    first, actions = windows.first[:rows], windows.actions[:rows, : model.spec.max_horizon]
    noise = None if windows.noise is None else windows.noise[torch.arange(rows)]
    state = encoded(model, first)
    horizon = actions.shape[1]
    steps = range(stride - 1, horizon - 1, stride)
    generator = torch.Generator().manual_seed(seed)
    differing = 0
    with torch.no_grad():
        base = model.imagine(state, actions[:, None], noise=noise, with_frames=True)
        for k in steps:
            other = actions.clone()
            other[:, k + 1 :] = torch.rand(other[:, k + 1 :].shape, generator=generator) * 2 - 1
            changed = model.imagine(state, other[:, None], noise=noise, with_frames=True)
            for name in ("frames", "reward", "success", "alive"):
                a, b = getattr(base, name), getattr(changed, name)
                if a is not None and not torch.equal(a[:, :, :, : k + 1], b[:, :, :, : k + 1]):
                    differing += 1
    largest = 0.0
    for k in steps:
        free = actions.clone().requires_grad_()
        frames = model.imagine(state, free[:, None], noise=noise, with_frames=True).frames
        assert frames is not None
        (gradient,) = torch.autograd.grad(frames[:, :, :, : k + 1].sum(), free)
        largest = max(largest, gradient[:, k + 1 :].abs().max().item())
    asked = ", ".join(str(k + 1) for k in steps) or f"none: {horizon} steps are one frame"
    checks = [
        Check("causality", "outputs_changed", float(differing) if steps else None, thresholds["outputs_changed"], False,
              "outputs", f"that differ at or before step k when actions after it are replaced, for k = {asked}"),
        Check("causality", "future_gradient", largest if steps else None, thresholds["future_gradient"], False, "",
              "the largest gradient of frames up to step k with respect to later actions"),
    ]  # fmt: skip
    checks.append(
        Check("causality", "later_observations", None, 0.0, False, "",
              "encode is given the frames up to now only, so there is no later observation to perturb")
    )  # fmt: skip
    return checks


# ------------------------------------------------------------------------------------------------ persistence

GO_AND_RETURN = (5, 10, 15, 20)


def go_and_return(env: Any, steps: int, *, seed: int = 0, speed: float = 0.5) -> tuple[TensorDict, Tensor, Tensor]:
    """Real first frames [B], actions [B, 2 * steps, A] that go `steps` upwards and back, and the last state [B, G]."""
    rows = env.batch_size[0]
    generator = torch.Generator().manual_seed(seed)
    way = torch.randn(rows, 3, generator=generator)
    way[:, 2] = way[:, 2].abs() + 0.5  # away from the table, so that nothing is touched
    way = speed * way / way.norm(dim=1, keepdim=True)
    go = torch.cat([way, torch.zeros(rows, env.action_spec.shape[-1] - 3)], dim=1)
    actions = torch.stack([go] * steps + [-go] * steps, dim=1)
    now = env.reset(TensorDict({"start": torch.arange(rows)}, batch_size=[rows]))
    first = now.clone()
    for t in range(2 * steps):
        now["action"] = actions[:, t]
        now = env.step(now)["next"]
    return first, actions, now["state"].clone()


@torch.no_grad()
def persistence(
    model: WAM, env: Any, thresholds: Mapping[str, float], *, seed: int = 0, memory_steps: int = 200
) -> list[Check]:
    """Whether what was left is found again, and whether memory stays bounded while imagination goes on.

    go_and_return_<n>: the larger of hand and object error in centimetres after n steps out and n back, mean over rows,
    against the simulator under the same actions. memory_slope: bytes of the state per control step, fitted over
    `memory_steps` steps of one action at a time.
    """
    checks = []
    for steps in GO_AND_RETURN:
        first, actions, last = go_and_return(env, steps, seed=seed)
        begins = [(Start(task, number), 0) for number, task in enumerate(env.row_tasks)]
        end = imagined_states(model, encoded(model, first), actions, noise_keys(begins, first)).mean(1)[:, -1]
        gap = 100 * (end - last.float())
        hand, thing = model.spec.layout.place("hand"), model.spec.layout.place("object")
        error = torch.maximum(gap[:, hand].norm(dim=-1), gap[:, thing].norm(dim=-1))
        checks.append(
            Check("persistence", f"go_and_return_{steps}", float(error.mean()), thresholds["go_and_return_cm"], False,
                  "cm",                   f"{steps} steps out and back on {len(error)} starts; 90th percentile "
                  f"{float(error.quantile(0.9)):.1f} cm")
        )  # fmt: skip
    first, actions, _ = go_and_return(env, 1, seed=seed)
    state = encoded(model, first)
    sizes = []
    for _ in range(memory_steps):
        state = model.imagine(state, actions[:, None, :1]).leaf[:, 0, 0]
        sizes.append(sum(state.get(k).nbytes for k in state.keys(include_nested=True, leaves_only=True)))
    slope = float(np.polyfit(np.arange(memory_steps), np.array(sizes, dtype=np.float64), 1)[0])
    checks.append(
        Check("persistence", "memory_slope", abs(slope), thresholds["memory_slope_bytes"], False, "bytes per step",
              f"the state of {len(first)} rows holds {sizes[-1]} bytes after {memory_steps} steps, one at a time")
    )  # fmt: skip
    return checks


# ------------------------------------------------------------------------------------------------ plausibility


def plausibility(
    model: WAM, windows: Windows, thresholds: Mapping[str, float], *, margin_m: float = 0.03, near_m: float = 0.10
) -> list[Check]:
    """Whether imagined states could be, as far as decoded positions tell.

    outside_limits: share of imagined states whose hand, object or gripper leaves the box of all measured ones by more
    than `margin_m` (below the table is outside of it). moved_alone: share of steps in which the object moves more than
    half a centimetre while the hand is farther than `near_m`. inverse_error_ratio: error of a linear inverse model,
    fitted on measured transitions, on imagined ones, over its error on measured ones that it was not fitted on.
    """
    state = encoded(model, windows.first)
    futures = imagined_states(model, state, windows.actions, windows.noise).double().numpy()  # [N, M, H, G]
    real = np.concatenate([windows.first["state"][:, None], windows.measured], axis=1).astype(np.float64)
    hand, gripper, thing = (model.spec.layout.place(name) for name in ("hand", "gripper", "object"))
    parts = np.r_[hand, gripper, thing]  # the numbers of the state that move
    low, high = real[..., parts].min((0, 1)) - margin_m, real[..., parts].max((0, 1)) + margin_m
    outside = ((futures[..., parts] < low) | (futures[..., parts] > high)).any(-1)
    # Imagined paths begin where the decoder puts the first frame, so that its own error is no movement.
    begin = decoded(model, state).double().numpy()[:, None, None]  # [N, 1, 1, G]
    whole = np.concatenate([np.repeat(begin, futures.shape[1], axis=1), futures], axis=2)

    def alone(path: Floats) -> float | None:
        far = np.linalg.norm(path[..., :-1, hand] - path[..., :-1, thing], axis=-1) > near_m
        moved = np.linalg.norm(np.diff(path[..., thing], axis=-2), axis=-1) > 0.005
        return float(moved[far].mean()) if far.any() else None

    half = len(real) // 2
    action = windows.actions.double().numpy()

    def pairs(path: Floats) -> Floats:
        before, after = path[..., :-1, parts], path[..., 1:, parts]
        return np.concatenate([before, after - before], axis=-1).reshape(-1, 2 * len(parts))

    known = pairs(real[:half])
    centre, scale = known.mean(0), np.maximum(known.std(0), 1e-5)

    def design(path: Floats) -> Floats:
        z = (pairs(path) - centre) / scale
        return np.concatenate([z, np.ones((len(z), 1))], axis=1)

    fitted = design(real[:half])
    ridge = 1e-3 * len(fitted) * np.eye(fitted.shape[1])
    weights = np.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ action[:half].reshape(len(fitted), -1))

    def error(path: Floats, wanted: Floats) -> float:
        guess = design(path) @ weights
        return float(np.abs(guess[:, :3] - wanted.reshape(len(guess), -1)[:, :3]).mean())

    measured_error = error(real[half:], action[half:])
    mean_path = whole[half:].mean(1)
    imagined_error = error(mean_path, action[half:])
    constant = np.abs(action[half:] - action[:half].mean((0, 1)))[..., :3].mean()  # error of a guess that never looks
    usable = measured_error < 0.9 * constant
    share_real = alone(real)
    return [
        Check("plausibility", "outside_limits", float(outside.mean()), thresholds["outside_limits"], False, "of states",
              f"of {outside.size} imagined states outside the measured box by more than {100 * margin_m:g} cm"),
        Check("plausibility", "moved_alone", alone(whole), thresholds["moved_alone"], False, "of steps",
              f"with the hand more than {100 * near_m:g} cm away; in the simulator "
              + ("it never was" if share_real is None else f"{share_real:.3f}")),
        Check("plausibility", "inverse_error_ratio", imagined_error / measured_error if usable else None,
              thresholds["inverse_error_ratio"], False, "times",
              f"action error {imagined_error:.3f} on imagined, {measured_error:.3f} on measured transitions"
              + ("" if usable else ", no better than a constant guess: too little to learn from")),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ shifts

VISUAL = ("camera", "light", "object_colour")
SHIFTS: dict[str, str] = {
    "none": "the training distribution (held-out starts)",
    "camera": "the camera turned by 15 degrees",
    "light": "the lights at half their strength",
    "object_colour": "the colours of the task's objects exchanged",
    "start_layout": "the object moved by 5 cm away from the middle, out of the training range at its edge",
    "start_outside": "the object 2 to 5 cm outside of the training range",
    "dynamics": "the task's objects of twice the mass, friction halved",
    "action_noise": "Gaussian noise of 0.3 on every action",
}


def apply_shift(env: Any, shift: str) -> None:
    """Change a fresh Meta-World environment in place; "none" and "action_noise" change nothing here.

    Raises ValueError for an environment without the simulators that this reaches into.
    """
    if shift in ("none", "action_noise"):
        return
    if not hasattr(env, "simulators"):
        raise ValueError(f"the shift '{shift}' is declared on Meta-World, but the environment is {type(env).__name__}")
    if shift == "camera":
        camera = env.camera
        env.camera = type(camera)(**{**camera.to_dict(), "azimuth": camera.azimuth + 15.0})
        return
    for simulator in env.simulators:
        model = simulator.raw.model
        if shift == "light":
            model.light_diffuse[:] *= 0.5
            model.light_ambient[:] *= 0.5
            model.vis.headlight.diffuse[:] *= 0.5
            model.vis.headlight.ambient[:] *= 0.5
        elif shift == "object_colour":
            model.geom_rgba[simulator._geoms, :3] = model.geom_rgba[simulator._geoms, :3][:, [2, 0, 1]]
            materials = np.unique(model.geom_matid[simulator._geoms])
            materials = materials[materials >= 0]
            model.mat_rgba[materials, :3] = model.mat_rgba[materials, :3][:, [2, 0, 1]] * 0.6
        elif shift == "dynamics":
            model.body_mass[simulator._bodies] *= 2.0
            model.body_inertia[simulator._bodies] *= 2.0
            model.geom_friction[simulator._geoms] *= 0.5
        elif shift == "start_layout":
            simulator.reset = _moved(simulator.reset)
        elif shift == "start_outside":
            space = simulator.raw._random_reset_space
            simulator.reset = _outside(simulator.reset, float(space.low[0]), float(space.high[0]))


def _moved(reset: Callable[[Floats], Floats], metres: float = 0.05) -> Callable[[Floats], Floats]:
    def shifted(vector: Floats) -> Floats:
        vector = np.array(vector, dtype=np.float64)
        # The object only: Meta-World clips the goal that a policy sees to its own range. Away from the goal: where the
        # two are too near each other, Meta-World draws again, for ever since what it draws is this vector.
        goal = vector[3] if len(vector) >= 6 else 0.0
        vector[0] += metres * (1 if vector[0] >= goal else -1)
        return reset(vector)

    return shifted


def _outside(reset: Callable[[Floats], Floats], low: float, high: float) -> Callable[[Floats], Floats]:
    def shifted(vector: Floats) -> Floats:
        vector = np.array(vector, dtype=np.float64)
        goal = vector[3] if len(vector) >= 6 else 0.5 * (low + high)
        # Where it was within the range says how far out it goes, so that no two starts are alike.
        depth = 0.02 + 0.03 * (vector[0] - low) / max(high - low, 1e-9)
        vector[0] = high + depth if vector[0] >= goal else low - depth  # away from the goal, as in `_moved`
        return reset(vector)

    return shifted
