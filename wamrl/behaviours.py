"""Who acts in an episode that is collected: an expert, an expert with faults, smooth random motion, or a policy.

The random numbers of an episode depend on the generator it is given only. Letters: A action dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from wamrl.interfaces import Layout

Action = NDArray[np.float32]
Relabel = Callable[[TensorDict], Action]
"""The expert's action [A] at another observation [1]."""


class Act(Protocol):
    """Executed action [A] of `row`, from `observation` [B] and the clean `label` [A].

    That is the expert's (zeros without one) or, in episodes of a policy, the policy's.
    """

    def __call__(self, label: Action, observation: TensorDict, row: int) -> Action: ...


@dataclass(frozen=True)
class Setting:
    """What behaviours need to know.

    action_dim: A. relabel: None without an expert. layout: where `state` holds object and goal. gripper: the action's
    number that opens and closes one, None without. noise: least and greatest deviation of `noisy_expert`, and of
    `noisy_policy`. discrete: actions are one-hot.
    """

    action_dim: int
    relabel: Relabel | None = None
    layout: Layout = field(default_factory=Layout)
    gripper: int | None = None
    noise: tuple[float, float] = (0.1, 0.8)
    discrete: bool = False


class _Noise:
    """Correlated Gaussian noise (an Ornstein-Uhlenbeck process in discrete time) with unit variance."""

    def __init__(self, rng: np.random.Generator, correlation: float, action_dim: int) -> None:
        self._rng, self._rho, self._size = rng, correlation, action_dim
        self._value = rng.standard_normal(action_dim)

    def __call__(self) -> NDArray[np.float64]:
        fresh = self._rng.standard_normal(self._size)
        self._value = self._rho * self._value + (1.0 - self._rho**2) ** 0.5 * fresh
        return self._value


def _clip(action: NDArray[np.floating[Any]]) -> Action:
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def _clean(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    return lambda label, observation, row: label, {}


def _noisy(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    scale, correlation = float(rng.uniform(*setting.noise)), float(rng.uniform(0.0, 0.9))
    noise = _Noise(rng, correlation, setting.action_dim)
    return lambda label, observation, row: _clip(label + scale * noise()), {"noise": scale, "correlation": correlation}


def _in_bursts(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    """Noise comes and goes, so that what it did to the episode is followed by clean steps in which to mend it."""
    scale, correlation = float(rng.uniform(*setting.noise)), float(rng.uniform(0.0, 0.9))
    noise, disturbed = _Noise(rng, correlation, setting.action_dim), False

    def bursts(label: Action, observation: TensorDict, row: int) -> Action:
        nonlocal disturbed
        disturbed = bool(rng.random() < (0.85 if disturbed else 0.05))  # 7 steps of 27 in the mean
        return _clip(label + scale * noise()) if disturbed else label

    return bursts, {"noise": scale, "correlation": correlation}


def _failing(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    known = {"noise": True, "gripper": setting.gripper is not None, "offset": setting.layout.has("object", "goal")}
    kind = str(rng.choice([name for name, possible in known.items() if possible]))
    noise = _Noise(rng, 0.9, setting.action_dim)
    if kind == "noise":
        scale = float(rng.uniform(1.0, 2.5))
        return lambda label, observation, row: _clip(label + scale * noise()), {"kind": kind, "noise": scale}
    if kind == "gripper":
        assert setting.gripper is not None
        number = setting.gripper

        def wrong_gripper(label: Action, observation: TensorDict, row: int) -> Action:
            flipped = label + 0.3 * noise()
            flipped[number] = -label[number] if abs(label[number]) > 0.05 else 1.0
            return _clip(flipped)

        return wrong_gripper, {"kind": kind}
    # Misled about object and goal alike: each expert reads at least one of them.
    angle, length = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.08, 0.2)
    aside = torch.tensor([length * np.cos(angle), length * np.sin(angle)], dtype=torch.float32)
    relabel = setting.relabel
    assert relabel is not None

    def misled(label: Action, observation: TensorDict, row: int) -> Action:
        wrong = observation[row : row + 1].clone()
        for name in ("object", "goal"):
            wrong["state"][:, setting.layout.place(name)][:, :2] += aside
        return _clip(relabel(wrong) + 0.1 * noise())

    return misled, {"kind": kind, "offset_m": float(length)}


def _near_miss(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    """The expert as a poor imitator: beside the object or the goal, often carrying on as if it had what it missed."""
    relabel, layout = setting.relabel, setting.layout
    assert relabel is not None and layout.has("hand", "object", "goal")  # `collect` has checked it
    hand, thing = layout.place("hand"), layout.place("object")
    of = "goal" if rng.random() < 0.3 else "object"
    direction = rng.standard_normal(3) * (1.0, 1.0, 0.5)
    offset = float(rng.uniform(0.005, 0.08)) * direction / np.linalg.norm(direction)
    carries, scale = bool(rng.random() < 0.6), float(rng.uniform(0.0, 0.4))
    noise, near, held = _Noise(rng, 0.9, setting.action_dim), 0, None
    # held: the object as seen from the hand, once it counts as grasped

    def missing(label: Action, observation: TensorDict, row: int) -> Action:
        nonlocal near, held
        wrong = observation[row : row + 1].clone()
        believed = wrong["state"][0]
        believed[layout.place(of)] += torch.from_numpy(offset).float()
        near = near + 1 if bool((believed[thing] - believed[hand]).norm() < 0.05) else 0
        if carries and held is None and near >= 5:
            held = believed[thing] - believed[hand]
        if held is not None:
            believed[thing] = believed[hand] + held
        return _clip(relabel(wrong) + scale * noise())

    return missing, {"of": of, "offset_m": float(np.linalg.norm(offset)), "carries": carries}


def _random(rng: np.random.Generator, setting: Setting) -> tuple[Act, dict[str, Any]]:
    scale, correlation = float(rng.uniform(0.3, 1.0)), float(rng.uniform(0.8, 0.97))
    noise = _Noise(rng, correlation, setting.action_dim)
    if setting.discrete:
        choices = np.eye(setting.action_dim, dtype=np.float32)
        return lambda label, observation, row: choices[noise().argmax()], {"correlation": correlation}
    return lambda label, observation, row: _clip(scale * noise()), {"noise": scale, "correlation": correlation}


BEHAVIOURS: Mapping[str, Callable[[np.random.Generator, Setting], tuple[Act, dict[str, Any]]]] = {
    "expert": _clean,
    "noisy_expert": _noisy,
    "failing": _failing,
    "near_miss": _near_miss,
    "random": _random,
}
"""Name -> (generator, setting) -> what acts, and what the episode records about it."""

POLICY_BEHAVIOURS: Mapping[str, Callable[[np.random.Generator, Setting], tuple[Act, dict[str, Any]]]] = {
    "policy": _clean,
    "noisy_policy": _in_bursts,
}
"""The same of a policy or planner: what it does, and what it does under bursts of noise, which shows how to recover.

What it would have done is the label of `noisy_policy` (after DART: Laskey et al., 2017, arXiv:1703.09327).
"""

NEEDS_EXPERT = ("expert", "noisy_expert", "failing", "near_miss")
