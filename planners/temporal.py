"""How the noise of a candidate hangs together over time: correlated, coloured, or given at a few knots.

A shape is a matrix [H, K] that turns K white numbers into H steps, as `wamrl.planners.proposers.coloured_noise` uses
it; every step has unit variance, so that sigma means the same in all of them.

Letters: H steps, K knots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wamrl.naming import is_number, unknown_name, whole_number
from wamrl.planners.proposers import noise_basis

SPLINES = ("hold", "linear", "cubic")


def temporal_basis(
    horizon: int,
    *,
    correlation: float = 0.0,
    exponent: float | None = None,
    knots: int | None = None,
    spline: str = "cubic",
) -> Tensor:
    """[H, K] float32 shape of the noise over time; K is H unless `knots` are fewer.

    correlation: of neighbouring knots, in [0, 1) (AR(1)). exponent: instead of it, power-law noise whose spectrum
    falls as 1 / f^exponent: 0 is white, 2 is smooth (iCEM, Pinneri et al., 2020, arXiv:2008.06389).
    knots: draw the noise at that many evenly spaced steps, the first and the last among them, and interpolate
    (Howell et al., 2022, arXiv:2212.00541); None is one per step.
    spline: "hold" the last knot, "linear", or "cubic" (natural: no curvature at the ends).
    """
    whole_number("planner.horizon", horizon, 1)
    if knots is not None and (isinstance(knots, bool) or not isinstance(knots, int) or not 1 <= knots <= horizon):
        raise ValueError(
            f"planner.knots is {knots!r}, but must be a whole number from 1 to the horizon of {horizon} steps, or null"
        )
    if spline not in SPLINES:
        raise unknown_name("planner.spline", str(spline), SPLINES)
    num = horizon if knots is None else knots
    if exponent is None:
        colour = noise_basis(num, correlation)
    elif correlation:
        raise ValueError(
            f"planner.exponent is {exponent} and planner.correlation is {correlation}, but they are two ways to "
            "colour the same noise; set correlation to 0 or exponent to null"
        )
    else:
        colour = power_law_basis(num, exponent)
    return colour if num == horizon else _unit_rows(interpolation(horizon, num, spline) @ colour)


def power_law_basis(horizon: int, exponent: float) -> Tensor:
    """[H, H] lower triangular: x = basis @ white has a power spectrum proportional to 1 / f^exponent.

    The lowest frequency counts as that of one whole period, as in Timmer and Koenig (1995), so that the mean over the
    horizon is random too.
    """
    if not is_number(exponent) or exponent < 0:
        raise ValueError(f"planner.exponent is {exponent!r}, but must be a finite number of at least 0 (0 is white)")
    frequency = torch.fft.fftfreq(horizon, dtype=torch.float64).abs().clamp_min(1.0 / horizon)
    covariance = torch.fft.ifft(frequency**-exponent).real
    lag = (torch.arange(horizon)[:, None] - torch.arange(horizon)[None, :]).abs()
    return torch.linalg.cholesky(covariance[lag] / covariance[0]).to(torch.float32)


def interpolation(horizon: int, knots: int, spline: str) -> Tensor:
    """[H, K] matrix that interpolates values at `knots` evenly spaced steps to all steps."""
    if knots == 1:
        return torch.ones(horizon, 1)
    one = torch.eye(knots, dtype=torch.float64)
    if spline == "hold":
        return one[torch.arange(horizon) * knots // horizon].to(torch.float32)
    where = torch.linspace(0.0, knots - 1.0, horizon, dtype=torch.float64)
    left = where.floor().clamp_max(knots - 2).long()
    t = (where - left)[:, None]
    a, b = one[left], one[left + 1]
    weights = (1 - t) * a + t * b
    if spline == "cubic" and knots > 2:
        # Second derivatives m of the natural spline: m_(k-1) + 4 m_k + m_(k+1) = 6 (y_(k-1) - 2 y_k + y_(k+1)).
        system, second = one.clone(), torch.zeros_like(one)
        for k in range(1, knots - 1):
            system[k, k - 1 : k + 2] = torch.tensor([1.0, 4.0, 1.0], dtype=torch.float64)
            second[k, k - 1 : k + 2] = torch.tensor([6.0, -12.0, 6.0], dtype=torch.float64)
        bend = torch.linalg.solve(system, second)
        weights = weights + ((1 - t) ** 3 - (1 - t)) / 6 * bend[left] + (t**3 - t) / 6 * bend[left + 1]
    return weights.to(torch.float32)


def _unit_rows(basis: Tensor) -> Tensor:
    return basis / basis.square().sum(dim=1, keepdim=True).sqrt()
