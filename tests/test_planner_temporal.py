"""Shapes of noise over time: unit variance, the spectrum or the smoothness that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from wamrl.noise import NoiseKey
from wamrl.planners import make_mppi
from wamrl.planners.proposers import coloured_noise
from wamrl.planners.temporal import interpolation, temporal_basis


@pytest.mark.parametrize(
    "options",
    [{"exponent": 0.0}, {"exponent": 2.0}, {"correlation": 0.7}, {"knots": 1}]
    + [{"knots": 4, "spline": s, "correlation": c} for s in ("hold", "linear", "cubic") for c in (0.0, 0.6)],
)
def test_every_step_has_unit_variance(options: dict) -> None:
    basis = temporal_basis(12, **options)
    assert basis.shape == (12, options.get("knots", 12))
    torch.testing.assert_close(basis.square().sum(dim=1), torch.ones(12))
    drawn = coloured_noise(NoiseKey.for_rows(4), basis, 5000, action_dim=2)
    assert drawn.shape == (4, 5000, 12, 2)
    assert (drawn.std(dim=(0, 1)) - 1.0).abs().max() < 0.03
    # Action dims and rows are strangers, whatever hangs together over time.
    assert torch.corrcoef(drawn[:, :, 0].permute(0, 2, 1).reshape(8, -1)).fill_diagonal_(0.0).abs().max() < 0.05


def test_power_law_noise_has_the_spectrum_that_was_asked_for() -> None:
    steps, exponent = 32, 2.0
    drawn = coloured_noise(NoiseKey.for_rows(1), temporal_basis(steps, exponent=exponent), 20_000, action_dim=1)
    power = np.abs(np.fft.rfft(drawn[0, :, :, 0].double().numpy(), axis=1))[:, 1:-1] ** 2
    frequency = np.fft.rfftfreq(steps)[1:-1]
    slope = np.polyfit(np.log(frequency), np.log(power.mean(axis=0)), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)
    torch.testing.assert_close(temporal_basis(steps, exponent=0.0), torch.eye(steps))


def test_splines_go_through_their_knots_as_scipy_draws_them() -> None:
    knots = np.array([0.3, -1.0, 0.5, 2.0, 0.1])
    weights = interpolation(13, 5, "cubic").double().numpy()
    expected = CubicSpline(np.arange(5), knots, bc_type="natural")(np.linspace(0, 4, 13))
    np.testing.assert_allclose(weights @ knots, expected, atol=1e-6)
    linear = interpolation(13, 5, "linear").double().numpy() @ knots
    np.testing.assert_allclose(linear, np.interp(np.linspace(0, 4, 13), np.arange(5), knots), atol=1e-6)
    held = interpolation(10, 5, "hold").double().numpy() @ knots
    np.testing.assert_allclose(held, np.repeat(knots, 2), atol=1e-6)


def test_mppi_draws_at_knots() -> None:
    basis = make_mppi(horizon=9, knots=3, spline="linear", correlation=0.0).basis
    assert basis.shape == (9, 3) and torch.linalg.matrix_rank(basis) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knots": 0}, "knots is 0"),
        ({"knots": 9}, "from 1 to the horizon of 8"),
        ({"spline": "cubik"}, "did you mean 'cubic'"),
        ({"exponent": -1.0}, "exponent is -1"),
        ({"exponent": "2"}, "exponent is '2', but must be a finite number"),
        ({"exponent": 1.0, "correlation": 0.5}, "two ways to colour"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_basis(8, **options)
