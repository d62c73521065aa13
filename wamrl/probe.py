"""What a linear read-out of a model's latents knows of an observation key that the model need not read, by horizon.

The same measure for every model that imagines, whatever it predicts: pixels, features or tracks.

Letters: B windows, H steps, X frames, D latent dims, F numbers of the key.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from wamrl.interfaces import WAM, Context
from wamrl.noise import NoiseKey


class LinearProbe:
    """Ridge regression from latents [X, D] to numbers [X, F], both standardised by the fitted data.

    ridge: of the squared weights, per fitted frame.
    """

    def __init__(self, latents: Tensor, numbers: Tensor, *, ridge: float = 1e-3) -> None:
        x, y = latents.double(), numbers.double()
        self.centre, self.scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-3)
        self.mean = y.mean(0)
        x = (x - self.centre) / self.scale
        gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.weights = torch.linalg.solve(gram, x.T @ (y - self.mean) / len(x))

    def __call__(self, latents: Tensor) -> Tensor:
        """[..., F] float32 from latents [..., D]."""
        x = (latents.double() - self.centre) / self.scale
        return (x @ self.weights + self.mean).float()


@torch.no_grad()
def probe_errors(
    model: WAM, fitted: TensorDict, windows: TensorDict, key: str, scale: Tensor
) -> dict[str, list[float]]:
    """How far a linear read-out of `key` is off, on frames imagined under the executed actions.

    Args:
        model: that answers "rollout", or "video" for a chunk of H steps, which it then imagines without actions; its
            states hold their latent in the entry "z".
        fitted: windows [B] of training data, as in `WAM.loss`, which hold `key`; the probe is fitted on their frames.
        windows: held-out windows [B] of H steps.
        key: observation key of vectors.
        scale: [F] standard deviations, the unit of errors; numbers that hardly vary (up to 0.001) are left out.

    Returns:
        Lists of length H of root mean squares: `imagined`; `encoded`, the probe's own error on latents of the true
        frames; `persistence`, of the guess that nothing moves. Steps past an episode's end do not count.
    """
    conditioned = "rollout" in model.spec.provides
    if not conditioned:
        model.spec.require("video")

    def encode(observation: TensorDict, task: Tensor) -> Tensor:
        return model.encode(Context.from_observation(observation.clone(False).set("task", task)))["z"].float()

    moving = scale > 1.001e-3
    source, rows = fitted["observation"], fitted["valid"].shape[1]
    valid = fitted["valid"].flatten()
    frames = source[:, :-1].flatten(0, 1)[valid]
    probe = LinearProbe(encode(frames, fitted["task"].repeat_interleave(rows)[valid]), frames[key].flatten(1).float())

    observation, count = windows["observation"], windows["valid"].shape[1]
    truth = observation[key].flatten(2).float()
    start = model.encode(Context.from_observation(observation[:, 0].clone(False).set("task", windows["task"])))
    noise = NoiseKey.for_rows(len(truth), device=truth.device)
    actions = windows["action"].unsqueeze(1) if conditioned else None
    imagined = model.imagine(start, actions, noise=noise, with_frames=True)
    assert imagined.frames is not None
    later = encode(observation[:, 1:].flatten(0, 1), windows["task"].repeat_interleave(count))
    guesses = {
        "imagined": probe(imagined.frames[:, 0].float().mean(1)),
        "encoded": probe(later).unflatten(0, (len(truth), count)),
        "persistence": truth[:, :1].expand(-1, count, -1),
    }
    counts = windows["valid"].sum(0).clamp(min=1)
    errors = {}
    for name, guess in guesses.items():
        square = ((guess - truth[:, 1:]) / scale)[..., moving].square().mean(-1)
        errors[name] = (torch.where(windows["valid"], square, 0.0).sum(0) / counts).sqrt().tolist()
    return errors
