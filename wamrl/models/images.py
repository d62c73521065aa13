"""Substrates of camera images: what an image has to look like, cached tokens, and the pixel latent of a small VAE.

Images are [3, H, W], channels first: uint8 of 0..255, as environments and datasets give them, or float in [0, 1].

Letters: L tokens of a frame, D numbers of a token, X images, C latent channels, h x w latent grid, P patch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.models.substrate import Substrate


def unit_images(images: Tensor, shape: Sequence[int], key: str = "pixels") -> Tensor:
    """`images` [..., 3, H, W] as float in [0, 1].

    Raises:
        ValueError: another shape or order of channels, a dtype that is neither uint8 nor float, or values out of range.
    """
    check_image_shape(tuple(images.shape[-3:]), shape, key)
    if images.dtype == torch.uint8:
        return images.float() / 255.0
    if not images.is_floating_point():
        raise ValueError(f"'{key}' is {images.dtype}, but images are uint8 of 0..255 or float in [0, 1]")
    images = images.float()
    if images.numel():
        low, high = (float(x) for x in torch.aminmax(images.detach()))
        if not (low >= -1e-3 and high <= 1.0 + 1e-3):  # also NaN
            raise ValueError(
                f"'{key}' holds floats from {low:.3g} to {high:.3g}, but float images span [0, 1]; divide by 255, or "
                "give them as uint8"
            )
    return images


def uint8_images(images: Tensor) -> Tensor:
    """Images in [0, 1] as environments give them, uint8 of 0..255."""
    return (255.0 * images).round().to(torch.uint8)


def check_image_shape(shape: Sequence[int], expected: Sequence[int], key: str = "pixels") -> None:
    """Raise ValueError unless `shape` is that of the images which a substrate was made for, [3, H, W]."""
    shape, expected = tuple(shape), tuple(expected)
    if shape == expected:
        return
    if len(shape) == 3 and shape[-1] == 3 and shape[0] != 3:
        raise ValueError(
            f"'{key}' has shape {shape}, channels last; images are [3, H, W] here, so permute(2, 0, 1) them first"
        )
    raise ValueError(
        f"'{key}' has shape {shape}, but the tokenizer was made for {expected}; set the camera's height and width as "
        "in its data, or train a tokenizer on these images"
    )


class ImageSubstrate(Substrate):
    """Tokens of one camera image; subclasses map images in [0, 1] to a latent grid [X, C, h, w] and perhaps back.

    A latent grid is standardised per channel by the buffers `mean` and `std` [C] and cut into patches of P x P cells:
    L = h w / P^2 tokens of D = C P^2 numbers.

    observation: the camera's key -> [3, H, W]. config: what `make_substrate` builds it again from. Weights are frozen,
    but for what `wamrl.models.tokenizer` trains.

    Observations may hold the tokens themselves under `cache_key`, as those of a dataset whose tokens were cached do;
    then nothing is encoded.
    """

    mean: Tensor
    std: Tensor
    config: dict[str, Any]

    def __init__(self, observation: Mapping[str, Sequence[int]], *, channels: int, stride: int, patch: int) -> None:
        super().__init__()
        if len(observation) != 1:
            raise ValueError(
                f"this substrate reads one camera, not {', '.join(observation) or 'none'}; write keys: [pixels]"
            )
        ((self.key, shape),) = observation.items()
        check_image_shape(shape, (3, *tuple(shape)[1:]), self.key)
        self.image_shape, self.patch = tuple(shape), patch
        side = stride * patch
        if patch < 1 or self.image_shape[1] % side or self.image_shape[2] % side:
            raise ValueError(
                f"images of {self.image_shape[1]} x {self.image_shape[2]} pixels cannot be cut into tokens of {side} x "
                f"{side}: a latent is {stride} pixels wide, and patch is {patch}; choose sizes that divide"
            )
        self.cells = (self.image_shape[1] // side, self.image_shape[2] // side)
        self.keys, self.cache_key = (self.key,), f"{self.key}_tokens"
        self.tokens, self.width = self.cells[0] * self.cells[1], channels * patch**2
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("used", torch.ones(self.tokens, self.width, dtype=torch.bool), persistent=False)
        self.change = None

    def latents(self, images: Tensor) -> Tensor:
        """[X, C, h, w], not standardised, of images [X, 3, H, W] in [0, 1]."""
        raise NotImplementedError

    def images(self, latents: Tensor) -> Tensor:
        """[X, 3, H, W], not clamped, of latents [X, C, h, w]."""
        raise NotImplementedError

    def encode(self, observation: TensorDict | Mapping[str, Any]) -> Tensor:
        if self.cache_key in observation.keys():
            tokens = observation[self.cache_key]
            if tuple(tokens.shape[-2:]) != (self.tokens, self.width):
                raise ValueError(
                    f"'{self.cache_key}' has shape {tuple(tokens.shape)}, but this tokenizer gives "
                    f"[..., {self.tokens}, {self.width}]; were the tokens cached with another one?"
                )
            return tokens.float()
        if self.key not in observation.keys():
            raise ValueError(
                f"the observation lacks '{self.key}', which this model reads; it has "
                f"{', '.join(map(str, observation.keys())) or 'nothing'}. A simulator gives images with env.pixels=true"
            )
        images = unit_images(observation[self.key], self.image_shape, self.key)
        latents = self.latents(images.reshape(-1, *self.image_shape))
        return self._tokens(latents).unflatten(0, images.shape[:-3]) if images.ndim > 3 else self._tokens(latents)[0]

    def decode(self, tokens: Tensor, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        if not self.decodes:
            return super().decode(tokens)
        cells = tokens.reshape(-1, self.tokens, self.width).transpose(1, 2).unflatten(2, self.cells)
        latents = F.pixel_shuffle(cells, self.patch) * self.std[:, None, None] + self.mean[:, None, None]
        images = self.images(latents).float().clamp(0.0, 1.0)
        return {self.key: images.reshape(*tokens.shape[:-2], *self.image_shape)}

    def _tokens(self, latents: Tensor) -> Tensor:
        standard = (latents - self.mean[:, None, None]) / self.std[:, None, None]
        return F.pixel_unshuffle(standard, self.patch).flatten(2).transpose(1, 2)


class TrainedSubstrate(ImageSubstrate):
    """One that `wamrl.models.tokenizer.Tokenizer` trains: it has a loss and finds its latents' statistics itself."""

    seen: Tensor

    def __init__(self, observation: Mapping[str, Sequence[int]], *, channels: int, stride: int, patch: int) -> None:
        super().__init__(observation, channels=channels, stride=stride, patch=patch)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._moments: tuple[Tensor, Tensor] | None = None

    def learn(self) -> None:
        """Let the weights take gradients."""
        self.requires_grad_(True)

    def loss(self, images: Tensor, task: Tensor, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Named scalars of images [X, 3, H, W] in [0, 1]; `loss` is to be minimised. `task` [X] int64 tells scenes."""
        raise NotImplementedError

    def see(self, latents: Tensor) -> None:
        """Keep the moments of a batch's latents [X, C, h, w] for the next `update`."""
        latents = latents.detach().float()
        self._moments = (latents.mean((0, 2, 3)), latents.square().mean((0, 2, 3)))

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser: move the stored mean and deviation to those of the latest batch."""
        if self._moments is None:
            return
        mean, square = self._moments
        self.seen += 1
        rate = 1.0 / min(int(self.seen), 50)
        square = (self.std.square() + self.mean.square()).lerp(square, rate)
        self.mean.lerp_(mean, rate)
        self.std.copy_((square - self.mean.square()).clamp(min=1e-8).sqrt())
        self._moments = None


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width // 2, 3, padding=1),
            nn.GroupNorm(8, width // 2), nn.SiLU(), nn.Conv2d(width // 2, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def conv_encoder(channels: int, outputs: int) -> nn.Sequential:
    """Images [X, 3, H, W] to a grid [X, outputs, H/8, W/8]: three strided convolutions and a residual block."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(channels, 2 * channels, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(2 * channels, 4 * channels, 4, 2, 1),
        _Residual(4 * channels), nn.GroupNorm(8, 4 * channels), nn.SiLU(),
        nn.Conv2d(4 * channels, outputs, 1),
    )  # fmt: skip


class _Decoder(nn.Module):
    """Latents [X, C, h, w] to images [X, 3, 8 h, 8 w]; what a fixed camera always sees there is learned per cell."""

    def __init__(self, inputs: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, 4 * channels, 3, padding=1)
        self.scene = nn.Parameter(torch.zeros(4 * channels, *grid))
        self.layers = nn.Sequential(
            _Residual(4 * channels), nn.GroupNorm(8, 4 * channels), nn.SiLU(),
            nn.ConvTranspose2d(4 * channels, 2 * channels, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(channels, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(self.first(latents) + self.scene)


class PixelLatent(TrainedSubstrate):
    """Latents of a convolutional variational autoencoder (Kingma & Welling, 2014, arXiv:1312.6114), decoded to pixels.

    The encoder's mean is what is predicted; its variance only serves training, which `loss` and `update` do.

    observation: the camera's key -> [3, H, W], multiples of 8 times patch. channels: of the first convolution; deeper
    ones have two and four times as many. latent_channels: C. patch: P. kl_weight: of the divergence from a unit
    Gaussian, per latent number, beside the squared error per image number in units of [-1, 1]. foreground_weight: how
    many times more an image number counts that differs from what the batch's images of the task show on average.
    """

    def __init__(
        self,
        observation: Mapping[str, Sequence[int]],
        *,
        channels: int = 32,
        latent_channels: int = 4,
        patch: int = 2,
        kl_weight: float = 1e-4,
        foreground_weight: float = 4.0,
    ) -> None:
        super().__init__(observation, channels=latent_channels, stride=8, patch=patch)
        self.decodes = (self.key,)
        self.config = {
            "name": "pixel", "keys": [self.key], "channels": channels, "latent_channels": latent_channels,
            "patch": patch, "kl_weight": kl_weight, "foreground_weight": foreground_weight,
        }  # fmt: skip
        self.kl_weight, self.foreground_weight = kl_weight, foreground_weight
        self.encoder = conv_encoder(channels, 2 * latent_channels)
        self.decoder = _Decoder(latent_channels, channels, (self.image_shape[1] // 8, self.image_shape[2] // 8))
        self.requires_grad_(False)

    def describe(self) -> str:
        return "pixel"

    def latents(self, images: Tensor) -> Tensor:
        return self.encoder(2.0 * images - 1.0).chunk(2, dim=1)[0]

    def images(self, latents: Tensor) -> Tensor:
        return 0.5 * (self.decoder(latents) + 1.0)

    def loss(self, images: Tensor, task: Tensor, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Negative evidence bound of images [X, 3, H, W] in [0, 1]; `task` [X] int64 groups those of one scene."""
        wanted = 2.0 * images - 1.0
        mean, log_variance = self.encoder(wanted).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 10.0)
        draw = torch.randn(mean.shape, generator=noise, device=mean.device)
        shown = self.decoder(mean + (0.5 * log_variance).exp() * draw).float()
        square = (shown - wanted).square()
        weight = 1.0 + self.foreground_weight * _foreground(images, task)
        reconstruction = (weight * square).sum() / weight.expand_as(square).sum()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        self.see(mean)
        mse = ((shown.detach().clamp(-1.0, 1.0) - wanted) / 2.0).square().flatten(1).mean(1)
        return {
            "loss": reconstruction + self.kl_weight * kl,
            "reconstruction": reconstruction.detach(),
            "kl": kl.detach(),
            "psnr_db": (-10.0 * mse.clamp(min=1e-10).log10()).mean(),
        }


def _foreground(images: Tensor, task: Tensor) -> Tensor:
    """[X, 1, H, W] from 0 to 1: how far a pixel is from the mean over the batch's images of its task, full at 0.1."""
    same = (task[:, None] == task[None, :]).float()
    scene = (same / same.sum(1, keepdim=True)) @ images.flatten(1)
    away = (images - scene.view_as(images)).abs().amax(1, keepdim=True)
    return (away / 0.1).clamp(max=1.0)
