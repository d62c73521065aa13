"""The feature substrate: what it learns tells images apart, and cannot be decoded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wamrl.models.feature import FeatureTeacher
from wamrl.models.images import unit_images

SHAPE = (3, 32, 48)


def squares(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images of a square, and its place [X, 2] in pixels."""
    images = torch.zeros(count, *SHAPE, dtype=torch.uint8)
    place = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    place = (place * torch.tensor([SHAPE[1] - 10.0, SHAPE[2] - 10.0])).long()
    for image, (y, x) in zip(images, place.tolist(), strict=True):
        image[:, y : y + 10, x : x + 10] = 255
    return images, place.float()


def small() -> FeatureTeacher:
    torch.manual_seed(0)
    substrate = FeatureTeacher({"pixels": SHAPE}, features=8, channels=8, rate=0.05)
    substrate.learn()
    return substrate


def missed_px(substrate: FeatureTeacher) -> float:
    """How far a linear read-out of the tokens, fitted on 512 images, misses the square's place on others."""

    def tokens(images: Tensor) -> Tensor:
        flat = substrate.encode({"pixels": images}).flatten(1)
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)

    with torch.no_grad():
        (images, place), (others, truth) = squares(512), squares(128, seed=1)
        read = torch.linalg.lstsq(tokens(images), place).solution
        return float((tokens(others) @ read - truth).norm(dim=1).mean())


def test_the_features_of_a_trained_teacher_tell_where_things_are() -> None:
    substrate, noise = small(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam((p for p in substrate.parameters() if p.requires_grad), lr=2e-3)
    images = unit_images(squares(512)[0], SHAPE)
    untrained = missed_px(substrate)
    for _ in range(150):
        chosen = images[torch.randint(len(images), (64,), generator=noise)]
        losses = substrate.loss(chosen, torch.zeros(64, dtype=torch.int64), noise)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        substrate.update()
    trained = missed_px(substrate)
    assert trained < 2.5 and trained < 0.8 * untrained, (trained, untrained)
    tokens = substrate.encode({"pixels": squares(256, seed=2)[0]})
    assert tokens.shape == (256, 6, 8)
    assert tokens.std(dim=0).mean() > 0.5, "every image has the same features"
    assert 0.5 < tokens.std() < 2.0


def test_the_teacher_follows_the_student_and_gets_no_gradient() -> None:
    substrate = small()
    images = unit_images(squares(16)[0], SHAPE)
    before = [p.clone() for p in substrate.teacher.parameters()]
    substrate.loss(images, torch.zeros(16, dtype=torch.int64), torch.Generator())["loss"].backward()
    assert all(p.grad is None for p in substrate.teacher.parameters())
    assert all(p.grad is not None for p in substrate.student.parameters())
    with torch.no_grad():
        for parameter in substrate.student.parameters():
            parameter += 1.0
    substrate.update()
    for parameter, old in zip(substrate.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old + 0.05)


def test_it_is_encoder_only_and_says_so() -> None:
    substrate = small()
    assert substrate.decodes == ()
    with pytest.raises(ValueError, match="FeatureTeacher is encoder-only"):
        substrate.decode(torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match="cut into tokens of 16"):
        FeatureTeacher({"pixels": (3, 24, 32)})
    with pytest.raises(ValueError, match="between 0 and 1"):
        FeatureTeacher({"pixels": SHAPE}, blanked=1.0)
