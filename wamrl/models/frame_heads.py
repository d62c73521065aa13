"""Heads that read reward, success and value off frames, whatever made them: measured, or imagined.

Letters: B windows, X rows, J frames of a chunk, F numbers of a frame, E value heads.
"""

from __future__ import annotations

import copy

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.models.parts import ensemble_mlp, mlp


class FrameHeads(nn.Module):
    """Small networks of flat frames and the task.

    size: F. tasks: how many. width, task_dim, values: of the networks; E = values. stride: control steps between
    frames. discount: per control step. success_bonus: of a step in success, beside its reward. unit: what the values
    are divided by. expectile: of the value's regression, as in the reference WAM.
    """

    def __init__(
        self,
        size: int,
        *,
        tasks: int,
        width: int,
        task_dim: int,
        values: int,
        stride: int,
        discount: float,
        success_bonus: float,
        unit: float,
        expectile: float,
    ) -> None:
        super().__init__()
        self.stride, self.discount, self.success_bonus = stride, discount, success_bonus
        self.unit, self.expectile = unit, expectile
        self.task = nn.Embedding(tasks, task_dim)
        self.outcomes = mlp(2 * size + task_dim, [width, width], 2)
        self.values = ensemble_mlp(values, size + task_dim, [width, width], 1)
        nn.init.zeros_(self.values[-1].weight)  # type: ignore[arg-type]
        self.target_values = copy.deepcopy(self.values).requires_grad_(False)

    def outcome(self, before: Tensor, after: Tensor, task: Tensor) -> Tensor:
        """Mean reward and success logit [X, J, 2] of the steps between frames [X, J, F]; task: [X]."""
        tasks = self.task(task).unsqueeze(1).expand(-1, before.shape[1], -1)
        return self.outcomes(torch.cat([before, after, tasks], dim=-1))

    def value(self, frames: Tensor, task: Tensor) -> Tensor:
        """[E, *batch] values of frames [*batch, F], in units of `unit`."""
        return self._values(self.values, frames, task)

    def _values(self, network: nn.Module, frames: Tensor, task: Tensor) -> Tensor:
        x = torch.cat([frames, self.task(task)], dim=-1)
        members = network[0].weight.shape[0]  # type: ignore[index]
        return network(x.flatten(0, -2).expand(members, -1, -1)).view(members, *x.shape[:-1])

    def losses(self, batch: TensorDict, frames: Tensor, task: Tensor, arrived: Tensor) -> dict[str, Tensor]:
        """`reward`, `success` and `value` off true frames [B, J+1, F]; arrived: [B, J] bool, which were seen."""
        stride, count = self.stride, frames.shape[1] - 1
        reward = batch["reward"][:, : count * stride].unflatten(1, (count, stride))
        success = batch["success"][:, : count * stride].unflatten(1, (count, stride)).float()
        mask = arrived.float()
        seen = mask.sum().clamp(min=1.0)
        outcome = self.outcome(frames[:, :-1], frames[:, 1:], task)
        reward_error = F.smooth_l1_loss(outcome[..., 0], reward.mean(-1), reduction="none")
        bce = F.binary_cross_entropy_with_logits(outcome[..., 1], success.mean(-1), reduction="none")
        tasks = task.unsqueeze(1).expand(-1, count)
        # Expectile regression of the return over a stride and the value after it, as in the reference WAM.
        with torch.no_grad():
            ahead = self._values(self.target_values, frames[:, 1:], tasks)
            fade = self.discount ** torch.arange(stride, device=frames.device)
            gain = ((reward + self.success_bonus * success) * fade).sum(-1) / self.unit
            ended = batch["terminated"][:, : count * stride].unflatten(1, (count, stride)).any(-1)
            goal = gain + self.discount**stride * ahead * (~ended).float()
        value = self._values(self.values, frames[:, :-1], tasks)
        gap = goal - value
        asymmetry = torch.where(gap > 0, self.expectile, 1.0 - self.expectile)
        return {
            "reward": (reward_error * mask).sum() / seen,
            "success": (bce * mask).sum() / seen,
            "value": (asymmetry * gap.square() * mask).sum() / seen / value.shape[0],
        }

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """Move the target values towards the online ones."""
        torch._foreach_lerp_(list(self.target_values.parameters()), list(self.values.parameters()), rate)
