"""Episodes on disk and batches for training.

A dataset is a directory: `dataset.json` (what was planned, from which start states, by which versions) and
`episodes/<name>/`, one memory-mapped TensorDict and one `episode.json` each. An episode directory is written under a
hidden name and renamed when whole, so a kill at any moment leaves whole episodes only; leftovers are dropped with a
message when the dataset is opened.

For training, the frames of all episodes are joined into one tensor per key in memory, and a batch is one gather by
random window starts. The only state of that sampler is the `torch.Generator` handed to it, so storing the
generator's state makes a resumed run see the same batches. `EpisodeDataset.replay_buffer` gives the same steps as a
TorchRL replay buffer to whoever wants TorchRL's samplers.

Letters: B windows, T steps of a window, A action dims. An episode of T steps has T + 1 observations.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.envs.layouts import unstated
from wamrl.files import atomic_path, write_json
from wamrl.interfaces import Layout, task_id
from wamrl.models.images import ImageSubstrate, check_image_shape
from wamrl.naming import unknown_name

FORMAT_VERSION = 1
INDEX = "dataset.json"
LATENTS = "latents"
"""The folder of a dataset that holds tokens of its images, one subfolder per tokenizer."""
STEP_KEYS = ("action", "label", "label_available", "reward", "success", "terminated", "truncated")
"""What an episode stores per step, beside `observation` and `snapshot` per frame."""

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STD_FLOOR = 1e-3


# ---------------------------------------------------------------------------------------------------- on disk


def episode_tensordict(
    observation: Mapping[str, Tensor],
    *,
    action: Tensor,
    reward: Tensor,
    success: Tensor,
    label: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    snapshot: Tensor | None = None,
) -> TensorDict:
    """One episode, checked, in the form that `EpisodeWriter.write` stores.

    Args:
        observation: per key [T+1, ...].
        action: [T, A] executed.
        reward: [T] per step.
        success: [T] the task's flag after each step.
        label: [T, A] the expert's clean action at each step, or None when nobody gave one.
        terminated: [T], or None for never.
        truncated: [T], or None for never.
        snapshot: [T+1, S] full simulator states, or None.

    Raises:
        ValueError: for lengths that do not agree, NaN or infinity, or an episode without steps.
    """
    steps = len(action)
    if steps == 0:
        raise ValueError("an episode needs at least one step, but action has none")
    frames = {f"observation.{key}": value for key, value in observation.items()}
    if snapshot is not None:
        frames["snapshot"] = snapshot
    per_step = {
        "action": action,
        "label": torch.zeros_like(action) if label is None else label,
        "label_available": torch.full((steps,), label is not None),
        "reward": reward,
        "success": success.bool(),
        "terminated": torch.zeros(steps, dtype=torch.bool) if terminated is None else terminated.bool(),
        "truncated": torch.zeros(steps, dtype=torch.bool) if truncated is None else truncated.bool(),
    }
    for want, entries in ((steps + 1, frames), (steps, per_step)):
        for key, value in entries.items():
            if len(value) != want:
                raise ValueError(f"'{key}' has {len(value)} entries, but an episode of {steps} actions needs {want}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"'{key}' holds NaN or infinity; an episode has to be finite to be stored")
    for key in ("reward", "success", "terminated", "truncated"):
        if per_step[key].ndim != 1:
            raise ValueError(f"'{key}' has shape {tuple(per_step[key].shape)}, but one number per step is expected")
    episode = TensorDict({"observation": TensorDict(dict(observation), batch_size=[]), **per_step}, batch_size=[])
    if snapshot is not None:
        episode["snapshot"] = snapshot
    return episode


class EpisodeWriter:
    """Adds whole episodes to a dataset directory; several processes may write different episodes of one.

    Args:
        path: the directory; made when absent.
        index: the content of `dataset.json`: at least `tasks`, `split`, `label_behaviours`, `env`, `provenance`.
            When the directory holds a dataset already, `index["plan"]` has to equal its plan.

    Raises:
        ValueError: when the directory holds another dataset, or something else.
    """

    def __init__(self, path: str | os.PathLike[str], index: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.episodes = self.path / "episodes"
        if (self.path / INDEX).exists():
            stored = read_index(self.path)
            theirs, ours = stored.get("plan"), json.loads(json.dumps(index.get("plan")))
            if theirs != ours:
                differing = sorted(
                    key for key in {*(theirs or {}), *(ours or {})} if (theirs or {}).get(key) != (ours or {}).get(key)
                )
                raise ValueError(
                    f"{self.path} holds a dataset collected with other settings ({', '.join(differing)} differ); "
                    "choose another directory, or the same settings to go on with it"
                )
        # A kill while the index was written leaves a hidden file.
        elif self.path.exists() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no dataset; choose a new directory")
        else:
            write_json(self.path / INDEX, {"format_version": FORMAT_VERSION, **index})
        self.episodes.mkdir(exist_ok=True)

    def names(self) -> set[str]:
        """The episodes that are whole."""
        return {path.name for path in _whole_episodes(self.path, quiet=True)}

    def remove_leftovers(self) -> int:
        """Delete half-written episodes; only call it when no other process is writing here. Returns how many."""
        whole = self.names()
        left = [path for path in self.episodes.iterdir() if path.is_dir() and path.name not in whole]
        for path in left:
            shutil.rmtree(path)
        return len(left)

    def write(self, name: str, episode: TensorDict, info: Mapping[str, Any]) -> Path:
        """Store an episode of `episode_tensordict` with plain-value `info` (at least `task` and `behaviour`)."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{name}' is no episode name; use letters, digits, '.', '_' and '-'")
        for key in ("task", "behaviour"):
            if key not in info:
                raise ValueError(f"info lacks '{key}', which every episode needs")
        final, temporary = self.episodes / name, self.episodes / f".{name}.{os.getpid()}"
        if final.exists():
            raise FileExistsError(f"episode {final} exists already")
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            episode.memmap(str(temporary), copy_existing=True)
            success = episode["success"]
            facts = {
                "steps": len(success),
                "success": bool(success.any()),
                "first_success": int(success.float().argmax()) if bool(success.any()) else None,
                "return": float(episode["reward"].sum()),
            }
            sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in temporary.rglob("*.memmap")}
            text = json.dumps({**info, **facts, "bytes": dict(sorted(sizes.items()))}, indent=2, allow_nan=False)
            # Plainly: nothing reads this directory before it is renamed.
            (temporary / "episode.json").write_text(text + "\n", encoding="utf-8")
            temporary.rename(final)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        return final


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a dataset's `dataset.json`.

    Raises:
        FileNotFoundError: when there is no dataset at `path`.
        ValueError: when it is of a newer format or damaged.
    """
    file = Path(path) / INDEX
    if not file.exists():
        raise FileNotFoundError(f"no dataset at {path}: it holds no {INDEX}. Make one with: python -m wamrl.collect")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, but this wamrl reads up to {FORMAT_VERSION}; update wamrl")
    return index


def _whole_episodes(path: Path, *, quiet: bool = False) -> list[Path]:
    folder = path / "episodes"
    found: list[Path] = []
    dropped: list[Path] = []
    for entry in sorted(folder.iterdir()) if folder.exists() else []:
        if not entry.is_dir():
            continue
        whole = not entry.name.startswith(".") and (entry / "episode.json").exists() and (entry / "meta.json").exists()
        (found if whole else dropped).append(entry)
    if dropped and not quiet:
        _log.warning(
            "%s: dropped %d half-written episode(s), %s", path, len(dropped), ", ".join(p.name for p in dropped[:3])
        )
    return found


def load_episode(path: str | os.PathLike[str]) -> tuple[TensorDict, dict[str, Any]]:
    """One stored episode (memory-mapped, read-only by convention, snapshots included) and its information.

    Raises:
        ValueError: when files are missing or shorter than they should be, or hold a pickle, which is never executed.
    """
    path = Path(path)
    try:
        info = json.loads((path / "episode.json").read_text(encoding="utf-8"))
        # First, because mapping a file that is too short fills it up with zeros.
        for name, size in info.pop("bytes").items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} has {(path / name).stat().st_size} bytes instead of {size}")
        episode = TensorDict.load_memmap(str(path), allow_pickle=False)
    except Exception as error:  # torch, tensordict and json each have errors of their own here
        raise ValueError(f"episode {path} is damaged: {type(error).__name__}: {error}") from error
    missing = [key for key in ("observation", *STEP_KEYS) if key not in episode.keys()]
    if missing:
        raise ValueError(f"episode {path} is damaged: it lacks {', '.join(missing)}")
    return episode, info


# -------------------------------------------------------------------------------------------------- in memory


class EpisodeDataset:
    """Episodes in memory, ready to be sampled in windows. Made by `open` or `from_episodes`.

    episodes: one dict per episode: `task`, `behaviour`, `steps`, `success`, `split`, and what the collector recorded.
    tasks: names that occur. observation: shape of one frame per key. layout: where its vectors hold what. indices: the
    `dataset.json` of each source.
    """

    def __init__(
        self,
        frames: TensorDict,
        offsets: Tensor,
        lengths: Tensor,
        episodes: Sequence[Mapping[str, Any]],
        indices: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.frames, self.offsets, self.lengths = frames, offsets, lengths
        self.episodes, self.indices = [dict(episode) for episode in episodes], [dict(index) for index in indices]
        if len(lengths) == 0:
            raise ValueError("the dataset holds no episodes")
        self.tasks = tuple(sorted({episode["task"] for episode in self.episodes}))
        self.observation = {key: tuple(value.shape[1:]) for key, value in frames["observation"].items()}
        self.layout = _common_layout(self.indices, self.tasks, self.observation)
        self.action_dim = frames["action"].shape[-1]
        self._task = torch.tensor([task_id(episode["task"]) for episode in self.episodes])
        self._success = torch.tensor([bool(episode["success"]) for episode in self.episodes])
        self._imitate = torch.tensor([bool(e["success"]) and e["behaviour"] == "policy" for e in self.episodes])
        # Window starts are numbered over all steps; the episode of a start is found by bisection.
        self._ends = lengths.cumsum(0)
        held_out = sorted({str(episode.get("split")) for episode in self.episodes} - {"train"})
        self._held_out = f"{', '.join(held_out)} start states" if held_out else ""

    def __len__(self) -> int:
        return len(self.episodes)

    def __repr__(self) -> str:
        return f"EpisodeDataset({len(self)} episodes, {self.num_steps} steps, tasks {', '.join(self.tasks)})"

    @property
    def num_steps(self) -> int:
        """Steps of all episodes together: the number of windows that `sample` draws from."""
        return int(self._ends[-1])

    @staticmethod
    def open(
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        keys: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        observation: Mapping[str, Sequence[int]] | None = None,
        action_dim: int | None = None,
        behaviours: Sequence[str] | None = None,
        label_behaviours: Sequence[str] | None = None,
        training: bool = True,
    ) -> EpisodeDataset:
        """Read one dataset or several into memory as one.

        Args:
            paths: dataset directories.
            keys: observation keys to read; None reads all that every episode has.
            tasks: tasks to keep; an error if one of them has no episode. None keeps all.
            observation: key -> shape that the data must have, as in a model's `Spec`.
            action_dim: action dims that the data must have.
            behaviours: keep only episodes of these behaviours.
            label_behaviours: on whose episodes labels count; None is what each dataset says of itself.
            training: refuse datasets collected from dev or test start states. Give False to evaluate on them.

        Raises:
            FileNotFoundError: when a path holds no dataset.
            ValueError: for an empty dataset, one of other tasks or sizes, one that holds NaN, or held-out starts.
        """
        paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not paths:
            raise ValueError("no dataset was named; give at least one directory made by python -m wamrl.collect")
        if keys is not None and not keys:
            raise ValueError("no observation key was named; give at least one, such as [state], or null for all")
        loaded: list[tuple[TensorDict, dict[str, Any]]] = []
        indices = []
        for path in map(Path, paths):
            index = read_index(path)
            indices.append({**index, "path": str(path)})
            if training and index["split"] != "train":
                raise ValueError(
                    f"{path} was collected from {index['split']} start states, which are kept for evaluation; "
                    "train on a dataset collected with split=train"
                )
            whole = _whole_episodes(path)
            if not whole:
                raise ValueError(f"{path} holds no whole episode; collect some with: python -m wamrl.collect")
            labelled = index["label_behaviours"] if label_behaviours is None else label_behaviours
            for folder in whole:
                episode, info = load_episode(folder)
                if behaviours is not None and info["behaviour"] not in behaviours:
                    continue
                if tasks is not None and info["task"] not in tasks:
                    continue
                valid = episode["label_available"] & _labels_count(info, labelled)
                # What training needs, copied out of the memory maps.
                wanted = keys if keys is not None else list(episode["observation"].keys())
                absent = [key for key in wanted if key not in episode["observation"].keys()]
                if absent:
                    raise unknown_name("observation key", absent[0], episode["observation"].keys())
                entries = {key: episode[key].clone() for key in STEP_KEYS if key != "label_available"}
                entries["observation"] = episode["observation"].select(*wanted).clone()
                entries["label_valid"] = valid.clone()
                loaded.append(
                    (TensorDict(entries, batch_size=[]), {**info, "split": index["split"], "path": str(folder)})
                )
        if tasks is not None:
            for task in tasks:
                if not any(info["task"] == task for _, info in loaded):
                    held = sorted({held for index in indices for held in index["tasks"]})
                    raise ValueError(
                        f"no episode of task '{task}' in {', '.join(map(str, paths))}; the data holds {', '.join(held)}"
                    )
        if not loaded:
            raise ValueError(f"{', '.join(map(str, paths))}: no episode of behaviours {list(behaviours or [])}")
        dataset = EpisodeDataset.from_episodes([td for td, _ in loaded], [info for _, info in loaded], indices)
        _check_same_env(indices)
        dataset.check(observation=observation, action_dim=action_dim)
        return dataset

    @staticmethod
    def from_episodes(
        episodes: Sequence[TensorDict], infos: Sequence[Mapping[str, Any]], indices: Sequence[Mapping[str, Any]] = ()
    ) -> EpisodeDataset:
        """Join episodes of `episode_tensordict` (or read from disk) with their information."""
        if not episodes:
            raise ValueError("the dataset holds no episodes")
        shapes: dict[str, tuple[int, ...]] = {}
        for episode, info in zip(episodes, infos, strict=True):
            where = info.get("path", info["task"])
            mine = {key: tuple(value.shape[1:]) for key, value in episode["observation"].items()}
            mine["action"] = tuple(episode["action"].shape[1:])
            if shapes and mine != shapes:
                raise ValueError(f"episode {where} has sizes {mine}, but the episodes before it have {shapes}")
            shapes = mine
            for key, value in episode.items(include_nested=True, leaves_only=True):
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise ValueError(f"episode {where} holds NaN or infinity in '{key}'; delete it or collect it again")

        def joined(key: str, *, pad: bool) -> Tensor:
            # Steps get one row of zeros at the end of each episode, so that step and frame indices agree.
            parts = []
            for episode in episodes:
                value = episode["label_available" if key == "label_valid" and key not in episode.keys() else key]
                parts.append(value)
                if pad:
                    parts.append(torch.zeros_like(value[:1]))
            return torch.cat(parts)

        lengths = torch.tensor([len(episode["action"]) for episode in episodes])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + 1).cumsum(0)[:-1]])
        frames: dict[str, Any] = {
            key: joined(key, pad=True)
            for key in ("action", "label", "label_valid", "reward", "success", "terminated", "truncated")
        }
        frames["observation"] = TensorDict(
            {
                key: torch.cat([episode["observation", key] for episode in episodes])
                for key in shapes
                if key != "action"
            },
            batch_size=[],
        )
        frames["steps_to_success"] = torch.cat([_steps_to_success(episode["success"]) for episode in episodes])
        return EpisodeDataset(TensorDict(frames, batch_size=[]), offsets, lengths, infos, indices)

    def check(self, *, observation: Mapping[str, Sequence[int]] | None = None, action_dim: int | None = None) -> None:
        """Raise ValueError unless the data has these observation sizes and action size, as in a model's `Spec`."""
        if action_dim is not None and action_dim != self.action_dim:
            raise ValueError(f"the data has {self.action_dim} action dims, but the model takes {action_dim}")
        for key, shape in (observation or {}).items():
            if key not in self.observation:
                raise ValueError(f"the data lacks the observation key '{key}'; it has {', '.join(self.observation)}")
            if tuple(shape) != self.observation[key]:
                raise ValueError(
                    f"'{key}' has shape {self.observation[key]} in the data, but {tuple(shape)} is expected"
                )

    # -- batches

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> TensorDict:
        """`batch_size` windows of `length` steps, each starting at a step drawn uniformly from all episodes.

        Returns the batch contract of `WAM.loss`, batch [B]: `observation` nested [B, T+1, ...]; `action` [B, T, A]
        executed; `label` [B, T, A] and `label_valid` [B, T]; `reward`, `success`, `terminated`, `valid` [B, T]
        (`valid` is False past the episode's end, where the last frame repeats and the rest is zero);
        `steps_to_success` [B, T+1], control steps until the first success at or after a frame, 0 from the first
        success on, inf in an episode without one; `task`, `episode_success`, `step` (of the window's start) [B];
        `imitate` [B], a successful episode of a model's own policy or planner: its actions are worth imitating,
        those of a noisy expert or of luck are not.

        Raises:
            ValueError: when the data was collected from dev or test start states.
        """
        if self._held_out:
            raise ValueError(
                f"this dataset holds {self._held_out}, which are kept for evaluation; training may only sample data "
                "collected with split=train"
            )
        drawn = torch.randint(self.num_steps, (batch_size,), generator=generator)
        episode = torch.bucketize(drawn, self._ends, right=True)
        return self._windows_at(episode, drawn - (self._ends - self.lengths)[episode], length)

    def windows(
        self, length: int, *, batch_size: int = 256, stride: int | None = None, whole: bool = False
    ) -> Iterator[TensorDict]:
        """All windows in order, in batches of the form of `sample`; for validation, so any split will do.

        Args:
            length: steps T.
            batch_size: windows per batch; the last one may be smaller.
            stride: steps between starts; None is `length`.
            whole: leave out windows that reach past an episode's end.
        """
        stride = length if stride is None else stride
        _, episode, step = self._where()
        chosen = (step % stride == 0) & (step + (length if whole else 1) <= self.lengths[episode])
        episode, step = episode[chosen], step[chosen]
        for first in range(0, len(step), batch_size):
            batch = slice(first, first + batch_size)
            yield self._windows_at(episode[batch], step[batch], length)

    def _windows_at(self, episode: Tensor, step: Tensor, length: int) -> TensorDict:
        if length < 1:
            raise ValueError(f"length is {length}, but a window has at least 1 step")
        rows = len(step)
        last = self.lengths[episode]
        time = step[:, None] + torch.arange(length + 1)
        at = (self.offsets[episode][:, None] + torch.minimum(time, last[:, None])).reshape(-1)
        at_step = at.view(rows, length + 1)[:, :-1].reshape(-1)
        frames = self.frames

        def gather(value: Tensor, index: Tensor) -> Tensor:
            return value.index_select(0, index).view(rows, -1, *value.shape[1:])

        observation = TensorDict(
            {key: gather(value, at) for key, value in frames["observation"].items()}, batch_size=[rows, length + 1]
        )
        entries = {key: gather(frames[key], at_step) for key in ("action", "label", "label_valid", "reward", "success")}
        return TensorDict(
            {
                "observation": observation,
                **entries,
                "terminated": gather(frames["terminated"], at_step),
                "valid": time[:, :-1] < last[:, None],
                "steps_to_success": gather(frames["steps_to_success"], at),
                "task": self._task[episode],
                "episode_success": self._success[episode],
                "imitate": self._imitate[episode],
                "step": step,
            },
            batch_size=[rows],
        )

    # -- views

    def with_tokens(self, substrate: ImageSubstrate) -> EpisodeDataset:
        """The same episodes with the tokens of a frozen tokenizer, under its `cache_key`, in place of the images.

        Tokens of episodes on disk are kept in `<dataset>/latents/<fingerprint>/<episode>.<hash of its images>.npy`,
        float16 [T+1, L, D], beside a `tokenizer.json`, so that each frame is encoded once for each tokenizer. Files are
        written whole or not at all and read as memory maps.

        Raises:
            ValueError: images that the tokenizer was not made for, or tokens that were cached with another one.
        """
        key, fingerprint = substrate.key, substrate.fingerprint()
        if key not in self.observation:
            raise ValueError(
                f"the data lacks the observation key '{key}'; it has {', '.join(self.observation)}. Collect images "
                "with python -m wamrl.collect env.pixels=true"
            )
        check_image_shape(self.observation[key], substrate.image_shape, key)
        images = self.frames["observation", key]
        tokens = torch.zeros(len(images), substrate.tokens, substrate.width, dtype=torch.float16)
        for offset, steps, info in zip(self.offsets.tolist(), self.lengths.tolist(), self.episodes, strict=True):
            rows = slice(offset, offset + steps + 1)
            tokens[rows] = _cached_tokens(substrate, fingerprint, info.get("path"), images[rows])
        observation = {name: value for name, value in self.frames["observation"].items() if name != key}
        observation[substrate.cache_key] = tokens
        frames = self.frames.exclude("observation").set("observation", TensorDict(observation, batch_size=[]))
        return EpisodeDataset(frames, self.offsets, self.lengths, self.episodes, self.indices)

    def select(self, episodes: Sequence[int] | Tensor) -> EpisodeDataset:
        """The episodes of these numbers; the frames are shared, not copied."""
        chosen = torch.as_tensor(episodes, dtype=torch.int64)
        infos = [self.episodes[i] for i in chosen.tolist()]
        return EpisodeDataset(self.frames, self.offsets[chosen], self.lengths[chosen], infos, self.indices)

    def fingerprint(self, also: str = "") -> str:
        """A hash of which actions led to which rewards in which episodes, and of what is said `also`.

        It tells data that a run goes on with from data that was changed meanwhile; images are not read for it.
        """
        digest = hashlib.sha256(also.encode())
        for tensor in (self.offsets, self.lengths, self.frames["action"], self.frames["reward"]):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def joined(self, other: EpisodeDataset) -> EpisodeDataset:
        """These episodes and then those of `other`, which has the same keys and sizes; frames are copied."""
        frames = TensorDict(
            {key: torch.cat([value, other.frames[key]]) for key, value in self.frames.items(True, True)}, batch_size=[]
        )
        offsets = torch.cat([self.offsets, other.offsets + len(self.frames["action"])])
        return EpisodeDataset(frames, offsets, torch.cat([self.lengths, other.lengths]),
                              [*self.episodes, *other.episodes], self.indices)  # fmt: skip

    def split(self, validation_fraction: float, *, seed: int = 0) -> tuple[EpisodeDataset, EpisodeDataset]:
        """(training, validation) by whole episodes, the same fraction of each task and behaviour up to rounding.

        At least one episode is held out.

        Raises:
            ValueError: for a fraction outside (0, 1), or when no episode would be left to train on.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction is {validation_fraction}, but must lie between 0 and 1")
        generator = torch.Generator().manual_seed(seed)
        groups: dict[tuple[str, str], list[int]] = {}
        for number, episode in enumerate(self.episodes):
            groups.setdefault((episode["task"], episode["behaviour"]), []).append(number)
        held: set[int] = set()
        owed = 0.0
        for key in sorted(groups):
            members = groups[key]
            owed += validation_fraction * len(members)
            take = min(len(members), int(owed + 0.5))
            owed -= take
            order = torch.randperm(len(members), generator=generator)[:take]
            held |= {members[i] for i in order.tolist()}
        if not held:
            held = {int(torch.randint(len(self), (1,), generator=generator))}
        kept = [number for number in range(len(self)) if number not in held]
        if not kept:
            raise ValueError(
                f"{len(self)} episode(s) cannot be split with validation_fraction={validation_fraction}: none is left "
                "to train on; collect more, choose a smaller fraction, or train on all with validation_fraction=0"
            )
        return self.select(kept), self.select(sorted(held))

    def _where(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all frames of the episodes in order: their rows in `frames`, the episode's number and the step there."""
        counts = self.lengths + 1
        episode = torch.repeat_interleave(torch.arange(len(self)), counts)
        step = torch.arange(len(episode)) - (counts.cumsum(0) - counts)[episode]
        return self.offsets[episode] + step, episode, step

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """Per floating-point observation key, `mean` and `std` over all frames, in the shape of one frame.

        `change` is the root mean square of what a component changes by in one step. A component that hardly varies has
        its std raised to .001, so that dividing by it is safe.
        """
        rows, _, step = self._where()
        found = {}
        for key, value in self.frames["observation"].items():
            if value.is_floating_point():
                used = value.index_select(0, rows).double()
                std = used.std(0, correction=0).clamp_min(_STD_FLOOR)
                change = (used[1:] - used[:-1])[step[1:] > 0].square().mean(0).sqrt()
                found[key] = {"mean": used.mean(0).float(), "std": std.float(), "change": change.float()}
        return found

    def extent(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, Tensor]]]:
        """What the data showed: task -> floating-point observation key -> `low`, `high`, `moves`, in a frame's shape.

        `moves` is whether a component changed within episodes, by more than a hundredth of its usual `change` in
        `statistics`, which are those of the method `statistics`.
        """
        number = torch.tensor([self.tasks.index(info["task"]) for info in self.episodes])
        rows, episode, step = self._where()
        frame_task, within = number[episode], step < self.lengths[episode]
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for index, task in enumerate(self.tasks):
            mine = frame_task == index
            found[task] = {}
            for key, usual in statistics.items():
                value = self.frames["observation"][key]
                now = rows[mine & within]
                moved = (value[now + 1] - value[now]).double().square().mean(0).sqrt().float()
                seen = value[rows[mine]]
                found[task][key] = {"low": seen.amin(0), "high": seen.amax(0), "moves": moved > 0.01 * usual["change"]}
        return found

    def replay_buffer(self, batch_size: int, length: int, *, seed: int | None = None) -> Any:
        """The same steps as a TorchRL `ReplayBuffer` whose `SliceSampler` draws slices of `length` steps.

        A sample is flat, batch [batch_size] with `batch_size / length` slices, in TorchRL's layout: observation keys
        and `action` at the top, `("next", ...)` with observation keys, `reward`, `success`, `done`, `terminated`,
        `truncated`. Only episodes of at least `length` steps are drawn from.
        """
        from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

        if self._held_out:
            raise ValueError(f"this dataset holds {self._held_out}, which are kept for evaluation")
        if batch_size % length:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the slice length {length}")
        rows, numbers, step = self._where()
        chosen = (step < self.lengths[numbers]) & (self.lengths[numbers] >= length)
        at, episode = rows[chosen], numbers[chosen]
        if not len(at):
            raise ValueError(f"no episode has {length} steps or more")
        frames = self.frames
        last = (step[chosen] + 1 == self.lengths[episode])[:, None]
        terminated = frames["terminated"][at].unsqueeze(-1)
        following = {key: value[at + 1] for key, value in frames["observation"].items()}
        steps_td = TensorDict(
            {
                **{key: value[at] for key, value in frames["observation"].items()},
                "action": frames["action"][at],
                "label": frames["label"][at],
                "label_valid": frames["label_valid"][at],
                "task": self._task[episode],
                "episode": episode,
                "next": {
                    **following,
                    "reward": frames["reward"][at].unsqueeze(-1),
                    "success": frames["success"][at].unsqueeze(-1),
                    "done": last,
                    "terminated": terminated,
                    "truncated": last & ~terminated,
                },
            },
            batch_size=[len(at)],
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(len(at)),
            sampler=SliceSampler(slice_len=length, traj_key="episode", cache_values=True),
            batch_size=batch_size,
            generator=generator,
        )
        buffer.extend(steps_td)
        return buffer


# ----------------------------------------------------------------------------------------------------- tokens


def _digest(images: Tensor) -> str:
    """16 hexadecimal digits that tell these images from others."""
    digest = hashlib.blake2b(f"{images.dtype}{tuple(images.shape)}".encode(), digest_size=8)
    digest.update(images.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _cached_tokens(substrate: ImageSubstrate, fingerprint: str, episode: str | None, images: Tensor) -> Tensor:
    """float16 [T+1, L, D] of an episode's `images`, from its file or encoded and written there."""

    def encoded() -> Tensor:
        parts = [substrate.encode({substrate.key: part.to(substrate.mean.device)}) for part in images.split(256)]
        return torch.cat(parts).to("cpu", torch.float16)

    if episode is None:  # in memory only
        return encoded()
    source = Path(episode)
    folder = source.parent.parent / LATENTS / fingerprint
    # Times of files do not tell whether an episode was replaced: a copy may keep those of its source.
    facts, file = folder / "tokenizer.json", folder / f"{source.name}.{_digest(images)}.npy"
    if not facts.is_file():
        write_json(facts, {"fingerprint": fingerprint, "key": substrate.key, "config": dict(substrate.config)})
    stored = json.loads(facts.read_text(encoding="utf-8"))["fingerprint"]
    if stored != fingerprint:
        raise ValueError(
            f"the latents in {folder} were cached with the tokenizer {stored}, but the model's is "
            f"{fingerprint}; delete that folder, and they are made again"
        )
    if not file.is_file():
        with atomic_path(file) as temporary:
            np.save(temporary, encoded().numpy())
        for old in (folder / f"{source.name}.npy", *folder.glob(f"{source.name}.{'[0-9a-f]' * 16}.npy")):
            if old != file:  # of other images
                old.unlink(missing_ok=True)
    cached = np.load(file, mmap_mode="c")
    expected = (len(images), substrate.tokens, substrate.width)
    if cached.shape != expected or cached.dtype != np.float16:
        raise ValueError(
            f"{file} holds {cached.dtype} {cached.shape}, expected float16 {expected}; it is damaged; delete it, and "
            "it is made again"
        )
    return torch.from_numpy(cached)


# ----------------------------------------------------------------------------------------------------- Minari

_MINARI_HELP = 'Minari is not installed; run: pip install "wamrl[minari]"'


def _labels_count(info: Mapping[str, Any], labelled: Sequence[str]) -> bool:
    """Whether the labels of an episode are worth imitating: those of a policy under noise where it succeeded."""
    return info["behaviour"] in labelled or (info["behaviour"] == "noisy_policy" and bool(info["success"]))


def export_minari(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], dataset_id: str) -> Any:
    """Write one dataset or several as the Minari dataset `dataset_id` (such as "metaworld/push-v0") and return it.

    Observations become a dict space of the stored keys. Labels, success flags, simulator states and the facts of an
    episode become infos. Minari keeps its datasets where its own settings say (MINARI_DATASETS_PATH).

    Raises:
        ModuleNotFoundError: when Minari is not installed.
    """
    try:
        import minari
        from gymnasium import spaces
        from minari.data_collector.episode_buffer import EpisodeBuffer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MINARI_HELP) from error
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    buffers: list[Any] = []
    shapes: dict[str, Any] = {}
    behaviours: set[str] = set()
    for path in map(Path, paths):
        index = read_index(path)
        for folder in _whole_episodes(path):
            episode, info = load_episode(folder)
            steps = len(episode["action"])
            observation = {key: value.numpy() for key, value in episode["observation"].items()}
            shapes = {key: (value.shape[1:], value.dtype) for key, value in observation.items()}
            behaviours.add(info["behaviour"])
            valid = episode["label_available"] & _labels_count(info, index["label_behaviours"])

            def per_frame(value: Tensor) -> Any:  # Minari keeps infos per frame, the reset included
                return torch.cat([value, torch.zeros_like(value[:1])]).numpy()

            text = json.dumps({**info, "split": index["split"], "control_dt_s": index["env"].get("control_dt_s")})
            snapshot = {"snapshot": episode["snapshot"].numpy()} if "snapshot" in episode.keys() else {}
            buffers.append(
                EpisodeBuffer(
                    id=len(buffers),
                    seed=None,
                    options=None,
                    observations=observation,
                    actions=episode["action"].numpy(),
                    rewards=episode["reward"].numpy(),
                    terminations=episode["terminated"].numpy(),
                    truncations=episode["truncated"].numpy(),
                    infos={
                        "label": per_frame(episode["label"]),
                        "label_available": per_frame(episode["label_available"]),
                        "label_valid": per_frame(valid),
                        "success": per_frame(episode["success"]),
                        "episode": [text] * (steps + 1),
                        **snapshot,
                    },
                )
            )
    if not buffers:
        raise ValueError(f"{', '.join(map(str, paths))}: no whole episode to export")
    actions = buffers[0].actions.shape[1:]
    boxes: dict[str, Any] = {}
    for key, (shape, dtype) in shapes.items():
        low, high = (0.0, 255.0) if dtype == "uint8" else (-float("inf"), float("inf"))
        boxes[key] = spaces.Box(low, high, shape, dtype.type)
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        observation_space=spaces.Dict(boxes),
        action_space=spaces.Box(-1.0, 1.0, actions, np.float32),
        algorithm_name=", ".join(sorted(behaviours)),
        description="Exported from wamrl.",
    )


def import_minari(
    dataset_id: str,
    path: str | os.PathLike[str],
    *,
    task: str,
    control_dt_s: float,
    split: str | None = None,
    labels: bool = False,
) -> EpisodeDataset:
    """Turn a local Minari dataset into a wamrl dataset at `path` and open it.

    Args:
        dataset_id: of the Minari dataset.
        path: directory of the dataset to make.
        task: the task name of its episodes; episodes that `export_minari` wrote keep their own.
        control_dt_s: seconds per step.
        split: which start states it counts as; None is what `export_minari` wrote, otherwise "train".
        labels: whether the recorded actions are clean demonstrations, to be imitated. Labels that `export_minari`
            wrote are used as they are.

    Raises:
        ModuleNotFoundError: when Minari is not installed.
        ValueError: for observation or action spaces that are not boxes, actions outside [-1, 1], or a `split` or
            `control_dt_s` other than `export_minari` wrote: held-out starts stay held out.
    """
    try:
        import minari
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MINARI_HELP) from error
    source = minari.load_dataset(dataset_id)
    ours: list[tuple[TensorDict, dict[str, Any]]] = []

    def tensor(value: Any) -> Tensor:
        result = torch.as_tensor(np.asarray(value))
        return result.float() if result.dtype == torch.float64 else result

    for number, episode in enumerate(source.iterate_episodes()):
        observation = (
            episode.observations if isinstance(episode.observations, dict) else {"state": episode.observations}
        )
        if not isinstance(episode.actions, np.ndarray) or episode.actions.ndim != 2:
            raise ValueError(f"'{dataset_id}' has actions that are not one vector per step; wamrl takes boxes only")
        actions = tensor(episode.actions).float()
        if float(actions.abs().max()) > 1.0 + 1e-6:
            raise ValueError(
                f"'{dataset_id}' has actions up to {float(actions.abs().max()):.3g}, but wamrl's span [-1, 1]; "
                "scale them by the bounds of the action space first"
            )
        infos = episode.infos or {}
        steps = len(actions)
        facts: dict[str, Any] = {"behaviour": "imported"}
        exported = "episode" in infos
        if exported:
            text = infos["episode"][0]
            facts = json.loads(text.decode() if isinstance(text, bytes) else text)
            split = split or facts["split"]
            for name, given in (("split", split), ("control_dt_s", control_dt_s)):
                if facts[name] != given:
                    raise ValueError(
                        f"{name} is {given!r}, but '{dataset_id}' was exported from {name} {facts[name]!r}"
                    )
        success = infos.get("success")
        success = torch.zeros(steps, dtype=torch.bool) if success is None else tensor(success)[-steps:].bool()
        label, count = (actions, True) if labels else (None, False)
        if exported:
            success = tensor(infos["success"])[:steps].bool()
            label = tensor(infos["label"])[:steps] if bool(infos["label_available"][0]) else None
            count = bool(tensor(infos["label_valid"]).any())
        ours.append(
            (
                episode_tensordict(
                    {key: tensor(value) for key, value in observation.items()},
                    action=actions,
                    label=label,
                    reward=tensor(episode.rewards).float(),
                    success=success,
                    terminated=tensor(episode.terminations).bool(),
                    truncated=tensor(episode.truncations).bool(),
                    # As it is: only in float64 does a simulator state restore exactly.
                    snapshot=torch.as_tensor(np.asarray(infos["snapshot"]))
                    if exported and "snapshot" in infos
                    else None,
                ),
                {"task": task, "number": number, **facts, "labels_count": count},
            )
        )
    split = split or "train"
    behaviours = sorted({info["behaviour"] for _, info in ours if info.pop("labels_count")})
    writer = EpisodeWriter(
        path,
        {
            "tasks": sorted({info["task"] for _, info in ours}),
            "split": split,
            "label_behaviours": behaviours,
            "env": {"name": "minari", "control_dt_s": control_dt_s},
            "plan": {"minari": dataset_id, "split": split, "task": task, "labels": labels},
            "provenance": {"minari": dataset_id},
        },
    )
    present = writer.names()
    for number, (td, info) in enumerate(ours):
        name = f"episode-{number:05d}"
        if name not in present:
            writer.write(name, td, info)
    return EpisodeDataset.open(path, training=split == "train")


def _steps_to_success(success: Tensor) -> Tensor:
    """[T+1] float32 from flags [T] after each step."""
    frames = torch.arange(len(success) + 1, dtype=torch.float32)
    if not bool(success.any()):
        return torch.full_like(frames, torch.inf)
    first = success.to(torch.int64).argmax() + 1
    return (first - frames).clamp_min(0.0)


def _check_same_env(indices: Sequence[Mapping[str, Any]]) -> None:
    for key in ("name", "control_dt_s"):
        values = {index.get("env", {}).get(key) for index in indices}
        if len(values) > 1:
            raise ValueError(
                f"these datasets were collected with different {key} ({sorted(map(str, values))}), so their steps last "
                "differently long; train on one kind"
            )


def observation_keys(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The observation keys of the first whole episode of a dataset, or of the first of several."""
    first = next(iter([paths] if isinstance(paths, str | os.PathLike) else paths))
    read_index(first)
    whole = _whole_episodes(Path(first), quiet=True)
    if not whole:
        raise ValueError(f"{first} holds no whole episode; collect some with: python -m wamrl.collect")
    return tuple(map(str, load_episode(whole[0])[0]["observation"].keys()))


def _common_layout(
    indices: Sequence[Mapping[str, Any]], tasks: Sequence[str], observation: Mapping[str, Sequence[int]]
) -> Layout:
    """What the sources say of the observation's vectors; ValueError when they contradict each other."""
    before = unstated(tasks, observation).to_dict()
    # A layout of before they told of earlier readings lacks the entry; Meta-World's vectors held them already.
    stated = [{"earlier": before["earlier"], **index.get("layout", before)} for index in indices] or [before]
    found = [Layout.of(layout, observation) for layout in stated]
    if any(layout != found[0] for layout in found):
        raise ValueError(
            "these datasets say differently where their observation holds what (layout in dataset.json); train on data "
            "of one kind of environment"
        )
    return found[0]


def start_frames(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    keys: Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
    first_only: bool = False,
    training: bool = True,
) -> TensorDict:
    """[F] real observations at which imagined episodes may begin, with `task` (int64 `task_id`).

    Args:
        paths: dataset directories.
        keys: observation keys; None reads all that every episode has.
        tasks: tasks to keep; None keeps all.
        first_only: the first frame of each episode; otherwise every frame from which an action was taken.
        training: refuse datasets collected from dev or test start states.

    Raises:
        FileNotFoundError, ValueError: as `EpisodeDataset.open`.
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    dataset = EpisodeDataset.open(paths, keys=keys, tasks=tasks, training=training)
    rows, episode, step = dataset._where()
    chosen = step == 0 if first_only else step < dataset.lengths[episode]
    frames = {key: value[rows[chosen]] for key, value in dataset.frames["observation"].items()}
    return TensorDict({**frames, "task": dataset._task[episode[chosen]]}, batch_size=[int(chosen.sum())])
