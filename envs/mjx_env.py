"""MuJoCo models on JAX (MJX): thousands of environments in one compiled call, handed to torch without a copy.

Tasks of ours: "mjx/cartpole" (swing up and balance) and "mjx/pusher" (a two-link arm pushes a puck to a goal). Any
other MJCF is a task with `model=<path>`; what it observes, pays and counts as success are functions of yours.

Start states come in three splits that never come closer to each other than a stated distance (`start_states`).

Letters: B rows, V numbers of a reset vector, D of an observation, A actuators, S of a snapshot.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wamrl.envs.base import RowsEnv, Shown, StartStates, check_split, in_split, split_distance
from wamrl.interfaces import task_id
from wamrl.naming import unknown_name, whole_number

try:
    import jax
    import jax.numpy as jnp
    import mujoco
    from mujoco import mjx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('MJX is not installed; run: pip install "wamrl[mjx]"', name=error.name) from error

PREFIX = "mjx/"
ASSETS = Path(__file__).parent / "assets"
_STARTS = 10_000  # start states that a reset without `start` chooses among

Start = Callable[[Any, Any], dict[str, Any]]
"""(mujoco.MjModel, unit [V] in [0, 1]) -> parts of the state to set, such as {"qpos": [nq]}; runs in JAX."""
Read = Callable[[Any, Any], Any]
"""(mujoco.MjModel, mjx.Data) -> an observation [D], a reward or a flag; runs in JAX."""


@dataclass(frozen=True)
class Task:
    """What makes a model a task; all functions are traced by JAX, for one environment.

    model: the MJCF. start_size: V. start, observe, reward, success: see `Start` and `Read`. proprioception: indices
    into the observation. contacts: flag -> two names of geoms that touch. physics_steps: per control step.
    """

    model: Path
    start_size: int
    start: Start
    observe: Read
    reward: Read
    success: Read
    proprioception: tuple[int, ...] = ()
    contacts: tuple[tuple[str, tuple[str, str]], ...] = ()
    physics_steps: int = 2
    max_steps: int = 200


# ------------------------------------------------------------------------------------------------------- tasks


def _cartpole_start(model: Any, unit: Any) -> dict[str, Any]:
    """Cart within a metre of the middle, pole at any angle, both slow."""
    x, angle, speed, turn = unit
    qpos = jnp.array([2.0 * x - 1.0, (2.0 * angle - 1.0) * jnp.pi])
    return {"qpos": qpos, "qvel": jnp.array([0.2 * speed - 0.1, 0.2 * turn - 0.1])}


def _cartpole_observe(model: Any, data: Any) -> Any:
    """Place of the cart, cosine and sine of the pole (upright: 1, 0), and their speeds."""
    x, angle = data.qpos
    return jnp.array([x, jnp.cos(angle), jnp.sin(angle), *data.qvel])


def _cartpole_reward(model: Any, data: Any) -> Any:
    """In [0, 1]: upright, in the middle, slow."""
    x, angle = data.qpos
    upright, middle = (1.0 + jnp.cos(angle)) / 2.0, (1.0 + jnp.exp(-jnp.square(x))) / 2.0
    return upright * middle * (1.0 + jnp.exp(-jnp.square(data.qvel[1]))) / 2.0


def _cartpole_success(model: Any, data: Any) -> Any:
    """Within 15 degrees of upright, slower than 1 rad/s, a metre from the middle at most."""
    x, angle = data.qpos
    return (jnp.cos(angle) > 0.966) & (jnp.abs(data.qvel[1]) < 1.0) & (jnp.abs(x) < 1.0)


def _pusher_start(model: Any, unit: Any) -> dict[str, Any]:
    """Arm folded to one side; puck in front of it, the goal further out."""
    puck_x, puck_y, goal_x, goal_y = unit
    puck = jnp.array([0.28 + 0.08 * puck_x, 0.2 * puck_y - 0.1])
    goal = jnp.array([0.42 + 0.08 * goal_x, 0.3 * goal_y - 0.15, 0.0])
    return {"qpos": jnp.concatenate([jnp.array([-1.2, 2.3]), puck]), "mocap_pos": goal[None]}


def _pusher_observe(model: Any, data: Any) -> Any:
    """Joint angles and speeds, tip, puck, its velocity, goal; each x, y in metres."""
    tip, goal = data.site_xpos[0, :2], data.mocap_pos[0, :2]
    return jnp.concatenate([data.qpos[:2], data.qvel[:2], tip, data.qpos[2:], data.qvel[2:], goal])


def _pusher_reward(model: Any, data: Any) -> Any:
    """In [0, 1]: the tip near the puck, and three times as much the puck near the goal."""
    puck = data.qpos[2:]
    reach = jnp.linalg.norm(data.site_xpos[0, :2] - puck)
    push = jnp.linalg.norm(puck - data.mocap_pos[0, :2])
    return 0.25 * jnp.exp(-5.0 * reach) + 0.75 * jnp.exp(-10.0 * push)


def _pusher_success(model: Any, data: Any) -> Any:
    """The puck's middle within 5 cm of the goal's."""
    return jnp.linalg.norm(data.qpos[2:] - data.mocap_pos[0, :2]) < 0.05


TASKS: Mapping[str, Task] = {
    "mjx/cartpole": Task(
        model=ASSETS / "cartpole.xml",
        start_size=4,
        start=_cartpole_start,
        observe=_cartpole_observe,
        reward=_cartpole_reward,
        success=_cartpole_success,
        proprioception=(0, 1, 2, 3, 4),
        physics_steps=2,
        max_steps=250,
    ),
    "mjx/pusher": Task(
        model=ASSETS / "pusher.xml",
        start_size=4,
        start=_pusher_start,
        observe=_pusher_observe,
        reward=_pusher_reward,
        success=_pusher_success,
        proprioception=(0, 1, 2, 3, 4, 5),
        contacts=(("tip_puck", ("tip", "puck")),),
        physics_steps=4,
        max_steps=100,
    ),
}


def _any_start(model: Any, unit: Any) -> dict[str, Any]:
    """The model's own start (its first keyframe, if it has one), velocities within 0.05 of zero."""
    qpos = jnp.asarray(model.key_qpos[0] if model.nkey else model.qpos0)
    return {"qpos": qpos, "qvel": 0.1 * unit - 0.05}


def _any_observe(model: Any, data: Any) -> Any:
    """Positions and velocities of all joints."""
    return jnp.concatenate([data.qpos, data.qvel])


def _nothing(model: Any, data: Any) -> Any:
    """No reward."""
    return jnp.zeros(())


def _never(model: Any, data: Any) -> Any:
    """No success."""
    return jnp.zeros((), dtype=bool)


def _function(what: Callable[..., Any] | str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    """A function, or the dotted name of one."""
    if isinstance(what, str):
        module, _, name = what.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"'{what}' cannot be imported as a function: {error}") from error
    return what or default


@functools.cache
def load_model(path: Path) -> Any:
    """MuJoCo's model of an MJCF. Raises FileNotFoundError, or ValueError for a file that MuJoCo refuses."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no MJCF at {path}")
    return mujoco.MjModel.from_xml_path(str(path))


# ------------------------------------------------------------------------------------------------ start states


def start_states(task: str, split: str, num: int) -> StartStates:
    """The first `num` start states of a split of one of our `TASKS`; more of them never change the earlier ones."""
    if task not in TASKS:
        raise unknown_name("MJX task", task, TASKS)
    return _start_states(task, split, num, TASKS[task].start_size)


def _start_states(task: str, split: str, num: int, size: int) -> StartStates:
    if num < 0:
        raise ValueError(f"num is {num}, but a number of start states is at least 0")
    vectors = _draw(task, check_split(split), max(64, 1 << max(num - 1, 0).bit_length()), size)
    return StartStates(vectors[:num].copy(), split, task, split_distance(size))


@functools.lru_cache(maxsize=64)
def _draw(task: str, split: str, num: int, size: int) -> NDArray[np.float64]:
    rng = np.random.Generator(np.random.PCG64([task_id(task), ("train", "dev", "test").index(split)]))
    found: list[NDArray[np.float64]] = []
    while len(found) < num:
        unit = rng.random(size)
        if in_split(unit, split):
            found.append(unit)
    return np.stack(found)


# ------------------------------------------------------------------------------------------------ the compiled part

_STATE = ("qpos", "qvel", "act", "qacc_warmstart", "time", "mocap_pos", "mocap_quat")
State = dict[str, Any]
"""What the future depends on: the fields `_STATE` of mjx.Data, each with the rows in front."""


class Program:
    """The compiled functions of a task, for any number of rows."""

    def __init__(self, task: Task, physics_steps: int) -> None:
        self.task, self.host = task, load_model(task.model)
        # Closed over rather than passed: as an argument, the model made CPU code several times slower.
        self._model = mjx.put_model(self.host)
        self._blank = mjx.make_data(self.host)
        self._physics_steps = physics_steps
        self._pairs = [tuple(self._geom(name) for name in pair) for _, pair in task.contacts]
        low, high = self.host.actuator_ctrlrange.T
        limited = self.host.actuator_ctrllimited.astype(bool)
        if not limited.all():
            names = [self.host.actuator(i).name or str(i) for i in np.flatnonzero(~limited)]
            raise ValueError(f"actuators {', '.join(names)} of {task.model} need a ctrlrange to scale actions to")
        self._centre, self._half = jnp.asarray((low + high) / 2), jnp.asarray((high - low) / 2)
        self.begin = jax.jit(jax.vmap(self._begin))
        self.advance = jax.jit(jax.vmap(self._advance))
        self.show = jax.jit(jax.vmap(self._show))
        self.merge = jax.jit(jax.vmap(_merge))

    def _geom(self, name: str) -> int:
        names = [self.host.geom(i).name for i in range(self.host.ngeom)]
        if name not in names:
            raise unknown_name(f"geom of {self.task.model.name}", name, names)
        return names.index(name)

    def _begin(self, unit: Any) -> tuple[State, dict[str, Any]]:
        parts = {key: jnp.asarray(value, jnp.float32) for key, value in self.task.start(self.host, unit).items()}
        state = {key: getattr(self._blank, key) for key in _STATE} | parts
        return state, self._show(state)

    def _show(self, state: State) -> dict[str, Any]:
        """What a state shows: places and touches, no physics step."""
        data = mjx.kinematics(self._model, self._blank.replace(**state))
        return self._read(mjx.collision(self._model, data) if self._pairs else data)

    def _read(self, data: Any) -> dict[str, Any]:
        shown = {
            "state": jnp.asarray(self.task.observe(self.host, data), jnp.float32),
            "reward": jnp.asarray(self.task.reward(self.host, data), jnp.float32)[None],
            "success": _byte(self.task.success(self.host, data)),
        }
        if self._pairs:
            one, other = data.contact.geom.T
            touching = data.contact.dist < 0.0
            flags = [
                (touching & (((one == a) & (other == b)) | ((one == b) & (other == a)))).any() for a, b in self._pairs
            ]
            shown["contact"] = jnp.stack(flags).astype(jnp.float32)
        return shown

    def _advance(self, state: State, action: Any, chosen: Any) -> tuple[State, dict[str, Any], Any]:
        """The next state, what it shows and whether the simulation failed; rows not chosen stay as they are."""
        data = self._blank.replace(**state, ctrl=self._centre + self._half * action)
        data = jax.lax.fori_loop(0, self._physics_steps, lambda _, now: mjx.step(self._model, now), data)
        after = {key: getattr(data, key) for key in _STATE}
        finite = jnp.isfinite(after["qpos"]).all() & jnp.isfinite(after["qvel"]).all()
        finite = finite & (jnp.abs(after["qvel"]).max(initial=0.0) < 1e8)  # MuJoCo's own bound, mjMAXVAL is 1e10
        shown = self._show(after)
        for key in ("state", "reward"):
            finite = finite & jnp.isfinite(shown[key]).all()
        keep = chosen & finite
        after = jax.tree.map(lambda new, old: jnp.where(keep, new, old), after, state)
        return after, shown, _byte(~finite)


def _byte(flag: Any) -> Any:
    """[1] uint8 of a flag: DLPack moves bytes on every version, and torch sees them as bools."""
    return jnp.asarray(flag, bool).astype(jnp.uint8)[None]


def _merge(chosen: Any, new: State, old: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), new, old)


@functools.lru_cache(maxsize=8)
def _program(task: Task, physics_steps: int) -> Program:
    return Program(task, physics_steps)


def to_torch(array: Any) -> Tensor:
    """The same memory as a tensor."""
    return torch.from_dlpack(array)


def to_jax(tensor: Tensor) -> Any:
    """The same memory as a JAX array."""
    return jnp.from_dlpack(tensor.detach().contiguous())


# ------------------------------------------------------------------------------------------------ environment


class MJXEnv(RowsEnv):
    """One task on B rows, all of them advanced by one compiled call.

    Keys of a row, beside those of `RowsEnv`: `state` float32 [D]; `proprioception` where the task names some;
    `contact` float32 [C] where it names pairs of geoms. Actions are scaled to the actuators' ctrlrange. What `reset`
    and `step` give out shares memory with JAX, so do not change it in place.

    The first reset, restore and step compile, for each `num_envs`, which takes seconds to a minute.

    Args:
        tasks: one of `TASKS`, or with `model` a name of yours, such as "mjx/my-arm".
        num_envs: rows B.
        model: the path of an MJCF, for a task of yours. By default it observes all joint positions and velocities,
            starts at the first keyframe (else the model's own state) with velocities within 0.05 of zero, pays
            nothing and never succeeds.
        observe, reward, success: functions (or dotted names of functions) of `Read`, for a task of yours.
        start: a function (or its dotted name) of `Start`, and start_size the V that it takes.
        start_size: see start.
        physics_steps: per control step; None is the task's own (1 for a model of yours).
        max_steps: control steps until a row is truncated; None is the task's own (200 for a model of yours).
        snapshots: whether rows carry their full state.
        split: which start states resets use: "train", "dev" or "test".
        seed: of the order of the starts.
        device: "cpu", or "cuda" where JAX has a GPU too.

    Raises:
        UnknownNameError: an unknown task. FileNotFoundError: no such MJCF. ValueError: a model without actuators or
            without their ranges, a device that JAX does not have, settings out of range.
    """

    gives_views = True

    def __init__(
        self,
        tasks: str | Sequence[str],
        num_envs: int = 1,
        *,
        model: str | Path | None = None,
        observe: Read | str | None = None,
        reward: Read | str | None = None,
        success: Read | str | None = None,
        start: Start | str | None = None,
        start_size: int | None = None,
        physics_steps: int | None = None,
        max_steps: int | None = None,
        snapshots: bool = False,
        split: str = "train",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if len(tasks) != 1:
            raise ValueError(f"tasks names {len(tasks)}, but one compiled call runs one model; make one env per task")
        self.split = check_split(split)
        own = {"observe": observe, "reward": reward, "success": success, "start": start, "start_size": start_size}
        self._own: dict[str, Any] = {"model": None if model is None else str(model), **own}
        task = _task_of(tasks[0], model, **own)
        if physics_steps is not None:
            whole_number("physics_steps", physics_steps, 1)
        self.action_repeat = task.physics_steps if physics_steps is None else physics_steps
        self.max_steps = whole_number("max_steps", task.max_steps if max_steps is None else max_steps, 1)
        self._jax_device = _jax_device(torch.device(device))
        super().__init__(tasks, num_envs, device=device, seed=seed)
        if load_model(task.model).nu == 0:
            raise ValueError(f"{task.model} has no actuators, so there are no actions")
        self.task, self.program = task, _program(task, self.action_repeat)
        self.model = self.program.host
        self.control_dt_s = float(self.model.opt.timestep) * self.action_repeat
        self.contact_names = tuple(name for name, _ in task.contacts)
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64, device=self.device)
        self._proprioception = torch.tensor(task.proprioception, device=self.device)
        self._everyone = self._put(np.ones(num_envs, bool))
        self._snapshots = snapshots
        self._state, shown = self.program.begin(self._put(np.zeros((num_envs, task.start_size), np.float32)))
        entries: dict[str, Any] = {"state": (shown["state"].shape[1],)}
        if task.proprioception:
            entries["proprioception"] = (len(task.proprioception),)
        if task.contacts:
            entries["contact"] = (len(task.contacts),)
        if snapshots:
            self.snapshot_size = 1 + sum(int(np.prod(self._state[key].shape[1:])) for key in _STATE)
        self._declare(entries, (self.model.nu,))

    @property
    def config(self) -> dict[str, Any]:
        """What makes an equal environment: `MJXEnv(**config)`; plain values where functions were named by strings."""
        return {
            "tasks": list(self.tasks),
            "num_envs": self.batch_size[0],
            **self._own,
            "physics_steps": self.action_repeat,
            "max_steps": self.max_steps,
            "snapshots": self._snapshots,
            "split": self.split,
        }

    def start_states(self, task: str, split: str, num: int) -> StartStates:
        """The first `num` start states of a split, of a model of your own too."""
        return _start_states(task, split, num, self.task.start_size)

    def _start_count(self, task: str) -> int:
        return _STARTS

    def _begin(self, rows: Tensor, start: Tensor | None, snapshot: Tensor | None) -> Shown:
        # Everything for all rows, whichever are new: another number of rows would be compiled anew.
        count, at = self.batch_size[0], rows.numpy()
        chosen = np.zeros(count, bool)
        chosen[at] = True
        if snapshot is not None:
            whole = torch.zeros(count, snapshot.shape[1], dtype=snapshot.dtype, device=self.device)
            whole[rows.to(self.device)] = snapshot.to(self.device)
            fresh = self._put(self._unpack(whole))
            shown = self.program.show(fresh)
            steps = whole[rows.to(self.device), :1].long()
        else:
            assert start is not None
            table = _start_states(self.tasks[0], self.split, int(start.max()) + 1, self.task.start_size).rand_vec
            unit = np.zeros((count, self.task.start_size), np.float32)
            unit[at] = table[start.numpy()]
            fresh, shown = self.program.begin(self._put(unit))
            steps = torch.zeros(rows.numel(), 1, dtype=torch.int64, device=self.device)
        self._state = self.program.merge(self._put(chosen), fresh, self._state)
        self._steps[rows.to(self.device)] = steps
        td = self._as_tensors(shown)
        del td["reward"]
        if rows.numel() < count:
            td = {key: value[rows.to(self.device)] for key, value in td.items()}
        td["success"] = torch.zeros_like(td["success"])  # it is a flag of a step, and none was taken
        if self._snapshots:
            td["snapshot"] = self._pack(rows)
        return td

    def _advance(self, rows: Tensor, action: Tensor) -> Shown:
        count, everyone = self.batch_size[0], rows.numel() == self.batch_size[0]
        rows = rows.to(self.device)
        whole, chosen = action, self._everyone
        if not everyone:
            whole = torch.zeros(count, action.shape[1], device=self.device)
            whole[rows] = action
            marked = np.zeros(count, bool)
            marked[rows.cpu().numpy()] = True
            chosen = self._put(marked)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # JAX has streams of its own
        self._state, shown, failed = self.program.advance(self._state, to_jax(whole), chosen)
        if self.device.type == "cuda":
            jax.block_until_ready(shown)
        td = self._as_tensors(shown)
        td["simulator_error"] = to_torch(failed).view(torch.bool)
        if everyone:
            self._steps += 1
            steps = self._steps
        else:
            self._steps[rows] += 1
            steps, td = self._steps[rows], {key: value[rows] for key, value in td.items()}
        td["truncated"] = (steps >= self.max_steps) | td["simulator_error"]
        td["terminated"] = torch.zeros_like(td["truncated"])
        bad = td["simulator_error"]
        if bool(bad.any()):
            assert self._rows is not None
            for key in ("state", "proprioception", "contact"):
                if key in td:
                    td[key] = torch.where(bad, self._rows[key][rows], td[key])
            td["reward"], td["success"] = td["reward"].masked_fill(bad, 0.0), td["success"] & ~bad
        if self._snapshots:
            td["snapshot"] = self._pack(rows)
        return td

    def _put(self, what: Any) -> Any:
        """On the env's device for good: JAX compiles anew for arrays that only happen to be there."""
        return jax.device_put(what, self._jax_device)

    def _as_tensors(self, shown: Mapping[str, Any]) -> dict[str, Tensor]:
        td = {key: to_torch(value) for key, value in shown.items()}
        td["success"] = td["success"].view(torch.bool)
        if len(self._proprioception):
            td["proprioception"] = td["state"][:, self._proprioception]
        return td

    def _pack(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        parts = [to_torch(self._state[key]).reshape(self.batch_size[0], -1)[rows].double() for key in _STATE]
        return torch.cat([self._steps[rows].double(), *parts], dim=1)

    def _unpack(self, snapshot: Tensor) -> State:
        at, state = 1, {}
        for key in _STATE:
            shape = self._state[key].shape[1:]
            size = int(np.prod(shape))
            part = snapshot[:, at : at + size].float().reshape(len(snapshot), *shape)
            state[key], at = (to_jax(part) if size else jnp.zeros(part.shape)), at + size
        return state


def _task_of(name: str, model: str | Path | None, **own: Any) -> Task:
    if model is None:
        given = [key for key, value in own.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} make a task of your own; name its MJCF with model=<path>")
        if name not in TASKS:
            raise unknown_name("MJX task", name, TASKS, hint="For a model of your own, give model=<path of an MJCF>.")
        return TASKS[name]
    path = Path(model)
    size = own["start_size"]
    if own["start"] is not None and size is None:
        raise ValueError("start needs start_size, how many numbers in [0, 1] it takes")
    return Task(
        model=path,
        start_size=load_model(path).nv if size is None else whole_number("start_size", size, 1),
        start=_function(own["start"], _any_start),
        observe=_function(own["observe"], _any_observe),
        reward=_function(own["reward"], _nothing),
        success=_function(own["success"], _never),
        physics_steps=1,
    )


def _jax_device(device: torch.device) -> Any:
    kind = {"cpu": "cpu", "cuda": "cuda"}.get(device.type, device.type)
    try:
        return jax.devices(kind)[device.index or 0]
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"device is {device}, but JAX has none such ({str(error).splitlines()[0]}); use device='cpu', or install "
            "jax with its GPU part"
        ) from error
