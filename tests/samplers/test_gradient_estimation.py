"""Gradient estimation: its order as derived, and the authors' loop step by step."""

import math
from itertools import pairwise

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.gradient_estimation import GradientEstimation
from diffusion_lab.samplers.grids import from_sigmas, karras

VE = INTERPOLANTS["ve"]


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 2.4])
def test_laws(gamma):
    laws.check_everything(GradientEstimation(gamma=gamma))


def test_it_is_of_order_one_and_two_for_adams_bashforth():
    laws.check_order(GradientEstimation(), 1)
    laws.check_order(GradientEstimation(gamma=1.0), 1)
    # uniform in log-SNR: h / h_previous -> 1, so gamma = 3/2 cancels the h^2 term up to h (h - h_previous) = O(h^3)
    laws.check_order(GradientEstimation(gamma=1.5), 2)


def test_gamma_one_is_ddim_bitwise():
    for interpolant in INTERPOLANTS.values():
        assert torch.equal(
            laws.run(GradientEstimation(gamma=1.0), interpolant), laws.run(DDIM(), interpolant)
        )


@pytest.mark.parametrize(
    "gamma", [1.2, 2.0, *(pytest.param(gamma, marks=pytest.mark.slow) for gamma in (1.8, 2.5))]
)
def test_error_is_ddims_times_three_minus_two_gamma(gamma):
    """The module's derivation: the leading error of equal steps, on N(0, c), whose ODE is solved in closed form."""
    c, sigma_max, sigma_min = 0.3, 3.0, 0.5

    def error(sampler, steps):
        grid = from_sigmas(torch.linspace(sigma_max, sigma_min, steps + 1, dtype=D64).tolist())
        seen, x = [], torch.ones(1, 1, dtype=D64)
        sampler(gaussian(VE, c), x, grid, on_step=lambda k, logsnr, x, x0: seen.append(float(x)))
        return seen[-2] - math.sqrt((c + sigma_min**2) / (c + sigma_max**2))

    ratios = [error(GradientEstimation(gamma=gamma), n) / error(DDIM(), n) for n in (1000, 2000, 4000)]
    wanted = 3 - 2 * gamma
    # the ratio itself converges at order 1
    assert abs(ratios[-1] - wanted) < 0.01
    assert abs(ratios[-1] - wanted) == pytest.approx(abs(ratios[0] - wanted) / 4, rel=0.1)


def test_it_helps_where_steps_are_few():
    # the paper's case: the gain is not in the order but in the constant, on a mixture and ten steps from sigma 40
    draw = torch.Generator().manual_seed(3)
    denoiser = GaussianMixtureDenoiser(
        means=torch.randn(20, 16, generator=draw, dtype=D64),
        variances=torch.full((20,), 0.01, dtype=D64),
        weights=torch.ones(20, dtype=D64),
        interpolant=VE,
    )
    x = 40 * torch.randn(200, 16, generator=draw, dtype=D64)

    def distance(sampler):
        # of the last state before the final denoising from the nearest mean, in units of what its noise explains
        seen = []
        sampler(denoiser, x, karras(0.05, 40.0, 7.0, 10), on_step=lambda k, logsnr, x, x0: seen.append(x))
        return float(torch.cdist(seen[-2], denoiser.means).min(1).values.mean())

    exact = math.sqrt(16 * (0.01 + 0.05**2))
    ddim, ours = distance(DDIM()), distance(GradientEstimation())
    assert abs(ours - exact) < 0.7 * abs(ddim - exact), (ddim, ours, exact)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_it_is_the_authors_algorithm(gamma):
    """`samples` of the authors' smalldiffusion, written out again; there the noise level is our rho.

    Its last step too is taken along eps_bar; where the level is zero, as here, that would leave
    x0 - (gamma - 1) rho (eps - eps_previous), noise of the last level brought back. The contract of the house, like
    the version in ComfyUI, returns x0. Every state before is the same.
    """
    denoiser, steps = mixture_1d(VE), 12
    grid = karras(0.02, 40.0, 7.0, steps)
    sigmas = torch.cat([torch.exp(-0.5 * grid[:-1]), torch.zeros(1, dtype=D64)])
    x = 40 * torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=D64)
    for interpolant in INTERPOLANTS.values():
        ours, theirs, y, eps = [], [], x, None
        alpha = interpolant(grid[0])[0]
        GradientEstimation(gamma=gamma)(
            mixture_1d(interpolant),
            alpha * x,
            grid,
            on_step=lambda k, level, x, x0, f=interpolant, seen=ours: seen.append(x / f(level)[0]),
        )
        for sigma, sigma_next in pairwise(sigmas):
            previous, eps = eps, (y - denoiser(y, -2 * torch.log(sigma))) / sigma
            average = eps if previous is None else gamma * eps + (1 - gamma) * previous
            y = y + (sigma_next - sigma) * average
            theirs.append(y)
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        x0 = theirs[-2] - sigmas[-2] * eps
        torch.testing.assert_close(ours[-1], x0, rtol=0, atol=1e-11)


def test_calls_are_counted_truly_and_gamma_checked():
    counting, grid = CountingDenoiser(mixture_1d(VE)), karras(0.02, 40.0, 7.0, 9)
    GradientEstimation()(counting, torch.zeros(2, 1, dtype=D64), grid)
    assert counting.calls == 9
    with pytest.raises(ValueError, match="gamma"):
        GradientEstimation(gamma=0.5)
