"""Substrates: what a World Action Model predicts. One frame of an observation becomes L tokens of D numbers.

A substrate has no noise, no time and no action in it: backbones and couplings work on its tokens whatever they are.

Letters: L tokens per frame, D numbers per token.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from wamrl.interfaces import Layout
from wamrl.naming import unknown_name

SUBSTRATES = {
    "geometric": "wamrl.models.substrate.GeometricSubstrate",
    "pixel": "wamrl.models.images.PixelLatent",
    "feature": "wamrl.models.feature.FeatureTeacher",
    "autoencoder_kl": "wamrl.models.foundation.ImageAutoencoder",
    "autoencoder_kl_wan": "wamrl.models.foundation.VideoAutoencoder",
}
"""Name in a model's YAML -> class. A class is imported when it is asked for."""


USUAL_CHANGE = 0.25
"""Root mean square of what a number of unit variance changes by in one control step, where a substrate does not say."""


class Substrate(nn.Module):
    """What is predicted: `encode` to tokens of about unit variance, and `decode` where that exists.

    keys: observation keys that `encode` reads. tokens: L. width: D. decodes: keys that `decode` gives.
    used: [L, D] bool, False where a token is padded. change: [L, D], root mean square of what a number of a token
    changes by in one control step, or None where it is not known: models then predict tokens, not changes.
    """

    keys: tuple[str, ...]
    tokens: int
    width: int
    decodes: tuple[str, ...] = ()
    used: Tensor
    change: Tensor | None

    def encode(self, observation: TensorDict) -> Tensor:
        """Tokens [..., L, D] of an observation [...]."""
        raise NotImplementedError

    def decode(self, tokens: Tensor, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        """Observation keys [..., *shape] of tokens [..., L, D]; of `keys` at least, None is all."""
        raise ValueError(f"{type(self).__name__} is encoder-only: its tokens decode to no observation")

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the training data's `mean`, `std` and `change` per observation key, before training."""

    def change_or_usual(self) -> Tensor:
        """[L, D] `change`, and `USUAL_CHANGE` where it is not known."""
        return USUAL_CHANGE * self.used if self.change is None else self.change

    def shares(self, moves: Tensor) -> Tensor:
        """[L, D] share of each number that `moves` [L, D] in an error; they sum to 1, or to 0 where nothing moves."""
        return moves / moves.sum().clamp(min=1)

    def describe(self) -> str:
        """Its name on the survey's axis of substrates (arXiv 2606.20781)."""
        return type(self).__name__.removesuffix("Substrate").lower()

    def fingerprint(self) -> str:
        """A hash of all that decides what tokens mean, so that cached tokens of another substrate are refused."""
        digest = hashlib.sha256(json.dumps([type(self).__name__, self.keys, self.tokens, self.width]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


class GeometricSubstrate(Substrate):
    """Tracks of hand, objects and goal: one token per track, the standardised numbers that describe it.

    observation: key -> shape of the (vector) keys to read. tracks: track -> key -> indices into that key. None is those
    of the `layout` where they hold every number, else one track per key with all its numbers. Every number of every key
    must be in some track, so that `decode` gives the whole observation; where several hold it, the first counts.
    """

    mean: Tensor
    std: Tensor
    where: Tensor
    source: Tensor

    def __init__(
        self,
        observation: Mapping[str, Sequence[int]],
        tracks: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        for key, shape in observation.items():
            if len(shape) != 1:
                raise ValueError(
                    f"the geometric substrate reads vectors, but '{key}' has shape {tuple(shape)}; images need a pixel "
                    "substrate, or leave the key out with observation=[...]"
                )
        self.shapes = {key: int(shape[0]) for key, shape in observation.items()}
        if tracks is None:
            tracks = self._usual_tracks(Layout.of(layout, observation).tracks)
        offsets, total = {}, 0
        for key, size in self.shapes.items():
            offsets[key], total = total, total + size
        rows: list[list[int]] = []
        for track, parts in tracks.items():
            row = []
            for key, indices in parts.items():
                if key not in self.shapes:
                    raise ValueError(
                        f"track '{track}' reads the observation key '{key}', but the model reads "
                        f"{', '.join(self.shapes)}; add it with observation=[...], or leave it out of the track"
                    )
                wrong = [i for i in indices if not 0 <= i < self.shapes[key]]
                if wrong:
                    raise ValueError(f"track '{track}': '{key}' has {self.shapes[key]} numbers, none at {wrong}")
                row += [offsets[key] + i for i in indices]
            rows.append(row)
        lost = sorted(set(range(total)) - {i for row in rows for i in row})
        if lost:
            raise ValueError(f"number(s) {lost} of the observation are in no track, so they could not be decoded")
        self.keys = self.decodes = tuple(self.shapes)
        self.tokens, self.width = len(rows), max(map(len, rows))
        where = torch.full((self.tokens, self.width), -1)
        for number, row in enumerate(rows):
            where[number, : len(row)] = torch.tensor(row)
        flat = where.flatten().tolist()
        self.register_buffer("where", where.clamp(min=0), persistent=False)
        self.register_buffer("used", where >= 0, persistent=False)
        self.register_buffer("source", torch.tensor([flat.index(i) for i in range(total)]), persistent=False)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("std", torch.ones(total))
        self.register_buffer("change", torch.ones(self.tokens, self.width))

    def _usual_tracks(
        self, stated: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> Mapping[str, Mapping[str, Sequence[int]]]:
        held = {(key, i) for parts in stated.values() for key, indices in parts.items() for i in indices}
        if held == {(key, i) for key, size in self.shapes.items() for i in range(size)}:
            return stated
        return {key: {key: list(range(size))} for key, size in self.shapes.items()}

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Mean, std and change per number; one that never varies keeps a deviation of one."""
        stacked = {
            name: torch.cat([torch.as_tensor(statistics[key][name]).flatten() for key in self.keys])
            for name in ("mean", "std", "change")
        }
        self.mean.copy_(stacked["mean"])
        self.std.copy_(stacked["std"].where(stacked["std"] > 1.001e-3, 1.0))
        assert self.change is not None
        self.change.copy_((stacked["change"] / self.std)[self.where] * self.used)

    def encode(self, observation: TensorDict) -> Tensor:
        for key in self.keys:
            if key not in observation.keys():
                raise ValueError(
                    f"the observation lacks '{key}', which this model reads; it has "
                    f"{', '.join(map(str, observation.keys())) or 'nothing'}"
                )
        flat = torch.cat([observation[key].float() for key in self.keys], dim=-1)
        return ((flat - self.mean) / self.std)[..., self.where] * self.used

    def decode(self, tokens: Tensor, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        flat = tokens.flatten(-2)[..., self.source] * self.std + self.mean
        return dict(zip(self.keys, flat.split(list(self.shapes.values()), dim=-1), strict=True))


class JointSubstrate(Substrate):
    """Several substrates side by side (pixel AND geometric, ...): their tokens, padded to the widest, in one frame."""

    def __init__(self, parts: Sequence[Substrate]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
        self.decodes = tuple(dict.fromkeys(key for part in parts for key in part.decodes))
        self.tokens, self.width = sum(part.tokens for part in parts), max(part.width for part in parts)
        self.register_buffer("used", torch.cat([self._padded(part.used) for part in parts]), persistent=False)

    @property
    def change(self) -> Tensor | None:  # type: ignore[override]
        """Of all parts; None as soon as one part does not know its own."""
        known = [part.change for part in self._parts()]
        return None if any(c is None for c in known) else torch.cat([self._padded(c) for c in known if c is not None])

    def change_or_usual(self) -> Tensor:
        return torch.cat([self._padded(part.change_or_usual()) for part in self._parts()])

    def shares(self, moves: Tensor) -> Tensor:
        """All parts count the same, however many numbers they have.

        Of 256 of an image and 4 of a hand, the hand's are the ones that actions move first.
        """
        sizes = [part.tokens for part in self._parts()]
        own = [part.shares(at) for part, at in zip(self._parts(), moves.split(sizes), strict=True)]
        return torch.cat(own) / max(1, sum(bool(share.any()) for share in own))

    def set_normalisation(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        for part in self._parts():
            part.set_normalisation(statistics)

    def encode(self, observation: TensorDict) -> Tensor:
        return torch.cat([self._padded(part.encode(observation)) for part in self._parts()], dim=-2)

    def decode(self, tokens: Tensor, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        decoded: dict[str, Tensor] = {}
        for part, own in zip(self._parts(), tokens.split([p.tokens for p in self._parts()], dim=-2), strict=True):
            # Images take long to decode, so a part that has nothing to add is left alone.
            wanted = set(part.decodes) - set(decoded)
            if wanted if keys is None else wanted & set(keys):
                decoded = {**part.decode(own[..., : part.width], keys), **decoded}
        return decoded

    def describe(self) -> str:
        return " and ".join(part.describe() for part in self._parts())

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self._parts()).encode()).hexdigest()[:16]

    def _parts(self) -> list[Substrate]:
        return [part for part in self.parts if isinstance(part, Substrate)]

    def _padded(self, tokens: Tensor) -> Tensor:
        return nn.functional.pad(tokens, (0, self.width - tokens.shape[-1]))


def make_substrate(
    config: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    observation: Mapping[str, Sequence[int]],
    layout: Layout | None = None,
) -> Substrate:
    """The substrate of a model's YAML: `{name: ..., **arguments}`, or a list of those for a joint one.

    observation: key -> shape of what the model reads. An argument `keys` keeps a substrate to those. layout: of the
    observation, for the substrate that has tracks.

    Raises:
        ValueError: an unknown name, or keys that the observation lacks.
    """
    if not isinstance(config, Mapping):
        return JointSubstrate([make_substrate(part, observation, layout) for part in config])
    arguments = dict(config)
    name = str(arguments.pop("name", ""))
    if name not in SUBSTRATES:
        raise unknown_name("substrate", name, SUBSTRATES)
    keys = arguments.pop("keys", None) or list(observation)
    for key in keys:
        if key not in observation:
            raise ValueError(
                f"the {name} substrate reads '{key}', but the model's observation is {', '.join(observation)}; "
                "add it with observation=[...]"
            )
    if name == "geometric":
        arguments["layout"] = layout
    module, _, cls = SUBSTRATES[name].rpartition(".")
    built = getattr(importlib.import_module(module), cls)({key: observation[key] for key in keys}, **arguments)
    assert isinstance(built, Substrate)
    return built
