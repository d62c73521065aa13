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
    are divided by. expectile: of the value's regression, as in the reference WAM. success_values: whether there are E
    more heads, for discount^(steps to the first success), which shaped rewards do not reach.
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
        success_values: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.discount, self.success_bonus = stride, discount, success_bonus
        self.unit, self.expectile = unit, expectile
        self.task = nn.Embedding(tasks, task_dim)
        self.outcomes = mlp(2 * size + task_dim, [width, width], 2)
        self.values = ensemble_mlp(values, size + task_dim, [width, width], 1)
        nn.init.zeros_(self.values[-1].weight)  # type: ignore[arg-type]
        self.success_values = ensemble_mlp(values, size + task_dim, [width], 1) if success_values else None
        self.target_values = copy.deepcopy(self.values).requires_grad_(False)

    def outcome(self, before: Tensor, after: Tensor, task: Tensor) -> Tensor:
        """Mean reward and success logit [X, J, 2] of the steps between frames [X, J, F]; task: [X]."""
        tasks = self.task(task).unsqueeze(1).expand(-1, before.shape[1], -1)
        return self.outcomes(torch.cat([before, after, tasks], dim=-1))

    def value(self, frames: Tensor, task: Tensor) -> Tensor:
        """[E, *batch] values of frames [*batch, F], in units of `unit`."""
        return self._values(self.values, frames, task)

    def success_value(self, frames: Tensor, task: Tensor) -> Tensor:
        """[E, *batch] logits of discount^(steps to the first success) of frames [*batch, F]."""
        assert self.success_values is not None
        return self._values(self.success_values, frames, task)

    def _values(self, network: nn.Module, frames: Tensor, task: Tensor) -> Tensor:
        x = torch.cat([frames, self.task(task)], dim=-1)
        members = network[0].weight.shape[0]  # type: ignore[index]
        return network(x.flatten(0, -2).expand(members, -1, -1)).view(members, *x.shape[:-1])

    def losses(self, batch: TensorDict, frames: Tensor, task: Tensor, arrived: Tensor) -> dict[str, Tensor]:
        """`reward`, `success` and `value` off true frames [B, J+1, F]; arrived: [B, J] bool, which were seen."""
        stride, count = self.stride, frames.shape[1] - 1
        reward, success = self._steps(batch, "reward", count), self._steps(batch, "success", count).float()
        mask = arrived.float()
        seen = mask.sum().clamp(min=1.0)
        losses = self._outcome_losses(frames[:, :-1], frames[:, 1:], task, reward, success, arrived)
        tasks = task.unsqueeze(1).expand(-1, count)
        # Expectile regression of the return over a stride and the value after it, as in the reference WAM.
        with torch.no_grad():
            ahead = self._values(self.target_values, frames[:, 1:], tasks)
            fade = self.discount ** torch.arange(stride, device=frames.device)
            gain = ((reward + self.success_bonus * success) * fade).sum(-1) / self.unit
            ended = self._steps(batch, "terminated", count).any(-1)
            goal = gain + self.discount**stride * ahead * (~ended).float()
        value = self._values(self.values, frames[:, :-1], tasks)
        gap = goal - value
        asymmetry = torch.where(gap > 0, self.expectile, 1.0 - self.expectile)
        losses["value"] = (asymmetry * gap.square() * mask).sum() / seen / value.shape[0]
        return {**losses, **self._success_value_loss(batch, frames[:, :-1], 0, task, arrived)}

    def imagined_losses(
        self, batch: TensorDict, frames: Tensor, imagined: Tensor, task: Tensor, arrived: Tensor
    ) -> dict[str, Tensor]:
        """`reward`, `success` and `value` off imagined frames [B, J, F] of the same steps as the true ones [B, J+1, F].

        Values are to be what the target values say of the true frames.
        """
        count = imagined.shape[1]
        before = torch.cat([frames[:, :1], imagined[:, :-1]], dim=1)
        reward, success = self._steps(batch, "reward", count), self._steps(batch, "success", count).float()
        tasks = task.unsqueeze(1).expand(-1, count)
        with torch.no_grad():
            wanted = self._values(self.target_values, frames[:, 1:], tasks)
        error = (self._values(self.values, imagined, tasks) - wanted).square().mean(0)
        losses = self._outcome_losses(before, imagined, task, reward, success, arrived)
        losses["value"] = (error * arrived).sum() / arrived.sum().clamp(min=1)
        return {**losses, **self._success_value_loss(batch, imagined, 1, task, arrived)}

    def _success_value_loss(
        self, batch: TensorDict, frames: Tensor, first: int, task: Tensor, arrived: Tensor
    ) -> dict[str, Tensor]:
        """`success_value` of frames [B, J, F], of which the first is the window's frame number `first`."""
        if self.success_values is None:
            return {}
        count = frames.shape[1]
        ahead = batch["steps_to_success"][:, :: self.stride][:, first : first + count]
        attained = self.discount**ahead  # 0 after an infinite number of steps
        logit = self.success_value(frames, task.unsqueeze(1).expand(-1, count))
        missed = F.binary_cross_entropy_with_logits(logit, attained.expand_as(logit), reduction="none").mean(0)
        return {"success_value": (missed * arrived).sum() / arrived.sum().clamp(min=1)}

    def _steps(self, batch: TensorDict, key: str, count: int) -> Tensor:
        """[B, J, stride] of the steps before each frame."""
        return batch[key][:, : count * self.stride].unflatten(1, (count, self.stride))

    def _outcome_losses(
        self, before: Tensor, after: Tensor, task: Tensor, reward: Tensor, success: Tensor, arrived: Tensor
    ) -> dict[str, Tensor]:
        outcome = self.outcome(before, after, task)
        wrong = F.smooth_l1_loss(outcome[..., 0], reward.mean(-1), reduction="none")
        missed = F.binary_cross_entropy_with_logits(outcome[..., 1], success.mean(-1), reduction="none")
        seen = arrived.sum().clamp(min=1)
        return {"reward": (wrong * arrived).sum() / seen, "success": (missed * arrived).sum() / seen}

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """Move the target values towards the online ones."""
        torch._foreach_lerp_(list(self.target_values.parameters()), list(self.values.parameters()), rate)
