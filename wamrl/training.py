"""Training a World Action Model: the loop, its logs, its validation, and exact resume.

A killed and resumed run equals an uninterrupted one bit for bit on a CPU with the same number of threads: the
resume state holds weights, targets, optimiser, every random generator that is read (data order, model noise,
torch's own), the step and the best metric. It is written as a whole directory of safetensors and JSON, no pickle.

Letters: B windows, T steps of a window, H steps of the validation horizon, M sampled futures, D latent dims.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wamrl.files import atomic_path, write_json, write_tensors
from wamrl.interfaces import WAM, Context
from wamrl.naming import RunError, is_number, whole_number
from wamrl.noise import NoiseKey
from wamrl.provenance import has_cpp_compiler

# Options that may differ when a run is resumed: they change nothing that the optimiser sees.
_FREE_OPTIONS = ("log_every", "validate_every", "save_every", "max_seconds", "tensorboard", "threads")


class WindowSource(Protocol):
    """Where windows come from: `wamrl.data.EpisodeDataset`, or anything that draws them by a generator alone."""

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> TensorDict:
        """Windows [B] of `length` steps, as described in `WAM.loss`; the same generator state, the same windows."""
        ...


class TrainingDiverged(RunError):
    """Loss or gradient stayed NaN or infinite; the last good state is kept on disk."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    steps: optimiser steps; the learning rate's schedule is by steps. batch_size: windows per step. length: T, steps
    per window. learning_rate: the peak, after warmup_steps of linear rise, falling as a cosine to
    final_learning_rate. clip_norm: of the whole gradient. ema: decay per step of an exponential moving average of the
    weights, which checkpoints and validation take in place of the latest ones; 0 is none. After n steps it is at most
    (1 + n) / (10 + n), so that the first weights are soon forgotten. precision: "auto" is bfloat16 autocast on a GPU
    and float32 on a CPU. non_finite_limit: skipped steps in a row after which the run stops. max_seconds: of training
    in all, or None. validation_windows: how many fixed windows; validation_horizon: H, steps of open-loop prediction.
    threads: torch threads, or None to leave them.
    """

    steps: int = 10_000
    batch_size: int = 256
    length: int = 5
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 1e-4
    clip_norm: float = 10.0
    ema: float = 0.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    non_finite_limit: int = 20
    max_seconds: float | None = None
    log_every: int = 100
    validate_every: int = 1000
    save_every: int = 1000
    validation_windows: int = 256
    validation_horizon: int = 10
    tensorboard: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "non_finite_limit", "log_every", "validate_every", "save_every",
                     "validation_windows", "validation_horizon"):  # fmt: skip
            whole_number(name, getattr(self, name), 1)
        for name, zero in (("learning_rate", False), ("clip_norm", False), ("final_learning_rate", True),
                           ("warmup_steps", True), ("weight_decay", True)):  # fmt: skip
            value = getattr(self, name)
            if not (is_number(value) and (value > 0 or (zero and value == 0))):
                raise ValueError(f"{name} is {value!r}, expected {'0 or more' if zero else 'a number above 0'}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}, expected a whole number")
        for name in ("compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if not (is_number(self.ema) and 0.0 <= self.ema < 1.0):
            raise ValueError(f"ema is {self.ema!r}, expected a decay from 0 (no average) to below 1, such as 0.995")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}; "
                "the schedule falls"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is '{self.precision}', expected auto, float32 or bfloat16")
        if self.max_seconds is not None and not (is_number(self.max_seconds) and self.max_seconds > 0):
            raise ValueError(f"max_seconds is {self.max_seconds!r}, expected a time above 0, or null for no limit")
        if self.threads is not None:
            whole_number("threads", self.threads, 1)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the step of that number, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fall = 0.5 * (1.0 + math.cos(math.pi * min(1.0, through)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind.

    checkpoint: the last weights. best_checkpoint: those with the lowest validation loss, or None without validation.
    step: optimiser steps done. finished: whether all were (False: `max_seconds` came first). skipped: steps that were
    left out for a loss or gradient that was not finite. seconds, cpu_seconds: of the whole run, interruptions and what
    was lost by them left out. validation: of the last weights, see `open_loop_errors`.
    """

    run_dir: Path
    checkpoint: Path
    best_checkpoint: Path | None
    step: int
    finished: bool
    skipped: int
    seconds: float
    cpu_seconds: float
    validation: dict[str, Any] = field(default_factory=dict)


def fit(
    model: WAM,
    dataset: WindowSource,
    *,
    options: TrainingOptions,
    run_dir: str | os.PathLike[str],
    save_model: Callable[[Path, WAM, int], object],
    validation: WindowSource | None = None,
    scale: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    identity: str = "",
    quiet: bool = False,
) -> TrainingResult:
    """Train `model` on windows of `dataset`, going on where `run_dir` left off when it holds a resume state.

    Args:
        model: with fresh or earlier weights, normalisation set; it is moved to `device` and trained in place.
        dataset: the training windows.
        options: how to train.
        run_dir: gets checkpoints/model.safetensors, checkpoints/last/, log.csv, validation.csv and tensorboard/.
        save_model: writes a checkpoint: `save_model(path, model, step)`.
        validation: held-out windows; None skips validation.
        scale: observation key -> standard deviation of its features, the unit of the validation's state error.
        device: where to train.
        identity: names model and data; a resume state of another identity is refused.
        quiet: no progress on stderr.

    Raises:
        TrainingDiverged: the loss or gradient was not finite `options.non_finite_limit` times in a row.
        ValueError: `run_dir` holds a state of other options or another identity.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the state saved.
    """
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=cuda):
        try:
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            torch.manual_seed(options.seed)
            model.to(device)
            run = _Run(model, dataset, options, Path(run_dir), save_model, validation, scale, device, identity)
            return run.go(quiet=quiet)
        finally:
            torch.set_num_threads(threads)


class _Run:
    def __init__(
        self,
        model: WAM,
        dataset: WindowSource,
        options: TrainingOptions,
        run_dir: Path,
        save_model: Callable[[Path, WAM, int], object],
        validation: WindowSource | None,
        scale: Mapping[str, Tensor] | None,
        device: torch.device,
        identity: str,
    ) -> None:
        self.model, self.dataset, self.options, self.run_dir = model, dataset, options, run_dir
        self.save_model, self.scale, self.device, self.identity = save_model, scale, device, identity
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if options.ema else []
        self.order = torch.Generator().manual_seed(options.seed)
        self.noise = torch.Generator(device=device).manual_seed(options.seed + 1)
        self.horizon = min(options.validation_horizon, model.spec.max_horizon)
        self.held_out = None
        if validation is not None:
            fixed = torch.Generator().manual_seed(options.seed + 2)
            # The loss is of windows as long as in training, where a model may ask for a whole chunk.
            length = max(self.horizon, options.length)
            self.held_out = validation.sample(options.validation_windows, length, fixed).to(device)
        self.step = 0
        self.skipped = 0
        self.streak = 0
        self.best: float | None = None
        self.seconds = self.cpu_seconds = 0.0
        self.totals: dict[str, Tensor] = {}
        self.counted = 0

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def go(self, *, quiet: bool) -> TrainingResult:
        options = self.options
        if options.compile and self.device.type == "cpu" and not has_cpp_compiler():
            raise ValueError(
                "compile=true needs a C++ compiler, and none of g++, clang++ and c++ is found; install one (on Debian: "
                "apt-get install g++), or leave compile=false"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._rehearse()
        log = Log(self.run_dir, self.step, tensorboard=options.tensorboard)
        before, started = self.seconds, time.perf_counter()
        cpu = self.cpu_seconds - time.process_time()
        loss_of = torch.compile(self.model.loss) if options.compile else self.model.loss
        update_targets = getattr(self.model, "update_targets", lambda: None)
        validated: dict[str, Any] = {}
        self.model.train()
        with interruptible() as interrupted, _progress(self.step, options.steps, quiet=quiet) as progress, log:
            if self.held_out is not None and self.step == 0:
                validated = self._validate(log)  # what the untrained model gets
            while self.step < options.steps:
                self.seconds = before + time.perf_counter() - started
                self.cpu_seconds = cpu + time.process_time()
                if interrupted():
                    self._save()
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step} of {options.steps}; everything so far is saved. "
                        f"Go on with: python -m wamrl.train resume={self.run_dir}"
                    )
                if options.max_seconds is not None and self.seconds >= options.max_seconds:
                    break
                self._train_step(loss_of, update_targets)
                if self.step % options.log_every == 0:
                    row = self._means()
                    log.write("log", self.step, {"seconds": round(self.seconds, 2), **row})
                    progress(self.step, row)
                if self.held_out is not None and self.step % options.validate_every == 0 and self.step < options.steps:
                    validated = self._validate(log)
                if self.step % options.save_every == 0 and self.step < options.steps and not self.streak:
                    self._save()
            self.seconds = before + time.perf_counter() - started
            if self.held_out is not None:
                validated = self._validate(log)
            self.cpu_seconds = cpu + time.process_time()
            self._save()
        self._exchange()  # the caller goes on with the weights that the checkpoint holds
        best = self.checkpoints / "best.safetensors"
        return TrainingResult(
            run_dir=self.run_dir,
            checkpoint=self.checkpoints / "model.safetensors",
            best_checkpoint=best if best.is_file() else None,
            step=self.step,
            finished=self.step >= options.steps,
            skipped=self.skipped,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            validation=validated,
        )

    def _rehearse(self) -> None:
        """One loss without a step, so that a mistake in the settings shows before anything is written."""
        sizes = {(self.options.batch_size, self.options.length)}
        if self.held_out is not None:
            sizes.add((len(self.held_out), self.held_out["action"].shape[1]))
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), self._precision():
            for rows, length in sizes:
                batch = self.dataset.sample(rows, length, torch.Generator().manual_seed(0)).to(self.device)
                self.model.loss(batch, noise=torch.Generator(device=self.device).manual_seed(0))

    def _train_step(self, loss_of: Callable[..., dict[str, Tensor]], update_targets: Callable[[], object]) -> None:
        options = self.options
        batch = self.dataset.sample(options.batch_size, options.length, self.order)
        if self.device.type != "cpu":
            batch = batch.to(self.device, non_blocking=True)
        rate = options.learning_rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self._precision():
            losses = loss_of(batch, noise=self.noise)
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip_norm, foreach=True)
        loss = losses["loss"].detach()
        self.step += 1
        # The norm is NaN or infinite as soon as one gradient is; the sum asks the device only once.
        if not math.isfinite(float(loss.float() + norm)):
            self._skip(losses, norm)
            return
        self.streak = 0
        self.optimiser.step()
        update_targets()
        if self.averages:
            decay = min(options.ema, (1.0 + self.step) / (10.0 + self.step))
            get_ema_multi_avg_fn(decay)(self.averages, self.parameters, None)
        scalars = {name: value.detach().float() for name, value in losses.items()} | {"gradient_norm": norm}
        if self.totals:
            torch._foreach_add_([self.totals[name] for name in scalars], list(scalars.values()))
        else:
            self.totals = {name: value.clone() for name, value in scalars.items()}
        self.counted += 1

    def _skip(self, losses: Mapping[str, Tensor], norm: Tensor) -> None:
        self.skipped += 1
        self.streak += 1
        if self.streak < self.options.non_finite_limit:
            return
        named = {**{name: value.detach() for name, value in losses.items()}, "gradient norm": norm}
        wrong = ", ".join(name for name, value in named.items() if not math.isfinite(float(value)))
        found = find_state(self.checkpoints)
        kept = f"the last good state is kept in {found}" if found else "no state had been saved yet"
        raise TrainingDiverged(
            f"{wrong} not finite for {self.streak} steps in a row, up to step {self.step}; stopped, and {kept}. "
            "Lower learning_rate or clip_norm, or look for extreme values in the data"
        )

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        wanted = self.options.precision
        if wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Let the model hold the averaged weights and `averages` the latest ones, or the other way round."""
        for parameter, average in zip(self.parameters, self.averages, strict=bool(self.averages)):
            latest = parameter.clone()
            parameter.copy_(average)
            average.copy_(latest)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with averaged weights, where they are kept."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _means(self) -> dict[str, float]:
        row = {name: float(total) / self.counted for name, total in self.totals.items()} if self.counted else {}
        self.totals, self.counted = {}, 0
        return {**row, "learning_rate": self.options.learning_rate_at(self.step - 1), "skipped_steps": self.skipped}

    def _validate(self, log: Log) -> dict[str, Any]:
        assert self.held_out is not None
        noise = torch.Generator(device=self.device).manual_seed(self.options.seed + 3)
        self.model.eval()
        with torch.no_grad(), self._precision(), self._averaged():
            losses = {name: float(value) for name, value in self.model.loss(self.held_out, noise=noise).items()}
            errors = {}
            if "rollout" in self.model.spec.provides:
                errors = open_loop_errors(self.model, self.held_out, self.horizon, scale=self.scale)
        self.model.train()
        flat = {f"{name}_h{h + 1}": value for name, by_step in errors.items() for h, value in enumerate(by_step)}
        log.write("validation", self.step, {**losses, **flat})
        if self.step and math.isfinite(losses["loss"]) and (self.best is None or losses["loss"] < self.best):
            self.best = losses["loss"]
            with self._averaged():
                self.save_model(self.checkpoints / "best.safetensors", self.model, self.step)
        return {"step": self.step, "losses": losses, "by_horizon": errors}

    def _save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        tensors |= {f"total.{name}": value for name, value in self.totals.items()}
        tensors |= {f"average.{index}": value for index, value in enumerate(self.averages)}
        tensors["random.order"] = self.order.get_state()
        tensors["random.noise"] = self.noise.get_state()
        tensors["random.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "step": self.step,
            "skipped": self.skipped,
            "streak": self.streak,
            "best": self.best,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "counted": self.counted,
            "identity": self.identity,
            "options": asdict(self.options),
        }
        write_state(self.checkpoints, tensors, facts)
        with self._averaged():
            self.save_model(self.checkpoints / "model.safetensors", self.model, self.step)

    def _restore(self) -> None:
        found = find_state(self.checkpoints)
        if found is None:
            return
        facts = json.loads((found / "state.json").read_text(encoding="utf-8"))
        if facts["identity"] != self.identity:
            raise ValueError(
                f"{found} is the state of another model or other data ({facts['identity']}, now {self.identity}); "
                "choose another run directory, or resume with the same data"
            )
        now = asdict(self.options)
        changed = [
            f"{item.name} {facts['options'].get(item.name, item.default)!r} -> {now[item.name]!r}"
            for item in fields(self.options)
            if item.name not in _FREE_OPTIONS and facts["options"].get(item.name, item.default) != now[item.name]
        ]
        if changed:
            raise ValueError(
                f"{found} was trained with other options ({', '.join(changed)}), so going on would not be the same "
                "run; give the same ones, or start a new run from its weights with wam=<this run>"
            )
        tensors = load_file(found / "state.safetensors")
        self.model.load_state_dict(_part(tensors, "model."))
        state = self.optimiser.state_dict()
        for name, tensor in _part(tensors, "optimiser.").items():
            index, key = name.split(".", 1)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict(state)
        self.totals = {name: tensor.to(self.device) for name, tensor in _part(tensors, "total.").items()}
        self.averages = [tensors[f"average.{index}"].to(self.device) for index in range(len(self.averages))]
        self.order.set_state(tensors["random.order"])
        self.noise.set_state(tensors["random.noise"])
        torch.set_rng_state(tensors["random.torch"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.step, self.skipped, self.best = facts["step"], facts["skipped"], facts["best"]
        self.seconds, self.counted = facts["seconds"], facts["counted"]
        self.cpu_seconds = facts.get("cpu_seconds", 0.0)  # earlier states have none
        self.streak = facts.get("streak", 0)  # states of older versions have none


def open_loop_errors(
    model: WAM, windows: TensorDict, horizon: int | None = None, *, scale: Mapping[str, Tensor] | None = None
) -> dict[str, list[float]]:
    """How wrong the model's imagination is after 1..H executed actions, beside the guess that nothing moves.

    Args:
        model: that answers "rollout"; the state errors need "decode" too.
        windows: batch [B] of H steps or more, as in `WAM.loss`.
        horizon: H; None is as many steps as the windows have.
        scale: observation key -> standard deviation per feature, of which those up to 0.001 (features that never vary)
            are left out. None is 1.

    Returns:
        Lists of length H. `state_error` and `state_persistence`: per feature of all decoded observation keys the root
        mean square over windows, in standard deviations of the data, and of these the geometric mean over the features
        that move; absent where nothing does. So every feature's share counts alike, where a mean would drown in a few
        that nothing predicts, such as those of a quaternion, whose sign is arbitrary. `latent_error` and
        `latent_persistence`: root mean squares over windows and features. Futures are averaged over the M members.
        Steps past an episode's end do not count.
    """
    model.spec.require("rollout")
    horizon = windows["action"].shape[1] if horizon is None else horizon
    observation, valid = windows["observation"][:, : horizon + 1], windows["valid"][:, :horizon]
    actions, rows = windows["action"][:, :horizon], len(valid)

    def encode(frames: TensorDict, task: Tensor) -> TensorDict:
        count = len(task)
        return model.encode(
            Context(
                observation=frames.unsqueeze(1),
                past_actions=actions.new_empty(count, 0, model.spec.action_dim),
                valid=torch.ones(count, 1, dtype=torch.bool, device=task.device),
                task=task,
            )
        )

    start = encode(observation[:, 0], windows["task"])
    noise = NoiseKey.for_rows(rows, device=windows["task"].device)
    imagined = model.imagine(start, actions.unsqueeze(1), noise=noise, with_frames=True)
    errors: dict[str, list[float]] = {}
    if imagined.frames is not None:
        frames = imagined.frames[:, 0].float().mean(1)  # [B, H, D]
        later = encode(observation[:, 1:].flatten(0, 1), windows["task"].repeat_interleave(horizon))
        for name, truth in later.items():
            # The latent is the entry that the frames are of: the same shape at the leaf, and not copied from the start.
            if imagined.leaf[name].shape[-1] == frames.shape[-1] and torch.equal(
                imagined.leaf[name], imagined.frames[:, :, :, -1]
            ):
                truth = truth.float().unflatten(0, (rows, horizon))
                errors["latent_error"] = _rms(frames - truth, valid)
                errors["latent_persistence"] = _rms(start[name].float().unsqueeze(1) - truth, valid)
                break
    # Not the images [B, T, 3, H, W]: decoding one per candidate and step takes minutes.
    keys = tuple(key for key in model.spec.observation if key in observation.keys() and observation[key].ndim < 5)
    if "decode" in model.spec.provides and keys:
        decoded = model.decode(imagined, keys)
        predicted, still, unit = [], [], []
        for key in sorted(set(decoded.keys()) & set(observation.keys())):
            truth = observation[key][:, 1:].flatten(2).float()
            predicted.append(decoded[key][:, 0].float().mean(1).flatten(2) - truth)
            still.append(observation[key][:, :1].flatten(2).float() - truth)
            std = torch.ones(truth.shape[-1]) if scale is None else torch.as_tensor(scale[key]).flatten().float()
            unit.append(std.to(truth.device))
        std = torch.cat(unit)
        by_feature = [_rms_by_feature(torch.cat(parts, dim=-1) / std, valid) for parts in (predicted, still)]
        moving = (std > 1.001e-3) & (by_feature[1] > _STILL).any(0)
        if moving.any():
            for name, rms in zip(("state_error", "state_persistence"), by_feature, strict=True):
                errors[name] = rms[:, moving].clamp(min=_STILL).log().mean(1).exp().tolist()
    return errors


_STILL = 1e-3  # standard deviations: what moves no further in a window does not move, and smaller errors are none


def _rms_by_feature(difference: Tensor, valid: Tensor) -> Tensor:
    """[H, F] of `difference` [B, H, F], over the windows where `valid` [B, H]."""
    square = torch.where(valid[..., None], difference.square(), 0.0).double()
    return (square.sum(0) / valid.sum(0).clamp(min=1)[:, None]).sqrt()


def _rms(difference: Tensor, valid: Tensor) -> list[float]:
    """Per step [H] of `difference` [B, H, F], over the windows where `valid` [B, H]."""
    square = torch.where(valid, difference.square().mean(-1), 0.0).double()
    return (square.sum(0) / valid.sum(0).clamp(min=1)).sqrt().tolist()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace `folder`/last as a whole: at every moment either it or `.last.old` is complete."""
    new, last, old = folder / ".last.new", folder / "last", folder / ".last.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    whole = {}
    for name, tensor in tensors.items():
        whole[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    write_tensors(new / "state.safetensors", whole)
    write_json(new / "state.json", facts)
    if last.exists():
        shutil.rmtree(old, ignore_errors=True)
        last.rename(old)
    new.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def find_state(folder: Path) -> Path | None:
    """The directory of the last whole state below `folder`, or None."""
    for name in ("last", ".last.old"):
        if (folder / name / "state.json").is_file():
            return folder / name
    return None


class Log:
    """CSV files that grow, and TensorBoard beside them; rows after the resumed step are dropped."""

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool) -> None:
        self.run_dir, self.step = run_dir, step
        self.files: dict[str, tuple[Any, Any]] = {}
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file, _writer in self.files.values():
            file.close()
        if self.board is not None:
            self.board.close()

    def write(self, name: str, step: int, row: Mapping[str, float]) -> None:
        """Add a row to <name>.csv; columns that no row had before are empty in the earlier ones."""
        whole = {"step": step, **row}
        if name not in self.files:
            self.files[name] = self._open(self.run_dir / f"{name}.csv", list(whole), self.step or -1)
        elif not whole.keys() <= set(self.files[name][1].fieldnames):
            self.files[name][0].close()
            self.files[name] = self._open(self.run_dir / f"{name}.csv", list(whole), step)
        file, writer = self.files[name]
        writer.writerow(whole)
        file.flush()
        if self.board is not None:
            for key, value in row.items():
                self.board.add_scalar(f"{name}/{key}", value, step)

    def _open(self, path: Path, columns: list[str], last: int) -> tuple[Any, Any]:
        """The file with its rows up to step `last`, in its columns and `columns`; below 0 a new one."""
        rows: list[dict[str, str]] = []
        if path.is_file() and last >= 0:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns = list(dict.fromkeys([*(reader.fieldnames or ()), *columns]))
                rows = [row for row in reader if None not in row.values() and int(row["step"]) <= last]
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        file = path.open("a", newline="", encoding="utf-8")
        return file, csv.DictWriter(file, columns, restval="")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and SIGHUP set a flag that is looked at between steps; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    earlier = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(step: int, steps: int, *, quiet: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A bar with an ETA on a terminal, elsewhere a line every ten seconds."""
    if quiet:
        yield lambda step, row: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        left = (TextColumn("train"), BarColumn(), MofNCompleteColumn())
        right = (TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*left, *right, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=steps, completed=step)
            yield lambda step, row: bar.update(
                task, completed=step, description=f"loss {row.get('loss', math.nan):.4g}"
            )
    else:
        first, started, last = step, time.perf_counter(), -math.inf

        def line(step: int, row: Mapping[str, float]) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last < 10.0 and step < steps:
                return
            last = now
            left = (now - started) / max(1, step - first) * (steps - step)
            print(
                f"step {step}/{steps}  loss {row.get('loss', math.nan):.4g}  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )

        yield line
