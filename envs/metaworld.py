"""Meta-World's Sawyer arm tasks as one batched TorchRL environment, with exact save and restore.

Each row of the batch is one MuJoCo simulator in this process, created straight from the Meta-World class; row b runs
`tasks[b % len(tasks)]`. A control step repeats the simulator's 80 Hz step `action_repeat` times. The goal is visible
in the last three numbers of `state`.

Start states come in three splits, train, dev and test, that never come closer to each other than a stated distance
(`start_states`). A start state is Meta-World's own random vector of a reset (object and goal positions).

Letters: B rows (environments), S numbers of one snapshot, C contact flags, V numbers of a reset vector.
Shape of everything: `state` [39] = hand xyz, gripper opening, 14 object numbers; the same 18 one simulator step
earlier; goal xyz. Lengths in metres.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from wamrl.envs.base import RowsEnv, Shown, check_split, in_split, split_distance
from wamrl.envs.layouts import METAWORLD, METAWORLD_STATE
from wamrl.envs.rendering import Camera, SceneRenderer, mujoco
from wamrl.interfaces import PolicyState, task_id
from wamrl.naming import unknown_name, whole_number

PREFIX = "metaworld/"
SIX_TASKS = tuple(
    PREFIX + name
    for name in ("reach-v3", "push-v3", "pick-place-v3", "drawer-open-v3", "door-open-v3", "button-press-topdown-v3")
)
SIMULATOR_DT_S = 0.0125
MAX_SIMULATOR_STEPS = 500
"""The longest episode that Meta-World itself allows, its `max_path_length`."""
STATE_DIM, ACTION_DIM = METAWORLD_STATE, 4
CONTACT_NAMES = ("left_pad_object", "right_pad_object", "hand_object", "hand_table")
"""What the four flags of the key `contact` say: which part of the hand touches what. "object" is any body that is not
the robot and not the table; "hand" is everything below the wrist."""

_INSTALL = 'Meta-World is not installed; run: pip install "wamrl[metaworld]"'
_DRAWS = 200  # start states that a reset without `start` chooses among


def task_names() -> tuple[str, ...]:
    """The 50 task names, such as "metaworld/push-v3"."""
    return tuple(PREFIX + name for name in sorted(_environment_classes()))


def check_task(task: str) -> str:
    """`task` itself if it is a known name.

    Raises:
        UnknownNameError: with the nearest names, if it is not.
    """
    known = task_names()
    if task not in known:
        raise unknown_name("Meta-World task", task, known, hint="Names look like 'metaworld/push-v3'.")
    return task


@functools.cache
def _environment_classes() -> dict[str, Any]:
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_INSTALL) from error
    return dict(ALL_V3_ENVIRONMENTS)


@functools.lru_cache(maxsize=8)
def _compiled_class(task: str) -> Any:
    """Meta-World's class of a task, except that the model is compiled from XML once and copied afterwards.

    Compiling takes 0.2 s, copying some milliseconds.
    """
    base = _environment_classes()[check_task(task).removeprefix(PREFIX)]
    compiled: list[mujoco.MjModel] = []

    def initialize(self: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
        if not compiled:
            compiled.append(base._initialize_simulation(self)[0])
        model = copy.copy(compiled[0])
        return model, mujoco.MjData(model)

    return type(base.__name__, (base,), {"_initialize_simulation": initialize})


def _make_raw(task: str) -> Any:
    """Meta-World's own environment object, goal visible, never ending by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium warns about float precision of the bounds
        raw = _compiled_class(task)()
    raw._set_task_called = True
    raw._partially_observable = False
    raw.__dict__.pop("sawyer_observation_space", None)  # cached with a zero goal range: it would clip the goal to 0
    raw.max_path_length = 2**62  # its own limit raises; the length of an episode is decided above
    raw._freeze_rand_vec = True
    return raw


# ------------------------------------------------------------------------------------------------ start states


@dataclass(frozen=True)
class StartStates:
    """Start states of one task and split.

    rand_vec: [num, V] float64 reset vectors, in Meta-World's units (metres).
    min_distance: no start state of another split is nearer than this, whatever the seed and number. Euclidean, in
        reset-space units: every component that changes the simulator's state is scaled by its range to [0, 1].
    """

    rand_vec: NDArray[np.float64]
    split: str
    task: str
    seed: int
    min_distance: float

    def record(self) -> dict[str, Any]:
        """What a dataset stores about the start states it was collected from."""
        return {"task": self.task, "split": self.split, "seed": self.seed, "min_distance": self.min_distance}


def start_states(task: str, split: str, num: int, *, seed: int = 0) -> StartStates:
    """The first `num` start states of a split; more of them never changes the earlier ones.

    The normalised reset space (D components that matter, each in [0, 1]) is cut into parallel strips across its
    diagonal, ten periods of train, guard, dev, guard, test, guard with shares .4 .1 .1 .1 .2 .1. A vector belongs to
    the split in whose strip its position along the diagonal, sum(x) / sqrt(D), falls, and is rejected in a guard
    band. So vectors of different splits are at least one guard band, .01 * sqrt(D), apart for every seed, and
    all splits cover the whole space evenly, also where only one component varies (drawer-open). Within its strips a
    vector is uniform over those that Meta-World itself accepts.

    Raises:
        UnknownNameError: for an unknown task or split.
        ValueError: for a negative `num`.
    """
    check_task(task)
    check_split(split)
    if num < 0:
        raise ValueError(f"num is {num}, but a number of start states is at least 0")
    # Drawn in powers of two so that a growing table is computed a few times only.
    vectors, dims = _draw_start_states(task, split, max(64, 1 << (num - 1).bit_length()) if num else 64, seed)
    return StartStates(vectors[:num].copy(), split, task, seed, split_distance(dims))


@functools.lru_cache(maxsize=512)
def _draw_start_states(task: str, split: str, num: int, seed: int) -> tuple[NDArray[np.float64], int]:
    space = _reset_space(task)
    low, high, effective = space.low, space.high, space.effective
    count = len(effective)
    if count == 0:
        raise ValueError(f"task '{task}' always starts in the same state, so its starts cannot be split")
    digest = hashlib.sha256(f"{task}|{split}|{seed}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    found: list[NDArray[np.float64]] = []
    while len(found) < num:
        unit = rng.random(low.size)
        if not in_split(unit[effective], split):
            continue
        vector = low + unit * (high - low)
        if space.accepts(vector):
            found.append(vector)
    return np.stack(found), count


class _Rejected(Exception):
    pass


class _ResetSpace:
    """Which reset vectors a task accepts and which of their components matter.

    Some tasks draw again until object and goal are far enough apart. A vector counts as accepted when `reset_model`
    asks for one only once. The settling of the hand (250 physics steps) does not depend on the vector and is skipped.
    """

    def __init__(self, task: str) -> None:
        self._raw = raw = _make_raw(task)
        space = raw._random_reset_space
        self.low, self.high = space.low.astype(np.float64), space.high.astype(np.float64)
        self._vector, self._asked = self.low, 0
        raw._get_state_rand_vec = self._next_vector
        raw._reset_hand()
        raw._reset_hand = _do_nothing
        rng = np.random.Generator(np.random.PCG64(0))
        base = next(
            v
            for v in (self.low + rng.random(self.low.size) * (self.high - self.low) for _ in range(10_000))
            if self.accepts(v)
        )
        self.effective = [i for i in range(self.low.size) if self._matters(i, base)]

    def _next_vector(self) -> NDArray[np.float64]:
        self._asked += 1
        if self._asked > 1:
            raise _Rejected
        return self._vector.copy()

    def accepts(self, vector: NDArray[np.float64]) -> bool:
        self._vector, self._asked = vector, 0
        mujoco.mj_resetData(self._raw.model, self._raw.data)
        mujoco.mj_forward(self._raw.model, self._raw.data)  # some tasks read positions at once
        try:
            self._raw.reset_model()
        except _Rejected:
            return False
        return True

    def _signature(self, vector: NDArray[np.float64]) -> NDArray[np.float64] | None:
        # Twice: targets that are read off a moved body follow only after a forward pass.
        for _ in range(2):
            if not self.accepts(vector):
                return None
            mujoco.mj_forward(self._raw.model, self._raw.data)
        raw = self._raw
        parts = [raw.data.qpos, raw.model.body_pos, raw.model.body_quat, raw.model.geom_pos, raw._target_pos]
        return np.concatenate([np.ravel(part) for part in parts])

    def _matters(self, component: int, base: NDArray[np.float64]) -> bool:
        if self.high[component] - self.low[component] < 1e-9:
            return False
        reference = self._signature(base)
        assert reference is not None
        for part in (0.1, 0.3, 0.5, 0.7, 0.9):
            other = base.copy()
            other[component] = self.low[component] + part * (self.high[component] - self.low[component])
            signature = self._signature(other)
            if signature is not None and not np.array_equal(signature, reference):
                return True
        return False


@functools.lru_cache(maxsize=2)
def _reset_space(task: str) -> _ResetSpace:
    return _ResetSpace(task)


# -------------------------------------------------------------------------------------------------- simulator

_SNAPSHOT_VERSION = 1.0
# The integration state without the applied forces, which Meta-World never uses and which would double its size.
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION) & ~(
    int(mujoco.mjtState.mjSTATE_QFRC_APPLIED) | int(mujoco.mjtState.mjSTATE_XFRC_APPLIED)
)
# Constant after construction, or rewritten by every step, or not numbers of the simulation.
_NOT_STATE = {
    "_did_see_sim_exception", "_freeze_rand_vec", "_last_stable_obs", "_obs_obj_max_len", "_partially_observable",
    "_set_task_called", "action_rot_scale", "action_scale", "frame_skip", "hand_high", "hand_low", "height", "width",
    "init_qpos", "init_qvel", "max_path_length", "mocap_high", "mocap_low", "num_resets", "seeded_rand_vec",
    "curr_path_length",
}  # fmt: skip


_DIVERGED = [int(kind) for kind in (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL,
            mujoco.mjtWarning.mjWARN_BADQACC)]  # fmt: skip


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


_SCALARS: dict[str, Callable[[Any], Any]] = {"bool": bool, "int": int, "float": float}


def _live_arrays(raw: Any) -> list[NDArray[Any]]:
    data, model = raw.data, raw.model
    names = ("qpos", "qvel", "xpos", "xquat", "xmat", "xipos", "site_xpos", "site_xmat", "geom_xpos", "geom_xmat",
             "mocap_pos", "mocap_quat")  # fmt: skip
    arrays = [getattr(data, name) for name in names]
    return arrays + [getattr(model, name) for name in ("body_pos", "body_quat", "site_pos", "geom_pos")]


class Simulator:
    """One Meta-World task that can be reset to a vector, stepped, photographed, saved and restored exactly.

    A snapshot is a flat float64 vector: version, task, elapsed control steps, the last observation, MuJoCo's
    integration state, positions of the task's own bodies, sites and geoms (a reset moves them in the model), and the
    numbers that Meta-World keeps in Python attributes. Attributes that are live views into MuJoCo's arrays are left
    alone: they follow the restored state.
    """

    def __init__(self, task: str, *, action_repeat: int = 2) -> None:
        self.task = check_task(task)
        self.action_repeat = action_repeat
        self.raw = _make_raw(task)
        self.steps = 0
        model = self.raw.model
        names = [model.body(i).name for i in range(model.nbody)]
        fixed = {names.index(name) for name in ("world", "tablelink", "RetainingWall", "mocap") if name in names}
        roots = model.body_rootid
        robot = names.index("base")
        task_bodies = [i for i in range(model.nbody) if i not in fixed and roots[i] != robot]
        self._bodies = np.array(task_bodies, dtype=np.int64)
        self._geoms = np.flatnonzero(np.isin(model.geom_bodyid, self._bodies))
        hand = set()
        for i in range(model.nbody):
            if names[i] == "right_hand" or model.body_parentid[i] in hand:
                hand.add(i)
        # Per geom: 1 left pad, 2 right pad, 4 hand (pads included), 8 object, 16 table.
        self._parts = [0] * model.ngeom
        for geom, body in enumerate(model.geom_bodyid):
            if body in hand:
                part = 4 | (1 if names[body] == "leftpad" else 0) | (2 if names[body] == "rightpad" else 0)
            elif body in task_bodies:
                part = 8
            else:
                part = 16 if names[body] in ("tablelink", "RetainingWall") else 0
            self._parts[geom] = part
        self.observation = np.zeros(STATE_DIM)
        self._state_size = mujoco.mj_stateSize(model, _STATE)
        self._number = _task_number(task)
        start = start_states(task, "train", 1).rand_vec[0]
        self.raw._last_rand_vec = start
        self.raw.reset()  # once as Meta-World does it: some attributes exist only from then on
        self.reset(start)
        before = dict(vars(self.raw))
        self.step(np.zeros(ACTION_DIM, dtype=np.float32))
        self._schema = self._find_schema(before)
        self.reset(start)
        self.snapshot_size = self.snapshot().size

    # -- running

    def reset(self, rand_vec: NDArray[np.float64]) -> NDArray[np.float64]:
        """The first observation [39] of the start state `rand_vec` [V]; depends on nothing else."""
        raw = self.raw
        raw._last_rand_vec = np.array(rand_vec, dtype=np.float64)
        # Meta-World's reset() runs reset_model twice, so that positions read in the second run are those of bodies
        # that the first one moved. The first one need not settle the hand, which takes most of its time.
        mujoco.mj_resetData(raw.model, raw.data)
        mujoco.mj_forward(raw.model, raw.data)
        raw._reset_hand = _do_nothing
        try:
            raw.reset_model()
        finally:
            del raw._reset_hand
        mujoco.mj_resetData(raw.model, raw.data)
        raw.reset_model()
        self._finish_reset()
        return self.observation

    def _finish_reset(self) -> None:
        """Compute the first observation again: reset_model's is of the bodies before they were moved."""
        raw = self.raw
        mujoco.mj_forward(raw.model, raw.data)
        for site in raw._target_site_config:
            raw._set_pos_site(*site)
        raw._prev_obs = raw._get_curr_obs_combined_no_goal()
        space = raw.sawyer_observation_space
        self.observation = np.clip(raw._get_obs(), space.low, space.high)
        self.steps = 0
        self._warnings = self._count_warnings()

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, bool, bool]:
        """One control step with `action` [4] in [-1, 1].

        Returns:
            The observation [39], the reward (mean over the repeats, 0 to 10), the task's success flag at any repeat,
            and whether the simulator failed (NaN or a diverging state). A failed step repeats the last observation.
        """
        total, success = 0.0, False
        for _ in range(self.action_repeat):
            observation, reward, _, _, info = self.raw.step(action)
            total += float(reward)
            success = success or info["success"] > 0
        self.steps += 1
        bad = 0 in np.isfinite(observation).tobytes() or not math.isfinite(total)
        if bad or self._count_warnings() != self._warnings:
            return self.observation, 0.0, False, True
        self.observation = observation
        return observation, total / self.action_repeat, success, False

    def _count_warnings(self) -> int:
        # MuJoCo resets the state by itself when it diverges and only counts it.
        return int(self.raw.data.warning.number[_DIVERGED].sum())

    def contact(self) -> NDArray[np.bool_]:
        """[C] flags of `CONTACT_NAMES` in the present state."""
        left = right = hand = table = False
        for one, other in self.raw.data.contact.geom.tolist():  # a few, for which numpy takes longer than a loop
            either = self._parts[one] | self._parts[other]
            if either & 8:  # the object
                left, right, hand = left or bool(either & 1), right or bool(either & 2), hand or bool(either & 4)
            table = table or either & 20 == 20
        return np.array([left, right, hand, table])

    # -- saving

    def _find_schema(self, before: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
        """(attribute, kind, shape) of every number that Meta-World keeps in Python and that may change.

        before: the attributes after a reset; those of now are after a step. One that is None before its first use
        ("optional") takes two numbers: whether it is set, and its value.
        """
        live = _live_arrays(self.raw)
        schema: list[tuple[str, str, tuple[int, ...]]] = []
        for name, value in sorted(vars(self.raw).items()):
            if name in _NOT_STATE:
                continue
            if isinstance(value, int | float | np.bool_ | np.number):
                kind = "bool" if isinstance(value, bool | np.bool_) else "float"
                if isinstance(value, int | np.integer) and kind != "bool":
                    kind = "int"
                schema.append((name, "optional" if before.get(name) is None else kind, ()))
            elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                if not any(np.may_share_memory(value, array) for array in live):
                    schema.append((name, value.dtype.str, value.shape))
        return schema

    def snapshot(self) -> NDArray[np.float64]:
        """[S] everything that the future of this simulator depends on."""
        raw, model = self.raw, self.raw.model
        state = np.empty(self._state_size)
        mujoco.mj_getState(model, raw.data, state, _STATE)
        numbers: list[float] = []
        arrays: list[NDArray[Any]] = [
            self.observation,
            state,
            model.body_pos[self._bodies].ravel(),
            model.body_quat[self._bodies].ravel(),
            model.site_pos.ravel(),
            model.geom_pos[self._geoms].ravel(),
        ]
        for name, kind, shape in self._schema:
            value = getattr(raw, name)
            if kind == "optional":
                numbers += (0.0, 0.0) if value is None else (1.0, value)
            elif kind in _SCALARS:
                numbers.append(value)
            elif value.shape == shape:
                arrays.append(value.ravel())
            else:
                raise RuntimeError(
                    f"task '{self.task}': attribute '{name}' changed its shape from {shape} to {value.shape}, so "
                    "a snapshot cannot hold it; this Meta-World version is not the pinned one"
                )
        return np.concatenate([(_SNAPSHOT_VERSION, self._number, float(self.steps)), *arrays, numbers])

    def restore(self, snapshot: NDArray[np.float64]) -> NDArray[np.float64]:
        """The observation [39] of a snapshot [>= S] (padding is ignored), from which the same future follows.

        Raises:
            ValueError: for a snapshot of another task, size or version.
        """
        if snapshot.ndim != 1 or snapshot.size < self.snapshot_size:
            raise ValueError(
                f"a snapshot of '{self.task}' has {self.snapshot_size} numbers, but this one has shape "
                f"{snapshot.shape}; was it taken from another task?"
            )
        if snapshot[0] != _SNAPSHOT_VERSION or snapshot[1] != self._number:
            raise ValueError(
                f"this snapshot is not one of '{self.task}' (version {snapshot[0]:g}, task number {snapshot[1]:.0f}); "
                "restore it in a row that runs the task it was taken from"
            )
        raw, at = self.raw, 0
        model = raw.model

        def take(shape: tuple[int, ...]) -> NDArray[np.float64]:
            nonlocal at
            size = int(np.prod(shape))
            at += size
            return snapshot[at - size : at].reshape(shape)

        self.steps = int(take((3,))[2])
        self.observation = take((STATE_DIM,)).copy()
        state = take((self._state_size,))
        model.body_pos[self._bodies] = take((len(self._bodies), 3))
        model.body_quat[self._bodies] = take((len(self._bodies), 4))
        model.site_pos[:] = take(model.site_pos.shape)
        model.geom_pos[self._geoms] = take((len(self._geoms), 3))
        for name, kind, shape in self._schema:
            if kind not in _SCALARS and kind != "optional":
                setattr(raw, name, take(shape).astype(np.dtype(kind)))  # a copy
        for name, kind, _ in self._schema:  # the single numbers come last
            if kind == "optional":
                known, number = take((2,))
                setattr(raw, name, float(number) if known else None)
            elif kind in _SCALARS:
                setattr(raw, name, _SCALARS[kind](take((1,))[0]))
        raw._last_stable_obs = self.observation.copy()
        mujoco.mj_setState(model, raw.data, state, _STATE)
        mujoco.mj_forward(model, raw.data)
        # Positions as the step left them, which are those of the targets rather than those of the model.
        for site in raw._target_site_config:
            raw._set_pos_site(*site)
        # Again: the forward pass replaced the solver's warm start.
        mujoco.mj_setState(model, raw.data, state, _STATE)
        self._warnings = self._count_warnings()
        return self.observation


def _task_number(task: str) -> float:
    return float(task_id(task) >> 11)  # the 52 bits that a float64 holds exactly


# ------------------------------------------------------------------------------------------------ environment


class MetaWorldEnv(RowsEnv):
    """Meta-World tasks side by side; row b runs `tasks[b % len(tasks)]`.

    Keys of a row, beside those of `RowsEnv`: `state` float32 [39], `proprioception` float32 [4] (hand xyz, gripper
    opening), `contact` float32 [C] (0 or 1, `contact_names`), with `pixels=True` `pixels` uint8 [3, H, W]. `success` is
    the task's flag at any repeat of this control step, `reward` the mean over the repeats, 0 to 10. A snapshot is
    zero-padded to the longest of the tasks; it holds the elapsed steps too.

    A row never terminates: it goes on after success and is truncated at `max_steps`. A reset without `start` takes one
    of the first 200 start states of the split.

    Args:
        tasks: one name or several, such as "metaworld/push-v3".
        num_envs: rows B.
        action_repeat: simulator steps (12.5 ms each) per control step.
        max_steps: control steps until a row is truncated; with `action_repeat` 500 simulator steps at most.
        pixels: whether rows carry images of `camera`.
        snapshots: whether rows carry their full simulator state.
        camera: a `Camera`, or its fields by name; None is the default camera.
        split: which start states resets use: "train", "dev" or "test".
        seed: of the order of the starts. device: where observations are put; the simulators run on the CPU.
    """

    layout = METAWORLD

    def __init__(
        self,
        tasks: str | Sequence[str],
        num_envs: int = 1,
        *,
        action_repeat: int = 2,
        max_steps: int = 100,
        pixels: bool = False,
        snapshots: bool = False,
        camera: Camera | Mapping[str, Any] | None = None,
        split: str = "train",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.action_repeat = whole_number("action_repeat", action_repeat, 1)
        self.max_steps = whole_number("max_steps", max_steps, 1)
        if max_steps * action_repeat > MAX_SIMULATOR_STEPS:
            raise ValueError(
                f"max_steps is {max_steps} control steps of {action_repeat} simulator steps (action_repeat), but "
                f"Meta-World allows an episode at most {MAX_SIMULATOR_STEPS} simulator steps; lower one of the two"
            )
        self.split = check_split(split)
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        super().__init__([check_task(task) for task in tasks], num_envs, device=device, seed=seed)
        self.camera = camera if isinstance(camera, Camera) else Camera(**dict(camera or {}))
        self.control_dt_s = SIMULATOR_DT_S * action_repeat
        self.contact_names = CONTACT_NAMES
        self.simulators = [Simulator(task, action_repeat=action_repeat) for task in self.row_tasks]
        self._pixels, self._snapshots = pixels, snapshots
        self._renderers: dict[str, SceneRenderer] = {}
        size = (3, self.camera.height, self.camera.width)
        entries: dict[str, tuple[int, ...] | TensorSpec] = {
            "state": (STATE_DIM,),
            "proprioception": (4,),
            "contact": (len(CONTACT_NAMES),),
        }
        if pixels:
            entries["pixels"] = Bounded(0, 255, shape=(num_envs, *size), dtype=torch.uint8, device=self.device)
            self._renderer(0, *size[1:])  # an error here rather than in the first step
        if snapshots:
            self.snapshot_size = max(simulator.snapshot_size for simulator in self.simulators)
        self._declare(entries, (ACTION_DIM,))
        # What the rows show, written through numpy, whose small writes are several times cheaper than torch's.
        spec = self.observation_spec.clone().to("cpu")
        self._shown = {key: spec[key].zero().numpy() for key in (*entries, *(["snapshot"] if snapshots else []))}

    @property
    def config(self) -> dict[str, Any]:
        """What makes an equal environment: `MetaWorldEnv(**config)`; plain values, fit for JSON."""
        return {
            "tasks": list(self.tasks),
            "num_envs": self.batch_size[0],
            "action_repeat": self.action_repeat,
            "max_steps": self.max_steps,
            "pixels": self._pixels,
            "snapshots": self._snapshots,
            "camera": self.camera.to_dict(),
            "split": self.split,
        }

    def _start_count(self, task: str) -> int:
        return _DRAWS

    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        saved = None if snapshot is None else snapshot.cpu().double().numpy()
        for i, row in enumerate(rows.tolist()):
            simulator = self.simulators[row]
            if start is not None:
                index = int(start[i])
                simulator.reset(start_states(simulator.task, self.split, index + 1).rand_vec[index])
            else:
                assert saved is not None
                simulator.restore(saved[i])
            self._see(row)
        return self._of(rows)

    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        flags = np.zeros((3, len(rows), 1), dtype=bool)
        success, failed, truncated = flags
        reward = np.zeros((len(rows), 1), dtype=np.float32)
        actions, chosen = action.cpu().numpy(), rows.tolist()
        for i, row in enumerate(chosen):
            simulator = self.simulators[row]
            _, reward[i], success[i], failed[i] = simulator.step(actions[i])
            truncated[i] = failed[i] or simulator.steps >= self.max_steps
        # All rows after the last step: the code that reads a simulator stays in the CPU's caches from row to row.
        for i, row in enumerate(chosen):
            if not failed[i]:
                self._see(row)
        return {
            **self._of(rows),
            "reward": torch.from_numpy(reward),
            "success": torch.from_numpy(success),
            "simulator_error": torch.from_numpy(failed),
            "terminated": torch.zeros(len(rows), 1, dtype=torch.bool),
            "truncated": torch.from_numpy(truncated),
        }

    def _see(self, row: int) -> None:
        """Note what a simulator shows now."""
        simulator, shown = self.simulators[row], self._shown
        shown["state"][row] = simulator.observation
        shown["proprioception"][row] = simulator.observation[:4]
        shown["contact"][row] = simulator.contact()
        if self._pixels:
            shown["pixels"][row] = self.render_rgb(row, (self.camera.height, self.camera.width)).transpose(2, 0, 1)
        if self._snapshots:
            shown["snapshot"][row, : simulator.snapshot_size] = simulator.snapshot()

    def _of(self, rows: Tensor) -> Shown:
        """Copies of what the chosen rows show."""
        at = rows.numpy()
        return {key: torch.from_numpy(value[at]) for key, value in self._shown.items()}

    # -- images

    def _renderer(self, row: int, height: int, width: int) -> SceneRenderer:
        task = self.row_tasks[row]
        if task not in self._renderers:
            self._renderers[task] = SceneRenderer(self.simulators[row].raw.model, height, width)
        return self._renderers[task]

    def render_rgb(
        self, row: int = 0, size: int | tuple[int, int] = 256, camera: Camera | None = None
    ) -> NDArray[np.uint8]:
        """[H, W, 3] upright image of a row, seen by `camera` or by the environment's own.

        Raises:
            RenderingUnavailable: when the machine has neither EGL nor OSMesa; it says how to get one.
        """
        height, width = (size, size) if isinstance(size, int) else size
        raw = self.simulators[row].raw
        return self._renderer(row, height, width).render(raw.model, raw.data, camera or self.camera, height, width)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the renderers; the simulators go with the object."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        super().close(raise_if_closed=raise_if_closed)


# ----------------------------------------------------------------------------------------------------- expert


class ExpertPolicy:
    """Meta-World's scripted experts as a `Policy` that reads `state` and `task`; they keep no state of their own.

    Args:
        tasks: the tasks it will meet; other tasks in an observation are an error.
    """

    gripper = 3
    """The number of an action that opens and closes the hand."""

    def __init__(self, tasks: str | Sequence[str]) -> None:
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        for task in tasks:
            check_task(task)
        from metaworld.policies import ENV_POLICY_MAP

        scripts: Mapping[str, Any] = ENV_POLICY_MAP

        self.tasks = tasks
        self._experts = {task_id(task): scripts[task.removeprefix(PREFIX)]() for task in tasks}

    def initial_state(self, rows: int) -> PolicyState:
        """An empty state of `rows` rows."""
        return TensorDict({}, batch_size=[rows])

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        """Clean actions [B, 4] in [-1, 1] for `observation` [B]."""
        return self.label(observation["state"], observation["task"]), policy_state

    def label(self, state: Tensor, task: Tensor) -> Tensor:
        """[B, 4] float32 actions in [-1, 1] for `state` [B, 39] of `task` [B]."""
        if not bool(torch.isfinite(state).all()):
            raise ValueError("state holds NaN or infinity; the expert cannot act on it")
        states = state.detach().to("cpu", torch.float64).numpy()
        actions = np.empty((len(states), ACTION_DIM), dtype=np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scripts warn whenever they ask for more than full speed
            for row, number in enumerate(task.tolist()):
                if number not in self._experts:
                    raise ValueError(f"row {row} runs a task that this expert does not know; it knows {self.tasks}")
                actions[row] = self._experts[number].get_action(states[row])
        return torch.from_numpy(actions).clamp(-1.0, 1.0).to(state.device)
