"""Pretrained autoencoders of diffusers as tokenizers: `AutoencoderKL` (Stable Diffusion) and `AutoencoderKLWan` (Wan).

They are read from a local directory, as diffusers saves them; nothing is downloaded. Frames are encoded one by one, the
video autoencoder's as clips of one frame, so that tokens of a frame do not depend on what came before.

Letters: X images, C latent channels, h x w latent grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wamrl.models.images import ImageSubstrate
from wamrl.naming import RunError


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise RunError('pretrained autoencoders need diffusers; run: pip install "wamrl[foundation]"') from error
    return diffusers


class FoundationLatent(ImageSubstrate):
    """Latents of an autoencoder of diffusers; its two kinds are below.

    observation: the camera's key -> [3, H, W], multiples of the autoencoder's stride times patch. autoencoder: its
    config.json as plain values. patch: latent cells per side of a token.
    """

    name: str
    made_by: str

    def __init__(
        self, observation: Mapping[str, Sequence[int]], *, autoencoder: Mapping[str, Any], patch: int = 2
    ) -> None:
        plain = {name: value for name, value in autoencoder.items() if not name.startswith("_")}
        network = getattr(_diffusers(), self.made_by).from_config(plain)
        mean, std, stride = self.facts(network.config)
        super().__init__(observation, channels=len(mean), stride=stride, patch=patch)
        self.decodes = (self.key,)
        self.config = {"name": self.name, "keys": [self.key], "patch": patch, "autoencoder": plain}
        self.network = network.eval()
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.requires_grad_(False)

    @staticmethod
    def facts(config: Any) -> tuple[Tensor, Tensor, int]:
        """Mean and deviation [C] of the latents as the autoencoder states them, and pixels per latent cell."""
        raise NotImplementedError

    def describe(self) -> str:
        return "pixel"


class ImageAutoencoder(FoundationLatent):
    """`AutoencoderKL`: one factor for all channels, and perhaps a shift."""

    name, made_by = "autoencoder_kl", "AutoencoderKL"

    @staticmethod
    def facts(config: Any) -> tuple[Tensor, Tensor, int]:
        channels = config.latent_channels
        mean = torch.full((channels,), float(config.get("shift_factor") or 0.0))
        return (
            mean,
            torch.full((channels,), 1.0 / float(config.scaling_factor)),
            2 ** (len(config.block_out_channels) - 1),
        )

    def latents(self, images: Tensor) -> Tensor:
        return self.network.encode(2.0 * images - 1.0).latent_dist.mode()

    def images(self, latents: Tensor) -> Tensor:
        return 0.5 * (self.network.decode(latents).sample + 1.0)


class VideoAutoencoder(FoundationLatent):
    """`AutoencoderKLWan`, on clips of one frame: mean and deviation per channel."""

    name, made_by = "autoencoder_kl_wan", "AutoencoderKLWan"

    @staticmethod
    def facts(config: Any) -> tuple[Tensor, Tensor, int]:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        if not len(mean) == len(std) == config.z_dim:
            raise ValueError(f"latents_mean has {len(mean)} numbers, but the autoencoder has {config.z_dim} channels")
        return mean, std, 2 ** (len(config.dim_mult) - 1) * (config.get("patch_size") or 1)  # Wan 2.2 patches its input

    def latents(self, images: Tensor) -> Tensor:
        return self.network.encode((2.0 * images - 1.0).unsqueeze(2)).latent_dist.mode().squeeze(2)

    def images(self, latents: Tensor) -> Tensor:
        return 0.5 * (self.network.decode(latents.unsqueeze(2)).sample.squeeze(2) + 1.0)


# What diffusers calls a class -> ours, and where one is published.
CLASSES: dict[str, tuple[type[FoundationLatent], str]] = {
    "AutoencoderKL": (ImageAutoencoder, "stabilityai/sd-vae-ft-mse"),
    "AutoencoderKLWan": (VideoAutoencoder, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, its folder vae"),
}


def advice() -> str:
    """What to download for a pretrained autoencoder."""
    wanted = " or ".join(f"{name} ({source})" for name, (_, source) in CLASSES.items())
    return (
        f"Nothing is downloaded here: on a machine with a network, fetch an {wanted} from the Hugging Face hub into a "
        "directory with its config.json and diffusion_pytorch_model.safetensors, and give that"
    )


def load_foundation(
    path: str | os.PathLike[str], observation: Mapping[str, Sequence[int]], *, patch: int = 2
) -> FoundationLatent:
    """The autoencoder that diffusers saved in the directory `path`, for the camera of `observation`: key -> [3, H, W].

    Raises:
        FileNotFoundError: no such directory, or one without an autoencoder; the message says what to download.
        RunError: when diffusers is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no autoencoder at '{folder}': there is no such directory. {advice()}")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no autoencoder at '{folder}': {name} is missing. {advice()}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = str(config.get("_class_name"))
    if found not in CLASSES:
        raise ValueError(f"'{folder}' holds a {found}, but the autoencoders known here are {', '.join(CLASSES)}")
    network = getattr(_diffusers(), found).from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    substrate = CLASSES[found][0](observation, autoencoder=dict(config), patch=patch)
    substrate.network.load_state_dict(network.state_dict())
    return substrate
