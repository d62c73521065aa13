"""Flow matching (Lipman et al., 2023, arXiv:2210.02747): the one time convention, samplers, and chains with log-probs.

Time t runs from 0, noise, to 1, data: x_t = (1 - t) noise + t data, and the velocity of the flow is
v(x, t) = E[data - noise | x_t = x]. Two estimates follow from it, x + (1 - t) v of the data and x - t v of the noise.

Letters: K denoising steps; leading dims of x are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wamrl.naming import whole_number

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t) of the shape of x, at one time for all."""


def interpolate(noise: Tensor, data: Tensor, time: Tensor) -> Tensor:
    """x_t of noise, data [..., X] and times that broadcast with them."""
    return noise + time * (data - noise)


def sample_times(*shape: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Logit-normal times in (0, 1): the sigmoid of a standard normal (Esser et al., 2024, arXiv:2403.03206)."""
    return torch.sigmoid(torch.randn(*shape, generator=generator, device=device))


def time_grid(steps: int) -> list[float]:
    """K + 1 times from 0 to 1."""
    whole_number("the number of denoising steps", steps, 1)
    return [k / steps for k in range(steps + 1)]


def ode_sample(velocity: Velocity, noise: Tensor, steps: int) -> list[Tensor]:
    """The K + 1 points of the probability flow ODE from `noise` at t = 0 to a sample at t = 1, by Euler steps."""
    times = time_grid(steps)
    path = [noise]
    for time, after in zip(times[:-1], times[1:], strict=True):
        path.append(path[-1] + (after - time) * velocity(path[-1], time))
    return path


@dataclass(frozen=True)
class Chain:
    """What an SDE sampler went through.

    points: K + 1 of [..., X], not clamped. log_prob: [..., K], summed over X. times: [K + 1].
    """

    points: list[Tensor]
    log_prob: Tensor
    times: Tensor


def sde_step(x: Tensor, v: Tensor, time: float, after: float, scale: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of the next point of the flow SDE (Liu et al., 2025, arXiv:2505.05470, eq. 8).

    dx = (v + s^2/2 grad log p_t) dt + s dW keeps the ODE's marginals for every s. The score of p_t is minus the
    expected noise over 1 - t, (t v - x) / (1 - t). Here s^2 = scale^2 (1 - t), whose drift is finite at both ends;
    that of Flow-GRPO, scale^2 (1 - t) / t, is not at t = 0.
    """
    dt = after - time
    return x + dt * (v + 0.5 * scale**2 * (time * v - x)), scale * math.sqrt((1.0 - time) * dt)


def sde_sample(velocity: Velocity, noise: Tensor, draws: Tensor, *, scale: float, event_dims: int = 1) -> Chain:
    """A path of the flow SDE by Euler and Maruyama; `scale` 0 would be the ODE and is refused, it has no density.

    noise: [..., X] at t = 0. draws: [..., K, X] standard normal, one per step, K before the `event_dims` dims of X.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale of the SDE's noise is {scale}, expected a number above 0; use the ODE for none")
    axis = draws.ndim - 1 - event_dims
    times = time_grid(draws.shape[axis])
    points, logs = [noise], []
    for k, (time, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = points[-1]
        mean, std = sde_step(x, velocity(x, time), time, after, scale)
        points.append(mean + std * draws.select(axis, k))
        logs.append(gaussian_log_prob(points[-1], mean, std, event_dims))
    return Chain(points, torch.stack(logs, dim=-1), torch.tensor(times, device=noise.device))


def gaussian_log_prob(x: Tensor, mean: Tensor, std: float, event_dims: int) -> Tensor:
    """Log-density summed over the last `event_dims` dims."""
    each = -0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2.0 * math.pi)
    return each.flatten(-event_dims).sum(-1)
