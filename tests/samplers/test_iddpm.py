"""iDDPM's sampler: exact on Gaussian data with the best variance, DDPM with a constant one."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d

from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDPM
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.samplers.iddpm import IDDPM


class Constant:
    """The mixture's denoiser with one c for all."""

    def __init__(self, interpolant, c):
        self.problem, self.interpolant, self.c = mixture_1d(interpolant), interpolant, c

    def __call__(self, x, logsnr, cond=None):
        return self.problem(x, logsnr, cond)

    def with_variance(self, x, logsnr, cond=None):
        return self(x, logsnr, cond), torch.full_like(x, self.c)


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_a_constant_interpolation_is_ddpm(c, interpolant):
    def end(sampler):
        rng = SampleRNG(range(5))
        x = interpolant(laws.GRID[0])[1] * rng.randn((1,), dtype=D64)
        return sampler(Constant(interpolant, c), x, laws.GRID, rng=rng)

    torch.testing.assert_close(end(IDDPM()), end(DDPM(interpolation=c)), rtol=0, atol=1e-12)


class Best:
    """N(0, S) with the interpolation that makes the next step of `grid` exact."""

    def __init__(self, S, grid):
        self.interpolant, self.S, self.grid = VariancePreserving(), S, grid
        self.problem = gaussian(self.interpolant, S, dim=100)

    def __call__(self, x, logsnr, cond=None):
        return self.problem(x, logsnr, cond)

    def with_variance(self, x, logsnr, cond=None):
        now = logsnr[0]
        then = self.grid[int((self.grid <= now).sum())]
        (a, s), (a2, s2) = self.interpolant(now), self.interpolant(then)
        # var = lower + (d mean / d x0)^2 Var[x0 | x], everything in the variance-preserving process
        forward = s**2 - (a / a2) ** 2 * s2**2
        lower, upper = forward * s2**2 / s**2, forward
        var = lower + (a2 * forward / s**2) ** 2 * s**2 * self.S / (a**2 * self.S + s**2)
        return self(x, logsnr, cond), (torch.log(var / lower) / torch.log(upper / lower)).expand_as(x)


def test_gaussian_data_are_exact_at_every_level_of_a_coarse_grid():
    S, n, grid = 0.25, 40_000, uniform_u(PURE_COSINE, 4)
    rng, seen = SampleRNG(range(n // 100)), []
    # the first level has no lower variance: start at the second
    x = rng.randn((100,), dtype=D64)
    alpha, sigma = VariancePreserving()(grid[1])
    x = torch.sqrt(alpha**2 * S + sigma**2) * x
    sampler = IDDPM()
    sampler(Best(S, grid), x, grid[1:], rng=rng, on_step=lambda k, l, x, x0: seen.append((l, x)))
    for logsnr, x in seen[:-1]:
        alpha, sigma = VariancePreserving()(logsnr)
        exact = float(alpha**2 * S + sigma**2)
        # four standard errors of a variance; DDPM's own two choices are off by far more on four steps
        assert float(x.var()) == pytest.approx(exact, rel=4 * math.sqrt(2 / n))
    rng, seen = SampleRNG(range(n // 100)), []
    alpha, sigma = VariancePreserving()(grid[1])
    x = torch.sqrt(alpha**2 * S + sigma**2) * rng.randn((100,), dtype=D64)
    DDPM(interpolation=0.0)(
        Best(S, grid), x, grid[1:], rng=rng, on_step=lambda k, l, x, x0: seen.append((l, x))
    )
    alpha, sigma = VariancePreserving()(seen[0][0])
    assert abs(float(seen[0][1].var() / (alpha**2 * S + sigma**2)) - 1) > 8 * math.sqrt(2 / n)


def test_a_denoiser_without_a_variance_is_refused():
    with pytest.raises(ValueError, match="learned a variance"):
        laws.run(IDDPM(), INTERPOLANTS["vp"])


def test_a_guidance_hides_the_variance_and_the_error_says_so():
    guided = ClassifierFree(Constant(INTERPOLANTS["vp"], 0.4), scale=2.0)
    with pytest.raises(ValueError, match="no guidance or modifier around it, which would hide it"):
        IDDPM()(guided, torch.zeros(2, 1, dtype=D64), laws.GRID, rng=SampleRNG(range(2)))


def test_laws():
    class Sampler(IDDPM):
        """Asks the mixture for its mean, and takes 0.4 for what it has learned."""

        def __call__(self, denoiser, x, grid, **rest):
            wrapped = Constant(denoiser.interpolant, 0.4)
            wrapped.problem = denoiser
            return super().__call__(wrapped, x, grid, **rest)

    laws.check_everything(Sampler())
    laws.check_marginals(Sampler())
