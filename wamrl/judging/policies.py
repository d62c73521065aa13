"""The policies that take part in an evaluation, from short descriptions: whatever acts, as a `wamrl.interfaces.Policy`.

A description is a mapping with `kind` and its settings, or a word:

    expert, expert+0.5            the environment's scripted expert, with noise of that deviation
    random                        uniform actions
    six, outputs/train/latest     a checkpoint's own policy
    planner:six                   the run's planner and controller in a checkpoint
    package.module:name           a policy of your own; see `from_callable`
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from tensordict import TensorDict
from torch import Tensor

from wamrl import checkpoint
from wamrl.control import ModelPolicy, RandomPolicy
from wamrl.interfaces import Policy, PolicyState, keys_of_images
from wamrl.naming import is_number, unknown_name
from wamrl.noise import NoiseKey

SETTINGS = {
    "expert": {"noise", "correlation"},
    "random": set(),
    "checkpoint": {"checkpoint", "policy", "mode", "noise", "correlation"},
    "planner": {"checkpoint", "policy", "planner", "controller"},
    "sb3": {"path", "algorithm", "trust", "observation", "noise", "correlation"},
    "callable": {"target", "arguments", "noise", "correlation"},
}
ORIGINS = ("independent", "degraded")
_SB3 = ("A2C", "DDPG", "DQN", "PPO", "SAC", "TD3")
_FOLD = 0x4E01  # of the noise added to actions, apart from a policy's own draws


@dataclass(frozen=True)
class Entrant:
    """A policy that takes part. origin: "independent", or "degraded" for a noisy or weakened version of another.

    content_hash, provenance: of the checkpoint behind it, None for others. wam, planner: its name and the import path
    of the planner that acts in it, "" where there is none. settings: what decides how it acts, beside its start state:
    its description, and hashes of the files that it is made of. images: whether it may read some.
    """

    name: str
    kind: str
    policy: Policy
    origin: str = "independent"
    content_hash: str | None = None
    provenance: Mapping[str, Any] | None = None
    wam: str = ""
    planner: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: bool = True


@dataclass(frozen=True)
class Surroundings:
    """What policies are built for.

    env_module: dotted name of the plug-in, which may have `ExpertPolicy`. wam: the judged checkpoint, which `planner`
    means when it names none. planner, controller: the run's choices.
    """

    tasks: tuple[str, ...]
    action_dim: int
    env_module: str
    wam: str
    planner: Mapping[str, Any]
    controller: Mapping[str, Any]
    seed: int = 0
    device: str = "cpu"


def build(descriptions: Sequence[Any], around: Surroundings) -> list[Entrant]:
    """The entrants of `descriptions`, in order.

    Raises:
        ValueError: an unknown kind or setting, two of one name, a policy for other actions, a zip without trust=true.
        FileNotFoundError: no such checkpoint or zip.
    """
    if not isinstance(descriptions, Sequence) or isinstance(descriptions, str) or not descriptions:
        raise ValueError(f"policies is {descriptions!r}, but must be a list such as [expert,random,six]")
    entrants: list[Entrant] = []
    for description in descriptions:
        entrant = _entrant(describe(description), around)
        if entrant.name in {other.name for other in entrants}:
            raise ValueError(f"two policies are called '{entrant.name}'; give one of them another name={entrant.name}2")
        entrants.append(entrant)
    return entrants


def describe(description: Any) -> dict[str, Any]:
    """The mapping that a word stands for; a mapping comes back checked."""
    if isinstance(description, str):
        return _from_word(description)
    if not isinstance(description, Mapping) or "kind" not in description:
        raise ValueError(
            f"a policy is {description!r}, but must be a word such as expert, or a mapping with kind, one of "
            f"{', '.join(SETTINGS)}"
        )
    kind = str(description["kind"])
    if kind not in SETTINGS:
        raise unknown_name("kind of policy", kind, SETTINGS)
    for key in description:
        if key not in SETTINGS[kind] | {"kind", "name", "origin"}:
            raise unknown_name(f"setting of a policy of kind {kind}", str(key), SETTINGS[kind] | {"name", "origin"})
    if description.get("origin", ORIGINS[0]) not in ORIGINS:
        raise unknown_name("origin of a policy", str(description["origin"]), ORIGINS)
    for key in ("noise", "correlation"):
        value = description.get(key, 0.0)
        if not is_number(value) or value < 0:
            raise ValueError(f"{key} of the {kind} policy is {value!r}, but must be a number above 0, or 0 for none")
    return dict(description)


def _from_word(word: str) -> dict[str, Any]:
    head, plus, level = word.rpartition("+")
    if plus and head == "expert":
        try:
            noise = float(level)
        except ValueError:
            noise = math.nan
        if not 0 < noise < math.inf:
            raise ValueError(f"policy '{word}': after the + comes the noise's deviation, above 0, as in expert+0.5")
        return {"kind": "expert", "noise": noise, "name": word}
    if word in ("expert", "random", "planner"):
        return {"kind": word, "name": word}
    if word.startswith("planner:"):
        return {"kind": "planner", "checkpoint": word.removeprefix("planner:"), "name": word}
    if ":" in word and not Path(word).exists():
        return {"kind": "callable", "target": word, "name": word.rpartition(":")[2]}
    if word.endswith(".zip"):
        return {"kind": "sb3", "path": word}
    return {"kind": "checkpoint", "checkpoint": word}


def _entrant(given: dict[str, Any], around: Surroundings) -> Entrant:
    kind = given["kind"]
    content, provenance, wam, planned = None, None, "", ""
    default, images = kind, kind not in ("expert", "random")
    settings = {key: value for key, value in given.items() if key not in ("name", "origin")}
    settings["seed"] = around.seed
    policy: Policy
    if kind == "expert":
        module = importlib.import_module(around.env_module)
        if not hasattr(module, "ExpertPolicy"):
            raise ValueError(f"{around.env_module} has no ExpertPolicy; leave the policy 'expert' out")
        policy = module.ExpertPolicy(list(around.tasks))
        default = f"expert+{given['noise']:g}" if given.get("noise") else "expert"
    elif kind == "random":
        policy = RandomPolicy(around.action_dim, seed=around.seed)
    elif kind in ("checkpoint", "planner"):
        wam = str(given.get("checkpoint") or around.wam)
        metadata = checkpoint.read_metadata(wam)
        content, provenance = metadata.content_sha256, metadata.provenance
        images = bool(keys_of_images(metadata.spec.observation))
        settings["device"] = around.device
        _check_fits(wam, metadata.spec.action_dim, metadata.spec.tasks, around)
        model = checkpoint.load(wam, device=around.device, policy=given.get("policy"))
        default = Path(wam).stem if kind == "checkpoint" else f"planner:{Path(wam).stem}"
        if kind == "checkpoint":
            policy = ModelPolicy(model, mode=str(given.get("mode", "ode")), seed=around.seed)
        else:
            choice = {**around.planner, **(given.get("planner") or {})}
            planner, planned = instantiate(choice), str(choice["_target_"])
            how = {**around.controller, **(given.get("controller") or {}), "seed": around.seed}
            policy = instantiate(how)(model, planner)
            settings |= {"planner": choice, "controller": how}
    elif kind == "sb3":
        path = str(given.get("path"))
        policy = load_sb3(
            path,
            str(given.get("algorithm", "PPO")),
            trust=given.get("trust") is True,
            action_dim=around.action_dim,
            observation=given.get("observation"),
        )
        default = Path(path).stem
        settings["file"] = _hash(Path(path))
    else:
        target = str(given.get("target"))
        policy = from_callable(target, given.get("arguments"))
        default = target.rpartition(":")[2]
        source = inspect.getsourcefile(importlib.import_module(target.partition(":")[0]))
        settings["file"] = None if source is None else _hash(Path(source))
    noise = float(given.get("noise", 0.0))
    if noise:
        policy = NoisyPolicy(policy, noise, float(given.get("correlation", 0.5)), seed=around.seed)
    return Entrant(
        name=str(given.get("name", default)),
        kind=kind,
        policy=policy,
        origin=str(given.get("origin", "degraded" if noise else "independent")),
        content_hash=content,
        provenance=provenance,
        wam=wam,
        planner=planned,
        settings={**settings, "content_hash": content},
        images=images,
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_fits(name: str, action_dim: int, tasks: Sequence[str], around: Surroundings) -> None:
    if action_dim != around.action_dim:
        raise ValueError(
            f"the policy '{name}' acts with {action_dim} dims per step, but the environment takes "
            f"{around.action_dim}; was it trained on another robot?"
        )
    for task in around.tasks:
        if task not in tasks:
            raise unknown_name(f"task for the policy '{name}'", task, tasks, hint="Leave the task or the policy out.")


class NoisyPolicy:
    """A policy with correlated Gaussian noise on its actions, keyed by episode and step, so equal in both worlds.

    noise: standard deviation, in units of the actions. correlation: of neighbouring steps, in [0, 1).
    """

    def __init__(self, policy: Policy, noise: float, correlation: float, *, seed: int = 0) -> None:
        if not noise > 0 or not 0 <= correlation < 1:
            raise ValueError(f"noise is {noise} and correlation {correlation}; they must be above 0, and in [0, 1)")
        self.policy, self.noise, self.correlation, self.seed = policy, noise, correlation, seed

    def initial_state(self, rows: int) -> PolicyState:
        index = torch.arange(rows)
        return TensorDict(
            {
                "row": index,
                "noise_step": torch.zeros_like(index),
                "offset": torch.zeros(rows, 0),
                "inner": self.policy.initial_state(rows),
            },
            batch_size=[rows],
        )

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        policy_state = policy_state.copy()
        inner = policy_state["inner"].copy()
        inner["row"] = policy_state["row"]
        action, policy_state["inner"] = self.policy.act(observation, inner, is_init)
        fresh = is_init.reshape(-1)
        step = policy_state["noise_step"].masked_fill(fresh, 0)
        key = NoiseKey(row=policy_state["row"], step=step, seed=self.seed).fold(_FOLD)
        draw = key.normal(action.shape[1])
        before = policy_state["offset"] if policy_state["offset"].shape[1] else torch.zeros_like(draw)
        rho = self.correlation
        offset = torch.where(fresh[:, None], draw, rho * before + (1 - rho**2) ** 0.5 * draw)
        policy_state["noise_step"], policy_state["offset"] = step + 1, offset
        return (action + self.noise * offset.to(action)).clamp(-1.0, 1.0), policy_state


class FunctionPolicy:
    """A function from an observation [B] (a TensorDict with `task`) to actions [B, A], without memory."""

    def __init__(self, function: Callable[[TensorDict], Any], name: str) -> None:
        self.function, self.name = function, name

    def initial_state(self, rows: int) -> PolicyState:
        return TensorDict({}, batch_size=[rows])

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        action = torch.as_tensor(np.asarray(self.function(observation)), dtype=torch.float32)
        return action.clamp(-1.0, 1.0), policy_state


def from_callable(target: str, arguments: Mapping[str, Any] | None = None) -> Policy:
    """The policy at the import path `package.module:name`.

    A class, or anything with `arguments`, is called with them and has to give a `Policy`; an object that already is one
    is taken as it is; any other function is asked for actions [B, A] at every step (`FunctionPolicy`).
    """
    module_name, colon, name = target.partition(":")
    if not colon or not name:
        raise ValueError(f"target is '{target}', but must be an import path such as my_package.my_module:my_policy")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the policy '{target}' cannot be imported: {error}") from error
    made: Any = found
    if inspect.isclass(found) or arguments is not None:
        made = found(**(arguments or {}))
    if isinstance(made, Policy):
        return made
    if not inspect.isroutine(made) or made is not found:
        raise ValueError(f"the policy '{target}' gave a {type(made).__name__}, which has no act and initial_state")
    return FunctionPolicy(made, target)


class SB3Policy:
    """A Stable-Baselines3 model, acting deterministically on the observation keys that it was trained on."""

    def __init__(self, model: Any, keys: Sequence[str] | None, path: str) -> None:
        self.model, self.keys, self.path = model, keys, path

    def initial_state(self, rows: int) -> PolicyState:
        return TensorDict({}, batch_size=[rows])

    def act(self, observation: TensorDict, policy_state: PolicyState, is_init: Tensor) -> tuple[Tensor, PolicyState]:
        given: Any
        if self.keys is None:
            given = {}
            for key, space in self.model.observation_space.spaces.items():
                if key not in observation.keys():
                    raise ValueError(
                        f"the policy {self.path} reads '{key}', but policies see "
                        f"{', '.join(map(str, observation.keys()))}"
                    )
                given[key] = observation[key].cpu().numpy().reshape(-1, *space.shape)
        else:
            given = torch.cat([observation[key].flatten(1) for key in self.keys], dim=1).cpu().numpy()
        action, _ = self.model.predict(given, deterministic=True)
        return torch.as_tensor(action, dtype=torch.float32).clamp(-1.0, 1.0), policy_state


def load_sb3(
    path: str, algorithm: str, *, trust: bool, action_dim: int, observation: Sequence[str] | str | None = None
) -> SB3Policy:
    """The policy of a Stable-Baselines3 zip.

    observation: for a policy of one flat observation, the keys that it is made of, in order.

    Raises:
        ValueError: without trust=true, since a zip holds pickles, which run code when they are read; for an algorithm
            that SB3 does not have, or a policy for other actions. FileNotFoundError: no such file.
    """
    if not trust:
        raise ValueError(
            f"{path}: a Stable-Baselines3 zip holds pickles, and reading one runs whatever code is in it. If you made "
            "it or trust who did, write {kind: sb3, path: " + path + ", trust: true}"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    if algorithm not in _SB3:
        raise unknown_name("algorithm of Stable-Baselines3", algorithm, _SB3)
    try:
        import stable_baselines3
    except ModuleNotFoundError as error:
        raise ValueError('Stable-Baselines3 is not installed; run: pip install "wamrl[sb3]"') from error
    model = getattr(stable_baselines3, algorithm).load(path, device="cpu")
    if tuple(model.action_space.shape or ()) != (action_dim,):
        raise ValueError(
            f"the policy {path} acts in {model.action_space}, but the environment takes {action_dim} numbers in [-1, 1]"
        )
    keys = [observation] if isinstance(observation, str) else observation
    if keys is None and not hasattr(model.observation_space, "spaces"):
        raise ValueError(
            f"the policy {path} reads one flat observation {model.observation_space}; name the keys that it is made "
            "of, in order, as in observation: [state]"
        )
    return SB3Policy(model, keys, path)
