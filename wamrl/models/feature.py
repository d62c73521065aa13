"""Features of an image encoder that is a moving average of a trained one: a substrate that is never decoded.

The student sees an image with half of its cells blanked and predicts what the teacher, its moving average, makes of the
whole one at those cells (data2vec, Baevski et al., 2022, arXiv:2202.03555). Variance and covariance terms (VICReg,
Bardes et al., 2022, arXiv:2105.04906, equations 1 to 4) keep features from becoming all the same.

Letters: X images, C features, h x w grid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.models.images import TrainedSubstrate, conv_encoder


class FeatureTeacher(TrainedSubstrate):
    """The teacher's features as tokens, one per cell of 16 x 16 pixels; encoder-only.

    observation: the camera's key -> [3, H, W], multiples of 16. features: C, the numbers of a token. channels: of the
    first convolution. rate: of the moving average per step. blanked: share of cells that the student does not see.
    spread: weight of the variance and covariance terms.
    """

    def __init__(
        self,
        observation: Mapping[str, Sequence[int]],
        *,
        features: int = 16,
        channels: int = 32,
        rate: float = 0.01,
        blanked: float = 0.5,
        spread: float = 1.0,
    ) -> None:
        super().__init__(observation, channels=features, stride=16, patch=1)
        if not 0.0 < blanked < 1.0:
            raise ValueError(f"blanked is {blanked}, but must lie between 0 and 1")
        self.config = {
            "name": "feature", "keys": [self.key], "features": features, "channels": channels, "rate": rate,
            "blanked": blanked, "spread": spread,
        }  # fmt: skip
        self.rate, self.blanked, self.spread = rate, blanked, spread
        self.student = nn.Sequential(conv_encoder(channels, features), nn.AvgPool2d(2))
        self.teacher = copy.deepcopy(self.student)
        self.predictor = nn.Sequential(
            nn.Conv2d(features, 4 * features, 3, padding=1), nn.SiLU(), nn.Conv2d(4 * features, features, 3, padding=1)
        )
        self.requires_grad_(False)

    def describe(self) -> str:
        return "feature"

    def learn(self) -> None:
        for part in (self.student, self.predictor):
            part.requires_grad_(True)

    def latents(self, images: Tensor) -> Tensor:
        return self.teacher(2.0 * images - 1.0)

    def loss(self, images: Tensor, task: Tensor, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """Of images [X, 3, H, W] in [0, 1]; `task` is not used."""
        with torch.no_grad():
            target = self.latents(images).float()
        self.see(target)
        drawn = torch.rand(len(images), 1, *self.cells, generator=noise, device=images.device)
        hidden = (drawn < self.blanked).float()
        blank = F.interpolate(hidden, size=self.image_shape[-2:])
        seen = self.student((2.0 * images - 1.0) * (1.0 - blank)).float()
        wanted = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
        error = F.smooth_l1_loss(self.predictor(seen).float(), wanted, reduction="none").mean(1, keepdim=True)
        prediction = (error * hidden).sum() / hidden.sum().clamp(min=1.0)

        whole = self.student(2.0 * images - 1.0).float().flatten(2)  # [X, C, h w]
        centred = whole - whole.mean(0)
        variance = F.relu(1.0 - (centred.square().mean(0) + 1e-4).sqrt()).mean()
        shared = torch.einsum("xcl,xdl->cd", centred, centred) / (len(images) * whole.shape[-1])
        covariance = (shared - torch.diag(torch.diagonal(shared))).square().sum() / len(shared)
        return {
            "loss": prediction + self.spread * (variance + 0.1 * covariance),
            "prediction": prediction.detach(),
            "variance": variance.detach(),
            "covariance": covariance.detach(),
        }

    @torch.no_grad()
    def update(self) -> None:
        super().update()
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), self.rate)
