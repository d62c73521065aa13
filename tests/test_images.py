"""Substrates of images: what they accept, that what they encode can be decoded, and their statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wamrl.image_quality import image_quality
from wamrl.models.images import PixelLatent, _foreground, unit_images
from wamrl.models.substrate import make_substrate
from wamrl.naming import UnknownNameError

SHAPE = (3, 16, 24)


def squares(count: int, seed: int = 0) -> Tensor:
    """uint8 images of a red square somewhere on a gradient that is always the same."""
    images = torch.zeros(count, *SHAPE, dtype=torch.uint8)
    images[:, 2] = torch.linspace(40, 200, SHAPE[2]).byte()
    draw = torch.Generator().manual_seed(seed)
    for image in images:
        y, x = (int(torch.randint(0, size - 5, (), generator=draw)) for size in SHAPE[1:])
        image[0, y : y + 5, x : x + 5] = 230
    return images


def small(**changes: object) -> PixelLatent:
    torch.manual_seed(0)
    return PixelLatent({"pixels": SHAPE}, channels=16, patch=1, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained() -> PixelLatent:
    tokenizer = small(latent_channels=8, foreground_weight=1.0)
    tokenizer.learn()
    noise, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam(tokenizer.parameters(), lr=4e-3)
    images = unit_images(squares(512), SHAPE)
    for _ in range(250):
        chosen = torch.randint(len(images), (32,), generator=noise)
        loss = tokenizer.loss(images[chosen], torch.zeros(32, dtype=torch.int64), noise)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        tokenizer.update()
    return tokenizer.requires_grad_(False)


def test_a_trained_vae_shows_images_it_never_saw(trained):
    held_out = squares(64, seed=1)
    shown = trained.decode(trained.encode({"pixels": held_out}))["pixels"]
    assert shown.dtype == torch.float32 and shown.min() >= 0.0 and shown.max() <= 1.0
    quality = image_quality((255 * shown).round().byte(), held_out)
    mean = held_out.float().mean(0).round().byte().expand_as(held_out)
    blind = image_quality(mean, held_out)
    assert quality["psnr_db"] > 24.0 and quality["psnr_db"] > blind["psnr_db"] + 5.0
    assert quality["ssim"] > blind["ssim"] + 0.05


def test_tokens_are_standardised(trained):
    tokens = trained.encode({"pixels": squares(256, seed=2)})
    assert tokens.shape == (256, trained.tokens, trained.width) == (256, 6, 8)
    assert tokens.mean().abs() < 0.3 and 0.7 < tokens.std() < 1.4


def test_leading_dims_stay_and_rows_do_not_influence_each_other(trained):
    images = squares(12)
    tokens = trained.encode({"pixels": images.view(3, 4, *SHAPE)})
    assert tokens.shape == (3, 4, 6, 8)
    torch.testing.assert_close(tokens[1, 2], trained.encode({"pixels": images[6]}))
    assert trained.decode(tokens)["pixels"].shape == (3, 4, *SHAPE)


def test_patches_are_cut_and_put_together_again_exactly():
    whole, patched = small(), PixelLatent({"pixels": (3, 16, 32)}, channels=16, patch=2)
    assert (whole.tokens, whole.width) == (6, 4) and (patched.tokens, patched.width) == (2, 16)
    tokens = torch.randn(5, 2, 16)
    latents = torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (1, 2)), 2)
    torch.testing.assert_close(patched._tokens(latents), tokens)


def test_uint8_and_float_images_give_the_same_tokens(trained):
    images = squares(4)
    torch.testing.assert_close(trained.encode({"pixels": images}), trained.encode({"pixels": images.float() / 255}))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (squares(2).float(), "0 to 230, but float images span"),
        (squares(2).int(), "torch.int32, but images are uint8"),
        (squares(2).permute(0, 2, 3, 1), "channels last"),
        (squares(2)[..., :16], "made for"),
        (torch.full((2, *SHAPE), torch.nan), "nan"),
    ],
)
def test_images_of_another_kind_are_refused(images, reason):
    with pytest.raises(ValueError, match=reason):
        small().encode({"pixels": images})


def test_cached_tokens_are_taken_as_they_are_unless_they_are_anothers(trained):
    tokens = trained.encode({"pixels": squares(3)}).half()
    taken = trained.encode({"pixels_tokens": tokens})
    assert taken.dtype == torch.float32 and torch.equal(taken, tokens.float())
    with pytest.raises(ValueError, match="cached with another"):
        trained.encode({"pixels_tokens": tokens[..., :4]})
    with pytest.raises(ValueError, match="lacks 'pixels'.*state"):
        trained.encode({"state": torch.zeros(3)})


def test_the_foreground_is_what_other_images_of_the_task_do_not_show():
    images = unit_images(squares(64), SHAPE)
    task = torch.arange(64) % 2
    images[1::2] = 1.0 - images[1::2]  # another task, another background
    square = (images[0, 0] > 0.5).unsqueeze(0)
    foreground = _foreground(images, task)
    assert foreground.shape == (64, 1, *SHAPE[1:])
    assert (foreground[0][square] == 1.0).all()
    alone = _foreground(torch.full((4, *SHAPE), 0.5), torch.zeros(4, dtype=torch.int64))
    assert (alone == 0.0).all()
    assert foreground[0][~square].mean() < 0.8 < 0.99 < _foreground(images, torch.zeros(64))[0][~square].mean()


def test_a_substrate_is_built_again_from_its_config(trained):
    again = make_substrate(trained.config, {"pixels": SHAPE, "state": (3,)})
    again.load_state_dict(trained.state_dict())
    assert again.fingerprint() == trained.fingerprint()
    torch.testing.assert_close(again.encode({"pixels": squares(2)}), trained.encode({"pixels": squares(2)}))
    with torch.no_grad():
        next(again.parameters()).mul_(1.001)
    assert again.fingerprint() != trained.fingerprint()
    with pytest.raises(UnknownNameError, match="did you mean 'pixel'"):
        make_substrate({"name": "pixels"}, {"pixels": SHAPE})
    with pytest.raises(ValueError, match="cannot be cut into tokens of 16 x 16"):
        PixelLatent({"pixels": (3, 16, 24)}, patch=2)
    with pytest.raises(ValueError, match="channels last"):
        PixelLatent({"pixels": (16, 24, 3)})
    with pytest.raises(ValueError, match="one camera, not left, right"):
        PixelLatent({"left": SHAPE, "right": SHAPE})


def test_it_stays_frozen_until_it_is_to_learn():
    substrate = small()
    assert not any(parameter.requires_grad for parameter in substrate.parameters())
    substrate.learn()
    assert all(parameter.requires_grad for parameter in substrate.parameters())


def test_pixels_and_tracks_are_predicted_together(trained):
    observation = {"pixels": SHAPE, "state": (5,)}
    joint = make_substrate([trained.config, {"name": "geometric", "keys": ["state"]}], observation)
    joint.parts[0].load_state_dict(trained.state_dict())  # type: ignore[union-attr, index]
    seen = {"pixels": squares(4), "state": torch.randn(4, 5)}
    tokens = joint.encode(seen)  # type: ignore[arg-type]
    assert tokens.shape == (4, 7, 8) and joint.describe() == "pixel and geometric" and joint.change is None
    decoded = joint.decode(tokens)
    torch.testing.assert_close(decoded["state"], seen["state"])
    torch.testing.assert_close(decoded["pixels"], trained.decode(trained.encode(seen))["pixels"])
    assert joint.used.sum() == 6 * 8 + 5
