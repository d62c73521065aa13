"""Gymnasium environments behind flat arrays, and the worker processes that step them.

Nothing here imports torch: a worker process starts in a fraction of the time and memory that torch would take.

Letters: B rows of the whole batch, S numbers of a snapshot. Every array of `Arrays` has the rows of all workers; a
worker reads and writes its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from wamrl.naming import unknown_name

PREFIX = "gymnasium/"
EXTRAS = {
    "gymnasium_robotics": "robotics",
    "ogbench": "ogbench",
    "gym_pusht": "pusht",
    "shimmy": "dmcontrol",
    "dm_control": "dmcontrol",
    "metaworld": "metaworld",
    "mujoco": "metaworld",
}
"""Package -> the extra of wamrl that brings it."""

_SNAPSHOT_VERSION = 1.0
_LARGEST_ATTRIBUTE = 4096


@dataclass(frozen=True)
class Build:
    """How rows are made; plain values, fit for pickling.

    ids: Gymnasium id per row. imports: modules that register ids. kwargs: of `gymnasium.make`. pixels: whether rows
    carry images. proprioception: indices into `state`. contacts: flag -> two lists of MuJoCo body names that touch.
    """

    ids: tuple[str, ...]
    imports: tuple[str, ...]
    kwargs: Mapping[str, Any]
    action_repeat: int
    max_steps: int | None
    pixels: bool
    snapshots: bool
    proprioception: tuple[int, ...]
    contacts: Mapping[str, tuple[Sequence[str], Sequence[str]]]


# --------------------------------------------------------------------------------------------------- one row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that warn on import and of Gymnasium about other packages
        yield


def import_packages(names: Sequence[str]) -> None:
    """Import the packages that register ids.

    Raises:
        ModuleNotFoundError: with the line that installs what is missing.
    """
    for name in names:
        try:
            with _quiet():
                module = importlib.import_module(name)
                if name == "gymnasium_robotics":
                    gymnasium.register_envs(module)
        except ModuleNotFoundError as error:
            root = (error.name or name).partition(".")[0]
            extra = EXTRAS.get(root) or EXTRAS.get(name)
            line = f'pip install "wamrl[{extra}]"' if extra else f"pip install {root}"
            raise ModuleNotFoundError(f"{root} is not installed; run: {line}", name=error.name) from error


def make(build: Build, id: str, *, render: bool = False) -> Any:
    """The Gymnasium environment of an id, without Gymnasium's own time limit and checker.

    Raises:
        UnknownNameError: with the nearest ids. ModuleNotFoundError: with the line that installs what is missing.
    """
    import_packages(build.imports)
    if id not in gymnasium.registry:
        known = [PREFIX + name for name in gymnasium.registry]
        hint = "An id of another package needs that package in `imports`."
        raise unknown_name("Gymnasium task", PREFIX + id, known, hint=hint)
    options = dict(build.kwargs)
    if render:
        options.setdefault("render_mode", "rgb_array")
        _choose_renderer()
    try:
        with _quiet():
            return gymnasium.make(id, max_episode_steps=-1, disable_env_checker=True, **options)
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        reason = str(error).strip()
        # Gymnasium's own error has no name, but that of the import behind it does.
        missing = getattr(error, "name", None) or getattr(error.__cause__, "name", None) or ""
        root = missing.partition(".")[0]
        line = f'; run: pip install "wamrl[{EXTRAS[root]}]"' if root in EXTRAS else ""
        raise ModuleNotFoundError(f"'{id}' needs a package that is not installed: {reason}{line}") from error


def _choose_renderer() -> None:
    """Tell Gymnasium what MuJoCo can draw with here, unless MUJOCO_GL does: it would take a window."""
    if "MUJOCO_GL" not in os.environ and importlib.util.find_spec("mujoco") is not None:
        from wamrl.envs import rendering

        with contextlib.suppress(rendering.RenderingUnavailable):  # not every environment draws with MuJoCo
            os.environ["MUJOCO_GL"] = rendering.back_end()


class Row:
    """One Gymnasium environment: resets to a seed, steps normalised actions, saves and restores.

    state: [D] float32, what its observation space holds beside images, flattened in the space's order.
    """

    def __init__(self, build: Build, id: str) -> None:
        self.build, self.id = build, id
        self.env = make(build, id)
        limit = gymnasium.registry[id].max_episode_steps
        self.max_steps = build.max_steps or (limit and -(-limit // build.action_repeat))
        with _quiet():
            space, actions = self.env.observation_space, self.env.action_space
        self._images, self._vector = _split(id, space)
        if build.pixels and not self._images and self.env.render_mode is None:
            self.env.close()
            self.env = make(build, id, render=True)
        if build.pixels and len(self._images) > 1:
            raise ValueError(f"'{id}' has {len(self._images)} images, {', '.join(self._images)}; one can be `pixels`")
        boxes = self._vector.spaces if isinstance(self._vector, spaces.Dict) else {}
        plain = all(isinstance(part, spaces.Box) for part in boxes.values())
        self._parts = tuple(boxes) if plain else ()
        self.state_size = spaces.flatdim(self._vector) if self._vector is not None else 0
        self.actions = actions
        self._plain = isinstance(space, spaces.Box) and not self._images
        if isinstance(self.actions, spaces.Box):
            if not (np.issubdtype(self.actions.dtype, np.floating) and self.actions.is_bounded()):
                raise ValueError(
                    f"'{id}' takes actions in {self.actions}, but they have to be real and bounded to be normalised; "
                    "wrap it in gymnasium.wrappers.RescaleAction and register that"
                )
            low, high = self.actions.low.astype(np.float64), self.actions.high.astype(np.float64)
            self._centre, self._half = (low + high) / 2, (high - low) / 2
            self.action_size = int(np.prod(self.actions.shape))
        elif isinstance(self.actions, spaces.Discrete):
            self.action_size = int(self.actions.n)
        else:
            raise ValueError(f"'{id}' takes actions in {self.actions}; only Box and Discrete are supported")
        self.steps, self.reset_once = 0, False
        self.state = np.zeros(self.state_size, np.float32)
        self.pixels: NDArray[np.uint8] | None = None
        self._physics = _mujoco_of(self.env)
        # MuJoCo resets a state that diverges by itself and only counts it: bad qpos, qvel and qacc.
        self._warnings = np.zeros(0) if self._physics is None else self._physics[1].warning.number[4:7]
        self._contacts = _contact_geoms(id, self._physics, build.contacts)
        self._failures = b""
        self.saver: _Saver | None = None
        if build.snapshots:
            self.reset(0)
            self._apply(np.zeros(self.action_size, np.float32))
            self.saver = _Saver(id, self.env, self._physics)
            self.reset(0)

    @property
    def discrete(self) -> bool:
        """Whether actions are one-hot."""
        return isinstance(self.actions, spaces.Discrete)

    def reset(self, seed: int) -> bool:
        """Begin the episode of this seed; False when the simulator gave NaN."""
        with _quiet():
            observation, _ = self.env.reset(seed=seed)
        self.steps, self.reset_once = 0, True
        self._failures = self._warnings.tobytes()
        return self._see(observation)

    def step(self, action: NDArray[np.float32]) -> tuple[float, bool, bool, bool, bool]:
        """Reward (sum over the repeats), terminated, truncated, success (at any repeat), and whether it failed."""
        total, terminated, truncated, success = 0.0, False, False, False
        for _ in range(self.build.action_repeat):
            try:
                observation, reward, terminated, truncated, info = self._apply(action)
            except _physics_errors():
                return 0.0, False, True, False, True
            total += float(reward)
            success = success or bool(info.get("success", info.get("is_success", False)))
            if terminated or truncated:
                break
        self.steps += 1
        truncated = bool(truncated) or (self.max_steps is not None and self.steps >= self.max_steps)
        if not math.isfinite(total) or self._warnings.tobytes() != self._failures or not self._see(observation):
            return 0.0, False, True, False, True
        return total, bool(terminated), truncated, success, False

    def _apply(self, action: NDArray[np.float32]) -> Any:
        if isinstance(self.actions, spaces.Discrete):
            return self.env.step(self.actions.start + int(action.argmax()))
        scaled = self._centre + self._half * action.reshape(self._centre.shape)
        return self.env.step(scaled.astype(self.actions.dtype))

    def _see(self, observation: Any) -> bool:
        """Keep what is observed; False, and nothing kept, when it holds NaN or infinity."""
        if self._plain:  # a copy: the environment may write its next observation into the same array
            state = np.array(observation, dtype=np.float32).reshape(-1)
        elif self._parts:  # what spaces.flatten does, in a fraction of its time
            state = np.concatenate([observation[key].ravel() for key in self._parts], dtype=np.float32)
        elif self._vector is not None:
            part = observation
            if self._images:
                part = {key: value for key, value in observation.items() if key not in self._images}
            state = np.asarray(spaces.flatten(self._vector, part), dtype=np.float32)
        else:
            state = self.state
        # The square is quick, but may overflow.
        if not math.isfinite(state.dot(state)) and not np.isfinite(state).all():
            return False
        self.state = state
        if self.build.pixels:
            image = self.env.render() if not self._images else _image_of(observation, self._images)
            self.pixels = np.array(image, dtype=np.uint8).transpose(2, 0, 1)
        return True

    def image_shape(self) -> tuple[int, ...] | None:
        """[3, H, W], None where rows carry no images."""
        if not self.build.pixels:
            return None
        if self.pixels is None:
            self.reset(0)
        assert self.pixels is not None
        return self.pixels.shape

    def contact(self) -> NDArray[np.float32]:
        """[C] flags in the order of `Build.contacts`."""
        found = np.zeros(len(self._contacts), np.float32)
        if len(self._contacts) and self._physics is not None:
            data = self._physics[1]
            one, other = data.contact.geom[: data.ncon].T
            for flag, (a, b) in enumerate(self._contacts):
                found[flag] = bool(((a[one] & b[other]) | (a[other] & b[one])).any())
        return found

    def snapshot(self) -> NDArray[np.float64]:
        """[S] everything that the future of this row depends on."""
        assert self.saver is not None
        head = np.array([_SNAPSHOT_VERSION, _number(self.id), self.steps], np.float64)
        return np.concatenate([head, self.state, self.saver.save()])

    def restore(self, snapshot: NDArray[np.float64]) -> None:
        """Go back to a snapshot of this id. Raises ValueError for one of another id or version."""
        assert self.saver is not None
        if snapshot[0] != _SNAPSHOT_VERSION or snapshot[1] != _number(self.id):
            raise ValueError(f"this snapshot is not one of '{self.id}'; restore it in a row that runs its task")
        if not self.reset_once:
            self.reset(0)
        self.steps = int(snapshot[2])
        self.saver.restore(snapshot[3 + self.state_size :])
        self.state = snapshot[3 : 3 + self.state_size].astype(np.float32)
        self._failures = self._warnings.tobytes()
        if self.build.pixels and not self._images:
            self.pixels = np.array(self.env.render(), dtype=np.uint8).transpose(2, 0, 1)


def _physics_errors() -> tuple[type[Exception], ...]:
    """What simulators raise when a state diverges, of the packages that are in use."""
    known = (("dm_control.rl.control", "PhysicsError"), ("mujoco", "FatalError"))
    return tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)


def _split(id: str, space: spaces.Space[Any]) -> tuple[list[str], spaces.Space[Any] | None]:
    """The keys of images in the observation ("" for the whole of it), and the space of everything else."""

    def image(s: spaces.Space[Any]) -> bool:
        return isinstance(s, spaces.Box) and s.dtype == np.uint8 and len(s.shape) == 3

    if image(space):
        return [""], None
    if isinstance(space, spaces.Dict):
        images = [key for key, part in space.items() if image(part)]
        rest = spaces.Dict({key: part for key, part in space.items() if key not in images})
        vector: spaces.Space[Any] | None = rest if len(rest) else None
    else:
        images, vector = [], space
    if vector is not None and not vector.is_np_flattenable:
        raise ValueError(f"'{id}' observes {space}, which has no fixed size; wrap it in one that has, and register it")
    return images, vector


def _image_of(observation: Any, images: list[str]) -> Any:
    return observation if images == [""] else observation[images[0]]


def _number(id: str) -> float:
    """52 bits of the id's hash, which a float64 holds exactly."""
    import hashlib

    return float(int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") >> 12)


# ------------------------------------------------------------------------------------------- MuJoCo and saving


def _mujoco_of(env: Any) -> tuple[Any, Any] | None:
    """MuJoCo's model and data behind an environment, or None."""
    mujoco = sys.modules.get("mujoco")
    if mujoco is None:
        return None
    raw = env.unwrapped
    physics = getattr(getattr(raw, "_env", None), "physics", None)  # dm_control behind shimmy
    for model, data in (
        (getattr(raw, "model", None), getattr(raw, "data", None)),
        (getattr(raw, "_model", None), getattr(raw, "_data", None)),
        (getattr(getattr(physics, "model", None), "ptr", None), getattr(getattr(physics, "data", None), "ptr", None)),
    ):
        if isinstance(model, mujoco.MjModel) and isinstance(data, mujoco.MjData):
            return model, data
    return None


def _contact_geoms(
    id: str, physics: tuple[Any, Any] | None, contacts: Mapping[str, tuple[Sequence[str], Sequence[str]]]
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Per flag, two masks over the model's geoms: those of the one side's bodies and of the other's."""
    if not contacts:
        return []
    if physics is None:
        raise ValueError(f"contacts were asked for, but '{id}' is no MuJoCo environment")
    model = physics[0]
    names = [model.body(i).name for i in range(model.nbody)]
    found = []
    for sides in contacts.values():
        masks = []
        for bodies in sides:
            for body in bodies:
                if body not in names:
                    raise unknown_name(f"MuJoCo body of '{id}'", body, names)
            masks.append(np.isin(model.geom_bodyid, [names.index(body) for body in bodies]))
        found.append((masks[0], masks[1]))
    return found


class _Saver:
    """The state of an environment as float64 numbers: MuJoCo's, numeric Python attributes, the random generator.

    Only for environments whose whole state is known to lie there: those on MuJoCo, and Gymnasium's classic control.
    """

    def __init__(self, id: str, env: Any, physics: tuple[Any, Any] | None) -> None:
        raw = env.unwrapped
        if physics is None and not type(raw).__module__.startswith("gymnasium.envs.classic_control"):
            raise ValueError(
                f"the state of '{id}' cannot be saved: that works for MuJoCo environments and Gymnasium's classic "
                "control only. Make it with snapshots=False"
            )
        self._raw, self._physics = raw, physics
        self._owners = [raw]
        # gymnasium-robotics' mazes are an environment in an environment, and so is dm_control in shimmy.
        inner = [getattr(raw, "point_env", None), getattr(raw, "_env", None)]
        inner.append(getattr(inner[1], "task", None))
        self._owners += [owner for owner in inner if owner is not None]
        self._schema = [(owner, name, kind) for owner in self._owners for name, kind in self._attributes(owner)]

    def _attributes(self, owner: Any) -> list[tuple[str, str]]:
        live: list[NDArray[Any]] = []
        if self._physics is not None:
            for source in self._physics:
                names = (name for name in dir(source) if not name.startswith("_"))
                values = (getattr(source, name) for name in names if name not in ("bind", "contact"))
                live += [value for value in values if isinstance(value, np.ndarray)]
        found = []
        for name, value in sorted(vars(owner).items()):
            if value is None or isinstance(value, bool | int | float | np.bool_ | np.number):
                if value is None or np.isfinite(value):
                    found.append((name, "scalar"))
            elif isinstance(value, tuple) and value and all(isinstance(x, float | np.floating) for x in value):
                found.append((name, "tuple"))
            elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size <= _LARGEST_ATTRIBUTE:
                if not any(np.may_share_memory(value, other) for other in live):
                    found.append((name, "array"))
        return found

    def _arrays(self) -> list[NDArray[Any]]:
        """What a reset may move in the model."""
        if self._physics is None:
            return []
        model = self._physics[0]
        return [model.body_pos, model.body_quat, model.site_pos, model.geom_pos]

    def save(self) -> NDArray[np.float64]:
        parts: list[Any] = []
        if self._physics is not None:
            import mujoco

            model, data = self._physics
            state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
            mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
            parts.append(state)
            parts += [array.ravel() for array in self._arrays()]
        for owner, name, kind in self._schema:
            value = getattr(owner, name)
            if kind == "scalar":
                parts.append((0.0, 0.0) if value is None else (1.0, float(value)))
            else:
                parts.append(np.asarray(value, np.float64).ravel())
        parts.append(_save_generator(self._raw.np_random))
        return np.concatenate([np.asarray(part, np.float64) for part in parts])

    def restore(self, numbers: NDArray[np.float64]) -> None:
        at = 0

        def take(size: int) -> NDArray[np.float64]:
            nonlocal at
            at += size
            return numbers[at - size : at]

        state = None
        if self._physics is not None:
            import mujoco

            model, data = self._physics
            state = take(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)).copy()
            for array in self._arrays():
                array[...] = take(array.size).reshape(array.shape)
        for owner, name, kind in self._schema:
            now = getattr(owner, name)
            if kind == "scalar":
                known, number = take(2)
                kept = int if isinstance(now, int) and not isinstance(now, bool) else type(now)
                value: Any = None if not known else (float(number) if now is None else kept(number))
            elif kind == "tuple":
                value = tuple(take(len(now)).tolist())
            else:
                value = take(now.size).reshape(now.shape).astype(now.dtype)
            setattr(owner, name, value)
        _restore_generator(self._raw.np_random, numbers[at:])
        if self._physics is not None and state is not None:
            # Twice: the forward pass replaces the solver's warm start.
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_forward(model, data)
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)


def _save_generator(generator: Any) -> list[float]:
    """NumPy's generator (PCG64) in 32-bit pieces, which a float64 holds exactly; or the older one (MT19937)."""
    if isinstance(generator, np.random.RandomState):
        _, keys, *rest = generator.get_state()
        return [*map(float, keys), *map(float, rest)]
    inner = generator.bit_generator.state
    whole = [(inner["state"]["state"] >> 32 * i) & 0xFFFFFFFF for i in range(4)]
    whole += [(inner["state"]["inc"] >> 32 * i) & 0xFFFFFFFF for i in range(4)]
    return [float(piece) for piece in (*whole, inner["has_uint32"], inner["uinteger"])]


def _restore_generator(generator: Any, numbers: NDArray[np.float64]) -> None:
    if isinstance(generator, np.random.RandomState):
        keys, (position, has_gauss, gauss) = numbers[:-3].astype(np.uint32), numbers[-3:]
        generator.set_state(("MT19937", keys, int(position), int(has_gauss), float(gauss)))
        return
    pieces = [int(number) for number in numbers]
    state, inc = (sum(piece << 32 * i for i, piece in enumerate(pieces[at : at + 4])) for at in (0, 4))
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": inc},
        "has_uint32": pieces[8],
        "uinteger": pieces[9],
    }


# -------------------------------------------------------------------------------------- arrays and processes


@dataclass(frozen=True)
class Arrays:
    """Name -> (shape, dtype) of the arrays that rows are read from and written to."""

    entries: Mapping[str, tuple[tuple[int, ...], str]]

    @staticmethod
    def of(row: Row, count: int) -> Arrays:
        """The arrays for `count` rows like `row`."""
        flags = {name: ((count, 1), "?") for name in ("terminated", "truncated", "success", "failed")}
        entries: dict[str, tuple[tuple[int, ...], str]] = {
            "state": ((count, row.state_size), "f4"),
            "action": ((count, row.action_size), "f4"),
            "contact": ((count, len(row.build.contacts)), "f4"),
            "reward": ((count, 1), "f4"),
            "seed": ((count,), "i8"),
            "chosen": ((count,), "?"),
            **flags,
        }
        image = row.image_shape()
        if image is not None:
            entries["pixels"] = ((count, *image), "u1")
        if row.saver is not None:
            entries["snapshot"] = ((count, row.snapshot().size), "f8")
        return Arrays(entries)

    def _size(self, name: str) -> int:
        shape, dtype = self.entries[name]
        return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64  # cache lines of their own

    @property
    def bytes(self) -> int:
        """Of all arrays together."""
        return sum(self._size(name) for name in self.entries)

    def views(self, memory: Any) -> dict[str, NDArray[Any]]:
        """The arrays in `memory`, a buffer of `bytes` bytes."""
        found, at = {}, 0
        for name, (shape, dtype) in self.entries.items():
            count = int(np.prod(shape))
            found[name] = np.frombuffer(memory, dtype=dtype, count=count, offset=at).reshape(shape)
            at += self._size(name)
        return found


class Group:
    """Some rows of the batch, stepped one after another in this process."""

    def __init__(self, build: Build, rows: range, views: Mapping[str, NDArray[Any]], first: Row | None = None) -> None:
        self.rows, self.views = rows, views
        self.members = [first if first and not i else Row(build, build.ids[row]) for i, row in enumerate(rows)]

    def run(self, command: str) -> None:
        """`command` in every chosen row: "step", "reset" to its seed, or "restore" its snapshot."""
        views = self.views
        chosen, states, pixels, snapshots = views["chosen"], views["state"], views.get("pixels"), views.get("snapshot")
        contacts = views["contact"] if views["contact"].shape[1] else None
        outcomes = [views[name] for name in ("reward", "terminated", "truncated", "success", "failed")]
        for number, row in zip(self.rows, self.members, strict=True):
            if not chosen[number]:
                continue
            failed = False
            if command == "step":
                outcome = row.step(views["action"][number])
                for array, value in zip(outcomes, outcome, strict=True):
                    array[number, 0] = value
                failed = outcome[-1]
            elif command == "restore":
                assert snapshots is not None
                row.restore(snapshots[number])
            elif not row.reset(int(views["seed"][number])):
                raise RuntimeError(f"'{row.id}' gave NaN at its reset to seed {views['seed'][number]}")
            states[number] = row.state
            if pixels is not None:
                pixels[number] = row.pixels
            if contacts is not None:
                contacts[number] = row.contact()
            if snapshots is not None and not failed:
                snapshots[number] = row.snapshot()

    def close(self) -> None:
        """Close every environment."""
        for row in self.members:
            row.env.close()


class WorkerDied(Exception):
    """A worker process is gone."""


_PROGRAM = "import sys; sys.path[:] = {path!r}; from wamrl.envs.gymnasium_rows import serve; serve({pipe}, {memory})"


class Worker:
    """A process that steps a group of rows in memory shared with this one (POSIX only).

    It is a program of its own rather than a child of `multiprocessing`: that one would import the caller's main module
    again, torch and all, and may not be used by a daemonic process. It ends when its pipe does, however that happens.
    """

    def __init__(self, build: Build, rows: range, layout: Arrays, memory: SharedMemory) -> None:
        self.rows = rows
        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = _PROGRAM.format(path=sys.path, pipe=theirs.fileno(), memory=memory.fd)
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=(theirs.fileno(), memory.fd),
                stdin=subprocess.DEVNULL,
            )
            self.pipe = Connection(ours.detach())
        self._ask(pickle.dumps((build, rows, layout)))

    def send(self, command: str) -> None:
        """Start a command; `wait` for it."""
        self._ask(command.encode())

    def _ask(self, message: bytes) -> None:
        try:
            self.pipe.send_bytes(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerDied from error

    def wait(self) -> None:
        """Until the command is done. Raises WorkerDied, or what the environment raised."""
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerDied from error
        if answer:
            raised, trace = pickle.loads(answer)  # from our own child
            raised.add_note(f"in a worker process:\n{trace}")
            raise raised

    def close(self) -> None:
        """End the process; may be called twice."""
        self.pipe.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __del__(self) -> None:
        """An environment that nobody closed leaves no process behind."""
        if hasattr(self, "pipe"):
            self.close()


class SharedMemory:
    """Bytes that worker processes see as well: a file without a name, mapped. It goes with the last who has it."""

    def __init__(self, size: int) -> None:
        self.fd, name = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        os.unlink(name)
        weakref.finalize(self, os.close, self.fd)
        os.truncate(self.fd, max(size, 1))
        self.buffer = mmap.mmap(self.fd, max(size, 1))


def serve(pipe_fd: int, memory_fd: int) -> None:
    """The program of a worker process: an empty answer says that a command is done, another one holds the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    pipe = Connection(pipe_fd)
    build, rows, layout = pickle.loads(pipe.recv_bytes())
    group: Group | None = None
    while True:
        try:
            if group is None:
                group = Group(build, rows, layout.views(mmap.mmap(memory_fd, max(layout.bytes, 1))))
            else:
                group.run(pipe.recv_bytes().decode())
            answer = b""
        except (EOFError, ConnectionResetError):
            break
        except Exception as error:
            try:
                answer = pickle.dumps((error, traceback.format_exc()))
                pickle.loads(answer)
            except Exception:  # an error that cannot travel
                answer = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc()))
        try:
            pipe.send_bytes(answer)
        except (BrokenPipeError, ConnectionResetError):
            break
        if group is None:
            return
    if group is not None:
        group.close()
