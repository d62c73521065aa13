"""Pretrained autoencoders: tiny ones built and saved here, as diffusers saves the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra foundation")

from test_tokenizer import REFERENCE, refused, write_dataset  # noqa: E402

from wamrl import checkpoint  # noqa: E402
from wamrl.models.foundation import FoundationLatent, load_foundation  # noqa: E402
from wamrl.models.substrate import make_substrate  # noqa: E402
from wamrl.train import main  # noqa: E402

SHAPE = (3, 16, 16)
CAMERA = {"pixels": SHAPE}


def autoencoder(kind: str):
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=4,
            scaling_factor=0.2, shift_factor=0.1,
        )  # fmt: skip
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0, 2.0, 3.0, 3.0],
    )  # fmt: skip


@pytest.fixture(params=["AutoencoderKL", "AutoencoderKLWan"])
def saved(request, tmp_path) -> Path:
    autoencoder(request.param).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_tokens_are_the_autoencoders_standardised_latents_and_decode_to_its_images(saved):
    substrate = load_foundation(saved, CAMERA, patch=2)
    name = json.loads((saved / "config.json").read_text())["_class_name"]
    network, video = autoencoder(name).eval(), name.endswith("Wan")
    images = torch.randint(0, 256, (2, 3, *SHAPE), dtype=torch.uint8)
    wanted = images.flatten(0, 1) / 127.5 - 1
    with torch.no_grad():
        latents = network.encode(wanted.unsqueeze(2) if video else wanted).latent_dist.mode()
        shown = network.decode(latents).sample
        if video:
            latents, shown = latents.squeeze(2), shown.squeeze(2)
            mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([2.0, 2.0, 3.0, 3.0])
            standard = (latents - mean[:, None, None]) / std[:, None, None]
        else:
            standard = (latents - 0.1) * 0.2
        tokens = substrate.encode({"pixels": images})
        decoded = substrate.decode(tokens)["pixels"]
    assert tokens.shape == (2, 3, 16, 16) == (2, 3, substrate.tokens, substrate.width)
    # The first token is the upper left patch of 2 x 2 cells.
    torch.testing.assert_close(tokens.flatten(0, 1)[:, 0], standard[:, :, :2, :2].flatten(1), atol=1e-5, rtol=1e-4)
    expected = ((shown + 1) / 2).clamp(0, 1).view(2, 3, *SHAPE)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in substrate.parameters())


def test_it_is_built_again_from_its_config(saved):
    substrate = load_foundation(saved, CAMERA)
    again = make_substrate(json.loads(json.dumps(substrate.config)), CAMERA)
    again.load_state_dict(substrate.state_dict())
    assert isinstance(again, FoundationLatent) and again.fingerprint() == substrate.fingerprint()


def test_the_reference_model_reads_through_a_pretrained_autoencoder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_dataset(Path("data/walk"))
    main([f"data={data}", *REFERENCE, f"tokenizer={saved}", "run_dir=pixels"])
    model = checkpoint.load("pixels")
    assert model.substrate.fingerprint() == load_foundation(saved, CAMERA).fingerprint()  # type: ignore[attr-defined]
    assert "pixels" in json.loads(Path("pixels/results.json").read_text())["validation"]["images"]


def test_a_path_that_is_not_there_says_what_to_download(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_dataset(Path("data/walk"))
    said = refused(capsys, [f"data={data}", *REFERENCE, "tokenizer=models/sd-vae"])
    assert "models/sd-vae" in said and "stabilityai/sd-vae-ft-mse" in said and "Wan-AI/" in said
    Path("models/sd-vae").mkdir(parents=True)
    assert "config.json is missing" in refused(capsys, [f"data={data}", *REFERENCE, "tokenizer=models/sd-vae"])
    Path("models/sd-vae/config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "safetensors is missing" in refused(capsys, [f"data={data}", *REFERENCE, "tokenizer=models/sd-vae"])
    Path("models/sd-vae/diffusion_pytorch_model.safetensors").touch()
    assert "holds a UNet2DModel" in refused(capsys, [f"data={data}", *REFERENCE, "tokenizer=models/sd-vae"])


def test_images_that_do_not_fit_its_stride_are_refused(saved):
    with pytest.raises(ValueError, match="cut into tokens of 4 x 4"):
        load_foundation(saved, {"pixels": (3, 18, 16)})
