"""The promises of wamrl.models.flow: one time convention, samplers of a known distribution, exact chain densities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wamrl.models.flow import (
    gaussian_log_prob,
    interpolate,
    ode_sample,
    sample_times,
    sde_sample,
    sde_step,
    time_grid,
)

MEAN = torch.tensor([0.7, -0.4])
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]])


def velocity(x: Tensor, time: float) -> Tensor:
    """E[data - noise | x_t] for data of N(MEAN, COVARIANCE), in closed form."""
    marginal = time**2 * COVARIANCE + (1.0 - time) ** 2 * torch.eye(2)
    weight = torch.linalg.solve(marginal, (x - time * MEAN).T).T
    return MEAN + time * weight @ COVARIANCE - (1.0 - time) * weight


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T)


def test_time_0_is_noise_and_time_1_is_data():
    noise, data = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(interpolate(noise, data, torch.zeros(3, 1)), noise)
    torch.testing.assert_close(interpolate(noise, data, torch.ones(3, 1)), data)
    assert time_grid(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_ode_recovers_mean_and_covariance_of_a_gaussian():
    noise = torch.randn(40000, 2, generator=torch.Generator().manual_seed(0))
    mean, covariance = moments(ode_sample(velocity, noise, 100)[-1])
    torch.testing.assert_close(mean, MEAN, atol=0.015, rtol=0.0)
    torch.testing.assert_close(covariance, COVARIANCE, atol=0.015, rtol=0.0)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_sde_has_the_marginals_of_the_ode_at_every_time(scale):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20000, 2, generator=generator)
    draws = torch.randn(20000, 100, 2, generator=generator)
    points = sde_sample(velocity, noise, draws, scale=scale).points
    ode = ode_sample(velocity, noise, 100)
    for k in (30, 60, 100):
        time = k / 100
        known = time**2 * COVARIANCE + (1 - time) ** 2 * torch.eye(2)
        for path in (points, ode):
            mean, covariance = moments(path[k])
            torch.testing.assert_close(mean, time * MEAN, atol=0.02, rtol=0.0)
            torch.testing.assert_close(covariance, known, atol=0.03, rtol=0.0)
    # The same marginals by other paths: the noise of the SDE was really there.
    assert (points[100] - ode[100]).std() > 0.1 * scale


def test_the_chain_is_replayed_to_the_same_log_prob():
    draws = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    field = lambda x, time: torch.tanh(x) * (1.0 + time)  # noqa: E731
    chain = sde_sample(field, torch.randn(5, 3, 2), draws, scale=0.5, event_dims=2)
    assert chain.log_prob.shape == (5, 4)
    for k in range(4):
        time, after = float(chain.times[k]), float(chain.times[k + 1])
        mean, std = sde_step(chain.points[k], field(chain.points[k], time), time, after, 0.5)
        known = torch.distributions.Normal(mean, std).log_prob(chain.points[k + 1]).sum((-1, -2))
        torch.testing.assert_close(chain.log_prob[:, k], known)


def test_the_gradient_of_the_log_prob_is_that_of_finite_differences():
    draws = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = torch.randn(2, 4, dtype=torch.float64)
    points = sde_sample(lambda x, t: -x, start, draws, scale=0.4).points

    def total(weight: Tensor) -> Tensor:
        logs = 0.0
        for k, (time, after) in enumerate(zip(time_grid(3)[:-1], time_grid(3)[1:], strict=True)):
            mean, std = sde_step(points[k], torch.tanh(points[k] @ weight), time, after, 0.4)
            logs = logs + gaussian_log_prob(points[k + 1], mean, std, 1).sum()
        return logs

    assert torch.autograd.gradcheck(total, torch.randn(4, 4, dtype=torch.float64, requires_grad=True))


def test_training_times_reach_both_ends_and_are_inside():
    times = sample_times(20000, generator=torch.Generator().manual_seed(4))
    assert 0.0 <= times.min() < 0.05 and 0.95 < times.max() <= 1.0
    odds = times.logit()
    assert odds.mean() == pytest.approx(0.0, abs=0.02) and odds.std() == pytest.approx(1.0, abs=0.02)


def test_no_steps_and_no_noise_are_refused():
    with pytest.raises(ValueError, match="denoising steps"):
        ode_sample(velocity, torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="use the ODE"):
        sde_sample(velocity, torch.zeros(1, 2), torch.zeros(1, 3, 2), scale=0.0)
