"""Samplers on Gaussian data, where every step is a number."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, STOCHASTIC, gaussian

from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun
from diffusion_lab.samplers.grids import uniform_u

# final Var / S after N DDIM steps, pure cosine schedule, uniform u, the same for S = 0.25 and S = 4 (computed apart,
# by iterating the gain G = c k + sigma_next / sigma, k = alpha S / (alpha^2 S + sigma^2))
DDIM_VARIANCE = {1: 0.0, 2: 0.1600, 4: 0.444731, 8: 0.676919, 16: 0.824202, 64: 0.952943, 512: 0.993994}


@pytest.mark.parametrize("interpolant", ["vp", "rf"])
@pytest.mark.parametrize("S", [0.25, 4.0])
@pytest.mark.parametrize(("steps", "ratio"), DDIM_VARIANCE.items())
def test_variance_after_ddim(interpolant, S, steps, ratio):
    # the sampler is linear here: its gain on unit noise, squared, is the variance
    x = torch.ones(1, 1, dtype=D64)
    end = DDIM()(gaussian(INTERPOLANTS[interpolant], S), x, uniform_u(PURE_COSINE, steps))
    assert float(end**2) / S == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize(
    "sampler", [DDIM(), Euler(), Heun(), DPMSolverPP2M()], ids=lambda s: type(s).__name__
)
def test_exploding_process_needs_a_finite_start_and_then_agrees(sampler):
    grid = uniform_u(Cosine(logsnr_min=-20, logsnr_max=20), 16)
    ends = []
    for interpolant in INTERPOLANTS.values():
        _, sigma = interpolant(grid[0])
        ends.append(sampler(gaussian(interpolant, 0.25), torch.ones(1, 1, dtype=D64) * sigma, grid))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-13 and float((ends[0] - ends[2]).abs().max()) < 1e-13


def test_best_ddim_grid_is_uniform_in_the_angle():
    # papers: N(0, c^2), theta = atan(rho / c): std ratio of DDIM is the product of cos(theta_i - theta_{i+1})
    c, interpolant = 0.5, INTERPOLANTS["ve"]
    rho = torch.cat(
        [torch.logspace(math.log10(80), math.log10(0.002), 11, dtype=D64), torch.zeros(1, dtype=D64)]
    )
    grid = -2 * torch.log(rho)
    theta = torch.atan(rho / c)
    end = DDIM()(gaussian(interpolant, c**2), torch.ones(1, 1, dtype=D64), grid)
    start_std = math.sqrt(c**2 + 80**2)
    expected = float(torch.cos(theta.diff()).prod())
    assert float(end) * start_std / c == pytest.approx(expected, rel=1e-10)


def ddpm_variance(S, grid, interpolation):
    """V_next = gain^2 V + var, in the variance-preserving process, written from the textbook formulas."""
    vp = INTERPOLANTS["vp"]
    variance = torch.ones((), dtype=D64)
    for now, then in pairwise(grid):
        (a, s), (a2, s2) = vp(now), vp(then)
        ats2 = (a / a2) ** 2
        forward = s**2 - ats2 * s2**2
        k = a * S / (a**2 * S + s**2)
        gain = (a / a2) * s2**2 / s**2 + a2 * forward / s**2 * k
        lower, upper = forward * s2**2 / s**2, forward
        noise = (
            torch.zeros_like(lower)
            if torch.isinf(then)
            else lower ** (1 - interpolation) * upper**interpolation
        )
        variance = gain**2 * variance + noise
    return float(variance)


@pytest.mark.parametrize("interpolation", [0.0, 0.3, 1.0])
def test_variance_after_ancestral_sampling(interpolation):
    S, n = 0.25, 40_000
    grid = uniform_u(PURE_COSINE, 12)
    rng = SampleRNG(range(n // 100))
    x = rng.randn((100,), dtype=D64)
    end = DDPM(interpolation=interpolation)(gaussian(INTERPOLANTS["vp"], S, dim=100), x, grid, rng=rng)
    exact = ddpm_variance(S, grid, interpolation)
    # the sample variance of n normals has a relative standard error of sqrt(2 / n), 0.7 %
    assert float(end.var()) == pytest.approx(exact, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_the_data_at_the_end_and_the_marginal_on_the_way(name):
    S, mean, n = 0.25, 0.3, 40_000
    steps = 400
    grid, vp = uniform_u(PURE_COSINE, steps), INTERPOLANTS["vp"]
    rng = SampleRNG(range(n // 100))
    seen = {}
    sampler = STOCHASTIC[name]
    if name == "predictor_corrector":
        # at the paper's snr Langevin steps are biased by snr^2 + 2 / dim (tests/samplers/test_predictor_corrector.py)
        sampler = replace(sampler, snr=0.05)
    end = sampler(
        gaussian(vp, S, dim=100, mean=mean),
        rng.randn((100,), dtype=D64),
        grid,
        rng=rng,
        on_step=lambda k, logsnr, x, x0: seen.update({k: (logsnr, x)}) if k == steps // 2 else None,
    )
    logsnr, middle = seen[steps // 2]
    alpha, sigma = vp(logsnr)
    for x, m, v in ((end, mean, S), (middle, float(alpha) * mean, float(alpha**2 * S + sigma**2))):
        # four standard errors, and 1.5 % for the steps, which are first order
        assert float(x.mean()) == pytest.approx(m, abs=4 * math.sqrt(v / n) + 0.005)
        assert float(x.var()) == pytest.approx(v, rel=4 * math.sqrt(2 / n) + 0.015)
