"""What substrates promise: tokens that compose, and a fingerprint that tells tokenizers apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wamrl.models.substrate import Joint, Substrate


class Scaled(Substrate):
    """`size` numbers of `key` as one token each, times a weight."""

    def __init__(self, key: str, size: int, *, width: int = 1, decodes: bool = True) -> None:
        super().__init__()
        self.keys, self.tokens, self.width = (key,), size, width
        self.decodes = (key,) if decodes else ()
        self.config = {"key": key, "size": size, "width": width}
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def encode(self, observation) -> Tensor:
        return (
            (observation[self.keys[0]] * self.weight).unsqueeze(-1).expand(*observation[self.keys[0]].shape, self.width)
        )

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        return {self.keys[0]: tokens[..., 0] / self.weight} if self.decodes else super().decode(tokens)


def test_a_joint_substrate_gives_the_tokens_of_its_parts_and_decodes_them_again() -> None:
    joint = Joint([Scaled("a", 3), Scaled("b", 2, width=4)])
    seen = {"a": torch.rand(5, 7, 3), "b": torch.rand(5, 7, 2)}
    tokens = joint.encode(seen)
    assert tokens.shape == (5, 7, joint.tokens, joint.width) == (5, 7, 5, 4)
    assert (tokens[..., :3, 1:] == 0).all() and (tokens[..., 3:, 1:] != 0).all()
    decoded = joint.decode(tokens)
    for key, value in seen.items():
        torch.testing.assert_close(decoded[key], value)


def test_a_part_without_a_decoder_is_left_out_and_alone_it_says_so() -> None:
    joint = Joint([Scaled("a", 3), Scaled("b", 2, decodes=False)])
    assert joint.decodes == ("a",)
    assert set(joint.decode(torch.zeros(1, 5, 1))) == {"a"}
    with pytest.raises(ValueError, match="encoder-only"):
        Joint([Scaled("b", 2, decodes=False)]).decode(torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="decode the same"):
        Joint([Scaled("a", 3), Scaled("a", 3)])


def test_the_fingerprint_changes_with_weights_and_config_only() -> None:
    first, second = Scaled("a", 3), Scaled("a", 3)
    assert first.fingerprint() == second.fingerprint() and len(first.fingerprint()) == 64
    assert Scaled("a", 4).fingerprint() != first.fingerprint()
    with torch.no_grad():
        second.weight += 1e-6
    assert first.fingerprint() != second.fingerprint()
    assert Joint([first]).fingerprint() != Joint([second]).fingerprint()
