"""How near decoded images are to the true ones: PSNR and SSIM (Wang et al., 2004) as torchmetrics computes them.

Letters: B windows, H steps, X images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Context
from wamrl.models.images import ImageSubstrate, unit_images
from wamrl.naming import RunError
from wamrl.noise import NoiseKey


def metrics() -> Any:
    """Torchmetrics' functions on images.

    Raises:
        RunError: when torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional import image
    except ModuleNotFoundError as error:
        raise RunError('PSNR and SSIM need torchmetrics; run: pip install "wamrl[pixels]"') from error
    return image


def image_quality(shown: Tensor, true: Tensor) -> dict[str, float]:
    """`psnr_db` (of the squared error over all images, at most 100) and mean `ssim` of images [X, 3, H, W].

    Both are uint8 of 0..255 or float in [0, 1].
    """
    library = metrics()
    predicted, target = (unit_images(images, true.shape[-3:]) for images in (shown, true))
    psnr = library.peak_signal_noise_ratio(predicted, target, data_range=1.0)
    ssim = library.structural_similarity_index_measure(predicted, target, data_range=1.0)
    return {"psnr_db": round(min(float(psnr), 100.0), 3), "ssim": round(float(ssim), 4)}


def image_keys(model: WAM) -> tuple[str, ...]:
    """The observation keys of images that the model decodes."""
    decoded = {key for part in model.modules() if isinstance(part, ImageSubstrate) for key in part.decodes}
    return tuple(key for key in model.spec.observation if key in decoded and "decode" in model.spec.provides)


@torch.no_grad()
def decoded_quality(model: WAM, windows: TensorDict) -> dict[str, Any]:
    """Quality of the images that `model` decodes on held-out windows [B] of H steps which hold images.

    Returns, per image key: `encoded`, of the windows' first frames encoded and decoded; for a model that answers
    "rollout" also `imagined`, a list over 1..H of frames imagined under the executed actions (the futures' mean latent
    decoded), and `persistence`, the same of the guess that the first frame stays. One that answers "video" alone
    imagines without actions, if H is its chunk. Steps past an episode's end are left out of both: the last frame
    repeats there.
    """
    observation, valid = windows["observation"], windows["valid"]
    start = model.encode(Context.from_observation(observation[:, 0].clone().set("task", windows["task"])))
    found: dict[str, Any] = {}
    for key in image_keys(model):
        true = observation[key]
        encoded = model.decode(start, (key,))[key]
        found[key] = {"frames": len(true), "encoded": image_quality(encoded, true[:, 0])}
        actions = windows["action"].unsqueeze(1) if "rollout" in model.spec.provides else None
        if actions is None and not ("video" in model.spec.provides and valid.shape[1] == model.spec.chunk_length):
            continue
        noise = NoiseKey.for_rows(len(true), device=windows["task"].device)
        imagined = model.imagine(start, actions, noise=noise, with_frames=True)
        assert imagined.frames is not None
        mean = replace(imagined, frames=imagined.frames.float().mean(2, keepdim=True))
        shown = model.decode(mean, (key,))[key][:, 0, 0]  # [B, H, 3, ...]
        steps = [h for h in range(valid.shape[1]) if bool(valid[:, h].any())]
        found[key]["imagined"] = [image_quality(shown[valid[:, h], h], true[valid[:, h], h + 1]) for h in steps]
        found[key]["persistence"] = [image_quality(true[valid[:, h], 0], true[valid[:, h], h + 1]) for h in steps]
    return found
