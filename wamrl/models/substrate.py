"""Substrates: the space in which a World Action Model predicts (arXiv 2606.20781), as tokens of one frame.

A substrate turns observations into L tokens of width D, standardised to about unit variance, and where it can, tokens
back into observations. A model that predicts tokens thereby works with any of them: VAE latents, features, tracks of
poses, or several at once (`Joint`).

Letters: L tokens of a frame, D numbers of a token; [...] any leading dims (batch, time).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


class Substrate(torch.nn.Module):
    """What is predicted. Subclasses set the attributes and implement `encode`, and `decode` where there is one.

    keys: observation keys that `encode` reads. tokens: L. width: D. decodes: observation keys that `decode` gives.
    config: the plain values that it was built with; with the weights they make its fingerprint.
    """

    keys: tuple[str, ...]
    tokens: int
    width: int
    decodes: tuple[str, ...] = ()
    config: Mapping[str, Any]

    def encode(self, observation: TensorDict | Mapping[str, Any]) -> Tensor:
        """[..., L, D] standardised tokens of observations with leading dims [...].

        Raises:
            ValueError: a missing key, or a shape, dtype or range that the substrate was not made for.
        """
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        """The keys of `decodes` from tokens [..., L, D]; images are float in [0, 1].

        Raises:
            ValueError: when this substrate does not decode.
        """
        raise ValueError(
            f"{type(self).__name__} is encoder-only: its tokens cannot be decoded to {', '.join(self.keys)}"
        )

    def fingerprint(self) -> str:
        """SHA-256 over class, config and weights: equal exactly when the same observation gives the same tokens."""
        config = json.dumps(self.config, sort_keys=True, default=list)
        digest = hashlib.sha256(f"{type(self).__name__}\0{config}\0".encode())
        for name, tensor in sorted(self.state_dict().items()):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Joint(Substrate):
    """Several substrates at once: their tokens one after the other, narrower ones padded with zeros to the widest."""

    def __init__(self, parts: Sequence[Substrate]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a joint substrate needs at least one part")
        self.parts = torch.nn.ModuleList(parts)
        self.keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
        self.tokens, self.width = sum(part.tokens for part in parts), max(part.width for part in parts)
        self.decodes = tuple(dict.fromkeys(key for part in parts for key in part.decodes))
        if len(self.decodes) < sum(len(part.decodes) for part in parts):
            raise ValueError(f"two parts of a joint substrate decode the same of {', '.join(self.decodes)}")
        self.config = {"kind": "joint", "parts": [dict(part.config) for part in parts]}

    def encode(self, observation: TensorDict | Mapping[str, Any]) -> Tensor:
        encoded = [part.encode(observation) for part in self._parts()]
        return torch.cat([torch.nn.functional.pad(x, (0, self.width - x.shape[-1])) for x in encoded], dim=-2)

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        if not self.decodes:
            return super().decode(tokens)
        decoded: dict[str, Tensor] = {}
        pieces = tokens.split([part.tokens for part in self._parts()], dim=-2)
        for part, piece in zip(self._parts(), pieces, strict=True):
            if part.decodes:
                decoded |= part.decode(piece[..., : part.width])
        return decoded

    def _parts(self) -> list[Substrate]:
        return list(self.parts)  # type: ignore[arg-type]
