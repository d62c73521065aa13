"""Checkpoints: one safetensors file that holds a WAM's weights and everything needed to build and trust it.

Nothing in a checkpoint is ever executed: tensors come from safetensors, the rest is JSON in its header, and the
class to build must lie in `wamrl.models`. There is no pickle loader here. The SHA-256 over tensors and metadata
detects damage and careless edits; it is no signature, so take checkpoints from people you trust to train well.

Header entries, all JSON: format_version, model (`_target_` and plain sizes), spec, normalisation, config (the
resolved training config), provenance, storage, and content_sha256 over all of these and the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tensordict import TensorDict
from torch import Tensor

from wamrl.envs.layouts import unstated
from wamrl.files import write_tensors
from wamrl.interfaces import WAM, Anatomy, Layout, Policy, PolicyState, Spec, task_id
from wamrl.naming import near_checkpoints, unknown_name
from wamrl.provenance import versions

FORMAT_VERSION = 1
"""Written into every checkpoint; a file with a larger number needs a newer wamrl."""

SHIPPED = Path(__file__).parent / "checkpoints"
"""Where the checkpoints lie that come with the package."""

_ENTRIES = ("format_version", "model", "spec", "normalisation", "config", "provenance", "storage", "content_sha256")
_STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TARGET = re.compile(r"wamrl\.models(\.[A-Za-z]\w*)+")


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint; the message says why and what to do."""


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself.

    model: `_target_` and the plain values it is built with. normalisation: key -> {"mean": [...], "std": [...]} of
    the training data. config: the resolved training config. provenance: versions, data, seed, commit. storage: how
    the weight matrices are stored, {"dtype": "float16"}. content_sha256: of tensors and metadata.
    """

    format_version: int
    model: dict[str, Any]
    spec: Spec
    normalisation: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]
    storage: dict[str, str]
    content_sha256: str


def save(
    path: str | os.PathLike[str],
    model: WAM,
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    normalisation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write `model` to `path` (ending in .safetensors), whole or not at all.

    Args:
        path: the file to write.
        model: the WAM; `model.spec` is stored.
        config: the resolved training config; `config["wam"]` holds the model's `_target_` and all that its
            constructor needs, as plain values.
        provenance: where data and weights come from; versions of the libraries are added.
        normalisation: statistics of the training data, for readers; the model's buffers are what counts.
        dtype: how weight matrices are stored: "float32", or "float16" / "bfloat16" at half the size. Buffers and
            vectors stay as they are, and `load` gives float32 again.

    Raises:
        ValueError: weights that are not finite, a config without `wam._target_`, an unknown dtype.
        OSError: the file cannot be written; errno ENOSPC for a full disk.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a checkpoint's name must end in .safetensors, got '{path.name}'")
    if dtype not in _STORAGE:
        raise unknown_name("checkpoint dtype", dtype, _STORAGE)
    model_config = dict(config.get("wam") or {})
    target = model_config.get("_target_")
    if not isinstance(target, str):
        raise ValueError("config['wam'] must hold the model's '_target_' and sizes, so that `load` can build it again")
    own = f"{type(model).__module__}.{type(model).__qualname__}"
    if target.rsplit(".", 1)[-1] != type(model).__name__:
        raise ValueError(f"config['wam']['_target_'] is '{target}', but the model is a {own}")
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu")
        if name in matrices and tensor.is_floating_point():
            tensor = tensor.to(_STORAGE[dtype])
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"'{name}' holds NaN or infinity; such a model is not written ({path})")
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    entries = {
        "format_version": FORMAT_VERSION,
        "model": model_config,
        "spec": spec_to_dict(model.spec),
        "normalisation": _plain(normalisation or {}),
        "config": _plain(config),
        "provenance": {**_plain(provenance or {}), "versions": versions()},
        "storage": {"dtype": dtype},
    }
    # Keys keep their order: a model may lay out its features in the order of its observation keys.
    header = {key: json.dumps(value, allow_nan=False) for key, value in entries.items()}
    header["content_sha256"] = json.dumps(_content_hash(header, tensors))
    write_tensors(path, tensors, metadata=header)
    return path


def load(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    model_class: type[WAM] | str | None = None,
    policy: str | None = None,
) -> WAM:
    """The WAM of a checkpoint, in float32 and evaluation mode.

    Args:
        name: a file, a run directory, or a shipped name; see `resolve`.
        device: where the model goes.
        model_class: for a model outside wamrl, its class, or the dotted name to import it by. A checkpoint alone
            never decides what gets imported.
        policy: of a model with several ways to act, such as `wam=mot_uwm`, the one that it is to act by; None is the
            one that it was trained with.

    Raises:
        FileNotFoundError: no such checkpoint; the message names the nearest.
        ValueError: a policy that the model does not have.
        CheckpointError: truncated, tampered, pickled, of a newer format, for another class, or with tensors that
            do not fit the model.
    """
    path = resolve(name)
    header, tensors = _read(path)
    found = _metadata(path, header)
    if _content_hash({k: v for k, v in header.items() if k != "content_sha256"}, tensors) != found.content_sha256:
        raise CheckpointError(
            f"{path}: its content does not match its SHA-256, so it was damaged or edited after training; "
            "copy it again or make it again with `python -m wamrl.train`"
        )
    try:
        model = build(found.model, model_class=model_class)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # A model may do without weights that an earlier version of it had.
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(getattr(model, "former", ()))}
    misfit = "the model that it builds has another spec than the one it states"
    # A model may have learned to answer more since; what it stated then must still hold.
    stated = dataclasses.replace(model.spec, provides=model.spec.provides & found.spec.provides)
    if spec_to_dict(stated) == spec_to_dict(found.spec):
        misfit = _misfit(tensors, model.state_dict())
    if misfit:
        commit = (found.provenance.get("versions") or {}).get("commit")
        raise CheckpointError(
            f"{path}: {misfit}. The file is whole, so another version of this model wrote it"
            + (f", that of commit {commit}" if commit else "")
            + ": train it again with `python -m wamrl.train`, or read it with that version"
        )
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path}: '{broken[0]}' holds NaN or infinity")
    # load_state_dict copies into the model's own tensors, which turns half-precision storage into float32.
    model.load_state_dict(tensors)
    if policy is not None:
        if not hasattr(model, "policy_query"):
            raise ValueError(
                f"policy={policy}: {path} holds a {type(model).__name__}, which has one way to act; leave policy out"
            )
        model.policy_query = policy  # type: ignore[assignment]
    return model.to(device).eval()


def read_metadata(name: str | os.PathLike[str]) -> Metadata:
    """What the checkpoint says about itself, without building the model. Raises as `load` does."""
    path = resolve(name)
    header, _ = _read(path, tensors=False)
    return _metadata(path, header)


def build(config: Mapping[str, Any], *, seed: int = 0, model_class: type[WAM] | str | None = None) -> WAM:
    """A fresh model `_target_(**rest of config)`; its weights depend on `seed`, torch's global generator is untouched.

    model_class: as in `load`.

    Raises:
        CheckpointError: a target outside `wamrl.models`, one that does not exist, or sizes it does not take.
    """
    sizes = {str(key): value for key, value in config.items() if key != "_target_"}
    target = str(config.get("_target_", ""))
    if "_target_" in json.dumps(sizes):
        raise CheckpointError("the model's sizes must be plain values, but they hold a nested '_target_'")
    if model_class is None and not _TARGET.fullmatch(target):
        raise CheckpointError(
            f"its model is '{target}', but only classes of wamrl.models are built from a file. For a model of your "
            "own, name the class: wamrl.checkpoint.load(path, model_class=YourModel)"
        )
    if model_class is None or isinstance(model_class, str):
        model_class = _class_of(model_class or target)
    if model_class.__name__ != target.rsplit(".", 1)[-1]:
        raise CheckpointError(f"it holds a '{target}', but model_class is {model_class.__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return model_class(**sizes)
        except TypeError as error:
            raise CheckpointError(
                f"'{target}' cannot be built with {sorted(sizes)}: {error}. If that is a checkpoint's, another version "
                "of this model wrote it: train it again with `python -m wamrl.train`"
            ) from error


def resolve(name: str | os.PathLike[str]) -> Path:
    """The checkpoint file that `name` means: a file, a run directory, or a shipped name such as "six".

    Raises:
        FileNotFoundError: nothing of that name; the message lists the nearest in the same folder and the shipped.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for inside in (path / "checkpoints" / "model.safetensors", path / "model.safetensors"):
            if inside.is_file():
                return inside
        raise FileNotFoundError(
            f"'{path}' is a directory without checkpoints/model.safetensors; is the training run finished? "
            "Name a checkpoint file or the directory of a finished run"
        )
    shipped = {file.stem: file for file in SHIPPED.glob("*.safetensors")}
    if str(name) in shipped:
        return shipped[str(name)]
    known = [*near_checkpoints(str(name)), *shipped]
    raise FileNotFoundError(
        str(unknown_name("checkpoint", str(name), known, hint="Make one with `python -m wamrl.train`."))
    )


def check_compatible(
    spec: Spec,
    *,
    observation: Mapping[str, Sequence[int]],
    action_dim: int,
    tasks: Iterable[str],
    control_dt_s: float | None = None,
) -> None:
    """Raise ValueError when a model of this `spec` cannot act in such an environment.

    Args:
        spec: of the model.
        observation: key -> shape of one frame that the environment gives.
        action_dim: action dims that it takes.
        tasks: the task names that it runs.
        control_dt_s: seconds per control step, or None to leave it unchecked.
    """
    for key, shape in spec.observation.items():
        if key not in observation:
            raise ValueError(
                f"the checkpoint reads the observation '{key}', but the environment gives "
                f"{', '.join(sorted(observation)) or 'none'}" + ("; write env.pixels=true" if len(shape) == 3 else "")
            )
        if tuple(observation[key]) != tuple(shape):
            raise ValueError(
                f"the checkpoint was trained on '{key}' of shape {tuple(shape)}, but the environment gives "
                f"{tuple(observation[key])}; was it trained on another robot or task set?"
            )
    if action_dim != spec.action_dim:
        raise ValueError(
            f"the checkpoint acts with {spec.action_dim} dims per step, but the environment takes {action_dim}; "
            "was it trained on another robot?"
        )
    for task in tasks:
        if task not in spec.tasks:
            raise unknown_name(
                "task for this checkpoint", task, spec.tasks, hint="Train on this task or choose another checkpoint."
            )
    if control_dt_s is not None and abs(control_dt_s - spec.control_dt_s) > 1e-6 * spec.control_dt_s:
        raise ValueError(
            f"the checkpoint was trained at {spec.control_dt_s:g} s per control step, but the environment runs at "
            f"{control_dt_s:g} s; set the environment's action_repeat as in training"
        )


def check_environment(spec: Spec, env: Any) -> None:
    """`check_compatible` with what `env`, a TorchRL environment of rows, observes, takes and runs."""
    check_compatible(
        spec,
        observation={key: tuple(env.observation_spec[key].shape[1:]) for key in env.observation_spec.keys()},
        action_dim=env.action_spec.shape[-1],
        tasks=env.tasks,
        control_dt_s=env.control_dt_s,
    )


class LoadedPolicy:
    """A loaded WAM that acts on plain observations: what `wamrl.load` gives.

    model: the WAM. policy: the Policy that evaluation takes. State between calls is kept inside, for users who
    act in one environment; `reset()` starts a new episode.
    """

    def __init__(self, model: WAM, policy: Policy) -> None:
        self.model = model
        self.policy = policy
        self._state: PolicyState | None = None

    @property
    def spec(self) -> Spec:
        """What the model was trained for."""
        return self.model.spec

    def reset(self) -> None:
        """Forget what was carried from earlier calls: the next `act` starts an episode."""
        self._state = None

    def act(self, observation: Mapping[str, Any]) -> np.ndarray | Tensor:
        """Actions in [-1, 1] for one observation or a batch of them.

        Args:
            observation: the spec's keys as arrays or tensors, each with or without a batch dimension, and `task`: a
                name, a `task_id`, or one per row. A model of a single task needs no `task`.

        Returns:
            [A], or [B, A] for batched observations; NumPy when the observation is, otherwise a tensor.

        Raises:
            ValueError: no dict, a missing key, a wrong shape, an unknown task, NaN or infinity.
        """
        frame, batched, as_numpy = self._frame(observation)
        rows = frame.batch_size[0]
        is_init = torch.zeros(rows, dtype=torch.bool, device=frame.device)
        if self._state is None or self._state.batch_size[0] != rows:
            self._state = self.policy.initial_state(rows)
            is_init = ~is_init
        with torch.no_grad():
            action, self._state = self.policy.act(frame, self._state, is_init)
        action = action if batched else action[0]
        return action.cpu().numpy() if as_numpy else action

    def _frame(self, observation: Mapping[str, Any]) -> tuple[TensorDict, bool, bool]:
        if not isinstance(observation, Mapping):
            raise ValueError(
                f"observation is a {type(observation).__name__}, expected a dict of arrays with "
                f"{', '.join(self.spec.observation)} and 'task'"
            )
        device = next(self.model.parameters()).device
        tensors: dict[str, Tensor] = {}
        batched: bool | None = None
        as_numpy = True
        for key, shape in self.spec.observation.items():
            if key not in observation.keys():
                raise ValueError(
                    f"the observation lacks '{key}'; this model reads {', '.join(self.spec.observation)} and 'task'"
                )
            value = observation[key]
            as_numpy = as_numpy and not isinstance(value, Tensor)
            tensor = torch.as_tensor(value)
            tensor = tensor.to(device) if tensor.dtype == torch.uint8 else tensor.to(device, torch.float32)
            has_batch = tensor.ndim == len(shape) + 1
            if tuple(tensor.shape[int(has_batch) :]) != tuple(shape):
                raise ValueError(
                    f"'{key}' has shape {tuple(tensor.shape)}, expected {tuple(shape)} or [B, ...] of that; "
                    "was the model trained on another robot?"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"'{key}' holds NaN or infinity; no action is chosen from it, check the sensors")
            if batched is not None and has_batch != batched:
                raise ValueError("some observation keys have a batch dimension and others have not")
            batched = has_batch
            tensors[key] = tensor if has_batch else tensor[None]
        sizes = {len(tensor) for tensor in tensors.values()}
        if len(sizes) != 1:
            raise ValueError(f"the observation keys have batches of different sizes: {sorted(sizes)}")
        rows = sizes.pop()
        tensors["task"] = self._tasks(observation.get("task"), rows).to(device)
        return TensorDict(tensors, batch_size=[rows], device=device), bool(batched), as_numpy

    def _tasks(self, task: Any, rows: int) -> Tensor:
        known = {task_id(name): name for name in self.spec.tasks}
        if task is None:
            if len(self.spec.tasks) != 1:
                raise ValueError(
                    "the observation lacks 'task', and this model knows several: " + ", ".join(self.spec.tasks)
                )
            task = self.spec.tasks[0]
        if isinstance(task, str):
            task = [task]
        if not isinstance(task, Tensor):
            task = np.asarray(task).reshape(-1).tolist()
            for name in task:
                if isinstance(name, str) and name not in self.spec.tasks:
                    raise unknown_name("task for this model", name, self.spec.tasks)
            task = torch.tensor([task_id(item) if isinstance(item, str) else int(item) for item in task])
        task = task.reshape(-1).to(torch.int64)
        for number in set(task.tolist()) - set(known):
            raise ValueError(f"task id {number} is none of this model's tasks: {', '.join(self.spec.tasks)}")
        if len(task) not in (1, rows):
            raise ValueError(f"{len(task)} tasks for {rows} observations; give one, or one per row")
        return task.expand(rows) if len(task) == 1 else task


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """A spec as plain JSON values; `spec_from_dict` undoes it."""
    plain = dataclasses.asdict(dataclasses.replace(spec, observation=dict(spec.observation)))
    plain["observation"] = {key: list(shape) for key, shape in spec.observation.items()}
    plain["provides"] = sorted(spec.provides)
    plain["tasks"] = list(spec.tasks)
    plain["layout"] = spec.layout.to_dict()
    return plain


def spec_from_dict(plain: Mapping[str, Any]) -> Spec:
    """The spec of `spec_to_dict`. Raises CheckpointError when fields are missing or unknown."""
    try:
        fields = dict(plain)
        fields["observation"] = {key: tuple(shape) for key, shape in fields["observation"].items()}
        fields["anatomy"] = Anatomy(**fields["anatomy"])
        fields["provides"] = frozenset(fields["provides"])
        fields["tasks"] = tuple(fields["tasks"])
        fields["layout"] = Layout.of(fields.get("layout"), fields["observation"])
        return Spec(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its spec is not one that this wamrl knows: {error}") from error


def _class_of(target: str) -> type[WAM]:
    module_name, _, class_name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the model '{target}' cannot be imported ({error}); is the checkpoint newer?") from error
    if not (isinstance(found, type) and issubclass(found, WAM)):
        raise CheckpointError(f"'{target}' is not a World Action Model: no subclass of wamrl.interfaces.WAM")
    return found


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file is eight bytes of length and then JSON, so its ninth byte is always "{".
    if head[8:9] != b"{" and (head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in (b"\x02\x03\x04\x05"))):
        raise CheckpointError(
            f"{path} is a pickle or a zip of pickles (.pt, .pth, .zip), which can run any code when it is read. "
            "wamrl has no loader for such checkpoints, only for the safetensors files of `python -m wamrl.train`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()} if tensors else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes: {error}); "
            "it was truncated or is something else. Copy it again"
        ) from error


def _metadata(path: Path, header: Mapping[str, str]) -> Metadata:
    if "format_version" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of wamrl: it has no format_version")
    try:
        version = json.loads(header["format_version"])
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(f"{path}: format_version is {version!r}, expected a number from 1")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version}, newer than the {FORMAT_VERSION} that this wamrl reads; upgrade wamrl"
            )
        if set(header) != set(_ENTRIES):
            wrong = ", ".join(sorted(set(header) ^ set(_ENTRIES)))
            raise CheckpointError(f"{path}: its metadata lacks or adds: {wrong}; it was edited after training")
        entries = {key: json.loads(value) for key, value in header.items()}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {error}") from error
    for key in ("model", "spec", "normalisation", "config", "provenance", "storage"):
        if not isinstance(entries[key], dict):
            raise CheckpointError(f"{path}: '{key}' in its metadata is damaged")
    try:
        spec = spec_from_dict(entries["spec"])
        if "layout" not in entries["spec"] and _TARGET.fullmatch(str(entries["model"].get("_target_"))):
            # Earlier files do not state it; our models then knew Meta-World's by the size of its state.
            spec = dataclasses.replace(spec, layout=unstated(spec.tasks, spec.observation))
            entries["model"]["layout"] = spec.layout.to_dict()
        return Metadata(**{**entries, "spec": spec})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Why the tensors do not fit the model; empty when they do."""
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        parts = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("adds", unexpected)) if names]
        return f"its tensors do not fit the model: it {' and '.join(parts)}"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            return f"'{name}' has shape {tuple(tensor.shape)}, the model takes {tuple(expected[name].shape)}"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _content_hash(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(header):
        digest.update(f"{key}\0{header[key]}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"metadata takes plain values, got a {type(value).__name__}")
