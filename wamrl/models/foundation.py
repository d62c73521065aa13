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
from wamrl.naming import RunError, unknown_name

# What diffusers calls a class -> our kind, and where one that fits is published.
CLASSES = {
    "AutoencoderKL": ("autoencoder_kl", "stabilityai/sd-vae-ft-mse"),
    "AutoencoderKLWan": ("autoencoder_kl_wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, its folder vae"),
}


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise RunError('pretrained autoencoders need diffusers; run: pip install "wamrl[foundation]"') from error
    return diffusers


class FoundationLatent(ImageSubstrate):
    """Latents of an autoencoder of diffusers, frozen.

    kind: "autoencoder_kl" or "autoencoder_kl_wan". image_shape: [3, H, W], multiples of the autoencoder's stride times
    patch. autoencoder: its config.json as plain values. patch: latent cells per side of a token.
    """

    def __init__(
        self,
        *,
        kind: str,
        image_shape: Sequence[int],
        autoencoder: Mapping[str, Any],
        key: str = "pixels",
        patch: int = 2,
    ) -> None:
        names = {ours: name for name, (ours, _) in CLASSES.items()}
        if kind not in names:
            raise unknown_name("autoencoder", kind, names)
        plain = {name: value for name, value in autoencoder.items() if not name.startswith("_")}
        network = getattr(_diffusers(), names[kind]).from_config(plain)
        video = kind == "autoencoder_kl_wan"
        config = network.config
        stride = 2 ** (len(config.dim_mult if video else config.block_out_channels) - 1)
        stride *= config.get("patch_size") or 1  # of Wan 2.2
        channels = config.z_dim if video else config.latent_channels
        height, width = tuple(image_shape)[-2:]
        if height % stride or width % stride:
            raise ValueError(
                f"images of {height} x {width} pixels do not fit an autoencoder of stride {stride}; use multiples of it"
            )
        super().__init__(
            key=key, image_shape=image_shape, channels=channels, grid=(height // stride, width // stride), patch=patch
        )
        self.decodes = (key,)
        self.config = {"kind": kind, "image_shape": list(image_shape), "key": key, "patch": patch, "autoencoder": plain}
        self.video = video
        self.network = network.eval().requires_grad_(False)
        # Their own statistics: Wan per channel, Stable Diffusion one factor and perhaps a shift.
        if video:
            mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
            if len(mean) != channels or len(std) != channels:
                raise ValueError(f"latents_mean has {len(mean)} numbers, but the autoencoder has {channels} channels")
        else:
            mean = torch.full((channels,), float(config.get("shift_factor") or 0.0))
            std = torch.full((channels,), 1.0 / float(config.scaling_factor))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def latents(self, images: Tensor) -> Tensor:
        wanted = 2.0 * images - 1.0
        clip = wanted.unsqueeze(2) if self.video else wanted
        latents = self.network.encode(clip).latent_dist.mode()
        return latents.squeeze(2) if self.video else latents

    def images(self, latents: Tensor) -> Tensor:
        shown = self.network.decode(latents.unsqueeze(2) if self.video else latents).sample
        return 0.5 * ((shown.squeeze(2) if self.video else shown) + 1.0)


def advice() -> str:
    """What to download for a pretrained autoencoder."""
    wanted = " or ".join(f"{name} ({source})" for name, (_, source) in CLASSES.items())
    return (
        f"Nothing is downloaded here: on a machine with a network, fetch an {wanted} from the Hugging Face hub into a "
        "directory with its config.json and diffusion_pytorch_model.safetensors, and give that"
    )


def load_foundation(
    path: str | os.PathLike[str], image_shape: Sequence[int], *, key: str = "pixels", patch: int = 2
) -> FoundationLatent:
    """The autoencoder that diffusers saved in the directory `path`, for images of `image_shape` [3, H, W].

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
    substrate = FoundationLatent(
        kind=CLASSES[found][0], image_shape=image_shape, autoencoder=dict(config), key=key, patch=patch
    )
    substrate.network.load_state_dict(network.state_dict())
    return substrate
