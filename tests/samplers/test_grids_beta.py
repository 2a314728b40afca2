"""Quantiles of a Beta distribution over a schedule's time."""

import math

import pytest
import torch
from problems import D64, PURE_COSINE

from diffusion_lab.process import Cosine, Karras
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import beta_quantile, uniform_u


def test_the_arcsine_law_in_closed_form():
    """Beta(1/2, 1/2) has the quantiles sin^2(pi p / 2)."""
    grid = beta_quantile(Cosine(), 8, 0.5, 0.5)
    p = 1 - torch.arange(8, dtype=D64) / 8
    torch.testing.assert_close(grid[:-1], Cosine()(torch.sin(math.pi * p / 2) ** 2), rtol=1e-10, atol=1e-10)
    assert float(grid[-1]) == math.inf and torch.equal(check_grid(grid), grid)
    assert float(beta_quantile(PURE_COSINE, 8, 0.5, 0.5)[0]) == -math.inf


def test_the_uniform_law_is_uniform():
    torch.testing.assert_close(
        beta_quantile(Cosine(), 9, 1.0, 1.0), uniform_u(Cosine(), 9), rtol=1e-12, atol=0
    )


def test_which_parameter_is_which():
    """Beta(a, 1) has the quantiles p^(1/a): a smaller alpha crowds u = 0, the clean end."""
    p = 1 - torch.arange(8, dtype=D64) / 8
    torch.testing.assert_close(
        beta_quantile(Cosine(), 8, 0.5, 1.0)[:-1], Cosine()(p**2), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.4, 0.9)])
def test_agreement_with_diffusers(alpha, beta):
    """diffusers takes quantiles over sigma itself, our Karras(rho=1), at 1, ..., 0 inclusive.

    So its N levels are our grid of N - 1 steps, and sigma_min. `set_timesteps` offers 0.6 alone: hence the inner one.
    """
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(12)
    all_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
    low, high = float(all_sigmas[0]), float(all_sigmas[-1])
    peer = torch.from_numpy(scheduler._convert_to_beta(all_sigmas.flip(0), 12, alpha, beta))
    if (alpha, beta) == (0.6, 0.6):
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), peer, rtol=1e-5, atol=0)
    ours = torch.exp(-beta_quantile(Karras(sigma_min=low, sigma_max=high, rho=1.0), 11, alpha, beta) / 2)
    torch.testing.assert_close(ours[:-1], peer[:-1], rtol=1e-10, atol=0)
    assert abs(float(peer[-1]) / low - 1) < 1e-6


@pytest.mark.parametrize(
    ("steps", "alpha", "beta"), [(0, 0.6, 0.6), (5, 0.0, 0.6), (5, 0.6, -1.0), (50, 1e-4, 1.0)]
)
def test_bad_settings_are_refused(steps, alpha, beta):
    with pytest.raises(ValueError, match=r"grid|alpha|narrow"):
        beta_quantile(Cosine(), steps, alpha, beta)
