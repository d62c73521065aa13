"""What several models are made of: MLPs, ensembles of them side by side, and the row of a task in a model's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wamrl.naming import is_number, unknown_name


def normalise(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the latent dims, in place of TD-MPC2's SimNorm."""
    return F.layer_norm(x, x.shape[-1:])


class EnsembleLinear(nn.Module):
    """`members` linear layers side by side: [M, X, in] -> [M, X, out]."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleNorm(nn.Module):
    """LayerNorm with one gain and offset per member."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(members, 1, width))
        self.offset = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.gain + self.offset


def ensemble_mlp(members: int, inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear, LayerNorm, SiLU blocks and a last linear layer, for `members` networks at once."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [EnsembleLinear(members, inputs, width), EnsembleNorm(members, width), nn.SiLU()]
        inputs = width
    return nn.Sequential(*layers, EnsembleLinear(members, inputs, outputs))


def mlp_block(inputs: int, width: int) -> nn.Sequential:
    """Linear, LayerNorm, SiLU."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU())


def mlp(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear, LayerNorm, SiLU blocks and a last linear layer."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += mlp_block(inputs, width)
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def task_rows(task: Tensor, ids: Tensor, names: Sequence[str]) -> Tensor:
    """Index into `names` of each `task_id` in `task`; ids: [len(names)] theirs."""
    match = task.unsqueeze(-1) == ids
    if not bool(match.any(-1).all()):
        strange = task[~match.any(-1)][0].item()
        raise unknown_name("task id", str(strange), names, hint="The checkpoint was trained on those.")
    return match.long().argmax(-1)


def weights_of_losses(usual: Mapping[str, float], given: Mapping[str, float] | None) -> dict[str, float]:
    """The `usual` weights with the `given` ones in their place; UnknownNameError for a loss that the model has not."""
    given = given or {}
    for name in given:
        if name not in usual:
            raise unknown_name("name in loss_weights", name, usual)
        if not (is_number(given[name]) and given[name] >= 0):
            raise ValueError(f"loss_weights.{name} is {given[name]!r}, but must be a finite number of at least 0")
    return {**usual, **given}


def check_values(
    *, discount: float, target_rate: float, expectile: float, reward_scale: float, success_bonus: float
) -> None:
    """ValueError for settings that values cannot be learned with, in units of (reward + bonus) / (1 - discount)."""
    if not (is_number(discount) and 0.0 < discount < 1.0):
        raise ValueError(f"discount is {discount}, but must be above 0 and below 1: values are in units of its sum")
    for name, share in (("target_rate", target_rate), ("expectile", expectile)):
        if not (is_number(share) and 0.0 < share <= 1.0):
            raise ValueError(f"{name} is {share}, but must be above 0 and at most 1")
    if not (is_number(reward_scale) and reward_scale > 0):
        raise ValueError(f"reward_scale is {reward_scale}, but must be a finite number above 0")
    if not (is_number(success_bonus) and success_bonus >= 0):
        raise ValueError(
            f"success_bonus is {success_bonus}, but must be a finite number of at least 0: what a step of success "
            "is worth beside its reward; 0 leaves success out of the values"
        )
