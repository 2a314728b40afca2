"""The Gaussian maps against textbook formulas, and their limits."""

import math

import pytest
import torch

from diffusion_lab.process import (
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    broadcast_right,
    ddim_step,
    eps_from_x0,
    expand_logsnr,
    inverse_ddim_step,
    marginal,
    posterior,
)

ALL = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
every = pytest.mark.parametrize("interpolant", ALL, ids=lambda i: type(i).__name__)


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    logsnr = torch.tensor([-6.0, -1.0, 2.0, 9.0], dtype=torch.float64)
    return x0, eps, logsnr, logsnr + torch.tensor([3.0, 0.5, 2.0, 1.0], dtype=torch.float64)


@every
def test_eps_is_recovered(interpolant, problem):
    x0, eps, logsnr, _ = problem
    x = marginal(interpolant, x0, eps, logsnr)
    torch.testing.assert_close(eps_from_x0(interpolant, x, x0, logsnr), eps, rtol=0, atol=1e-12)


@every
def test_ddim_moves_along_the_marginal_and_back(interpolant, problem):
    x0, eps, logsnr, logsnr_next = problem
    x = marginal(interpolant, x0, eps, logsnr)
    x_next = ddim_step(interpolant, x, x0, logsnr, logsnr_next)
    torch.testing.assert_close(x_next, marginal(interpolant, x0, eps, logsnr_next), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        inverse_ddim_step(interpolant, x, x_next, logsnr, logsnr_next), x0, rtol=0, atol=1e-11
    )


@every
def test_posterior_against_bayes(interpolant, problem):
    # q(x_next | x, x0) from the product of N(x; a x_next, s2) and N(x_next; alpha_next x0, sigma_next^2)
    x0, eps, logsnr, logsnr_next = problem
    x = marginal(interpolant, x0, eps, logsnr)
    (alpha, sigma), (alpha_next, sigma_next) = interpolant(logsnr), interpolant(logsnr_next)
    a = alpha / alpha_next
    s2 = sigma**2 - a**2 * sigma_next**2
    precision = 1 / sigma_next**2 + a**2 / s2
    m = (alpha_next / sigma_next**2)[:, None, None] * x0 + (a / s2)[:, None, None] * x
    mean, lower, upper = posterior(interpolant, x, x0, logsnr, logsnr_next)
    torch.testing.assert_close(mean, m / precision[:, None, None], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lower.flatten(), 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(upper.flatten(), s2, rtol=1e-9, atol=0)


@every
def test_last_step_returns_x0_bitwise(interpolant, problem):
    x0, eps, logsnr, _ = problem
    x = marginal(interpolant, x0, eps, logsnr)
    clean = torch.tensor(math.inf, dtype=torch.float64)
    assert torch.equal(ddim_step(interpolant, x, x0, logsnr, clean), x0)
    mean, lower, _ = posterior(interpolant, x, x0, logsnr, clean)
    assert torch.equal(mean, x0) and not lower.any()


@pytest.mark.parametrize("interpolant", [VariancePreserving(), RectifiedFlow()], ids=["vp", "rf"])
def test_steps_from_pure_noise_are_finite(interpolant, problem):
    x0, eps, _, logsnr_next = problem
    noise = torch.tensor(-math.inf, dtype=torch.float64)
    x_next = ddim_step(interpolant, eps, x0, noise, logsnr_next)
    torch.testing.assert_close(x_next, marginal(interpolant, x0, eps, logsnr_next), rtol=0, atol=1e-14)
    mean, lower, upper = posterior(interpolant, eps, x0, noise, logsnr_next)
    alpha_next, sigma_next = interpolant(logsnr_next)
    torch.testing.assert_close(mean, alpha_next[:, None, None] * x0, rtol=0, atol=0)
    torch.testing.assert_close(lower.flatten(), sigma_next**2, rtol=0, atol=0)
    assert bool((upper == 1).all())


def test_equal_levels_have_no_inverse():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="two different"):
        inverse_ddim_step(VariancePreserving(), x, x, torch.tensor(0.0), torch.tensor(0.0))


def test_same_point_in_every_interpolant(problem):
    # x / alpha is common to all interpolants
    x0, eps, logsnr, logsnr_next = problem
    scaled = []
    for interpolant in ALL:
        x = ddim_step(interpolant, marginal(interpolant, x0, eps, logsnr), x0, logsnr, logsnr_next)
        scaled.append(x / interpolant(logsnr_next)[0][:, None, None])
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled[0], scaled[2], rtol=1e-12, atol=1e-12)


def test_broadcasting_rules():
    x = torch.zeros(2, 5, 3, 4, 4)
    assert broadcast_right(torch.zeros(2), x).shape == (2, 1, 1, 1, 1)
    assert broadcast_right(torch.zeros(2, 5), x).shape == (2, 5, 1, 1, 1)
    assert broadcast_right(torch.zeros(2, 1, 1, 4, 4), x).shape == (2, 1, 1, 4, 4)
    assert broadcast_right(torch.zeros(2, dtype=torch.float64), x).dtype == torch.float32
    scalar = torch.tensor(1.0, dtype=torch.float64)
    assert broadcast_right(scalar, x) is scalar and (scalar * x).dtype == torch.float32
    with pytest.raises(ValueError, match="leading axes"):
        broadcast_right(torch.zeros(3), x)


def test_expand_logsnr():
    assert expand_logsnr(torch.tensor(2.0, dtype=torch.float64), torch.zeros(3, 2)).tolist() == [2.0] * 3
    assert expand_logsnr(torch.tensor(2.0), torch.zeros(3, 2, dtype=torch.float64)).dtype == torch.float64
    assert expand_logsnr(torch.zeros(3, 5), torch.zeros(3, 5, 2)).shape == (3, 5)


def test_noise_per_frame():
    x0, eps = torch.ones(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    logsnr = torch.tensor([[0.0, 1.0, math.inf]] * 2, dtype=torch.float64)
    x = marginal(VariancePreserving(), x0, eps, logsnr)
    torch.testing.assert_close(x[0, :, 0], torch.sigmoid(logsnr[0]).sqrt())
