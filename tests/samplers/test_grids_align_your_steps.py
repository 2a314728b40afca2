"""Align Your Steps: table and minimum against their closed forms, and what early stopping is worth."""

import math
from itertools import pairwise

import pytest
import torch
from problems import D64, INTERPOLANTS, gaussian, mixture_1d
from scipy.integrate import quad

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import AlignYourSteps, FittedGrid, karras, uniform_logsnr
from diffusion_lab.samplers.grids.align_your_steps import differences, klub, least_klub

C2 = 0.25
LEVELS = torch.linspace(-10, 7, 128, dtype=D64)


def exact_table(levels, c2=C2):
    """mmse differences of N(0, c2) in one dimension."""
    mmse = c2 / (1 + c2 * torch.exp(levels))
    return (mmse[:, None] - mmse[None, :]).abs()


def optimum(low, high, steps, c2=C2):
    """log(1 + c^2 exp(logsnr)) in equal steps.

    With s = exp(logsnr) the KLUB is ½ sum_i mmse(s_i) (s_(i+1) - s_i) less a constant, mmse = c2 / w, w = 1 + c2 s. Its
    derivative with respect to s_i vanishes if c2 (w_(i+1) - w_i) / w_i^2 = c2 (1 / w_(i-1) - 1 / w_i), which is
    w_(i+1) / w_i = w_i / w_(i-1).
    """
    w = torch.linspace(math.log1p(c2 * math.exp(low)), math.log1p(c2 * math.exp(high)), steps, dtype=D64)
    return torch.log(torch.expm1(w) / c2)


def atan_levels(low, high, steps, c=C2**0.5):
    """Uniform in atan(rho / c): the optimum of Euler's method on the probability-flow ODE of Gaussian data."""
    ends = [math.atan(math.exp(-end / 2) / c) for end in (low, high)]
    return -2 * torch.log(c * torch.tan(torch.linspace(*ends, steps, dtype=D64)))


def divergence(nodes, eta, c2=C2):
    """KL(data at the last level || samples there) of DDIM, eta 0 or 1, on N(0, c2), by recursion of variances."""
    rho2 = torch.exp(-nodes)
    variance = c2 + rho2[0]
    for now, after in pairwise(rho2):
        kept = after / now if eta == 1 else (after / now).sqrt()
        fresh = (1 - after / now) * after if eta == 1 else 0.0
        variance = (kept + (1 - kept) * c2 / (c2 + now)) ** 2 * variance + fresh
    ratio = (c2 + rho2[-1]) / variance
    return float(0.5 * (ratio - 1 - torch.log(ratio)))


def data(B, dim, seed=0, dtype=D64):
    draw = torch.Generator().manual_seed(seed)
    return (C2**0.5 * torch.randn(B, dim, dtype=D64, generator=draw)).to(dtype)


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_klub_is_the_papers_integral():
    """sum_i int rho^-3 (mmse(rho_i) - mmse(rho)) d rho, by quadrature in rho."""
    nodes = uniform_logsnr(-10, 7, 8)[:-1]
    rho = torch.exp(-nodes / 2).tolist()

    def mmse(r):
        return C2 * r**2 / (C2 + r**2)

    exact = sum(
        quad(lambda r, a=a: r**-3 * (mmse(a) - mmse(r)), b, a, epsrel=1e-10)[0] for a, b in pairwise(rho)
    )
    assert abs(klub(LEVELS, exact_table(LEVELS), nodes) / exact - 1) < 1e-4


def test_klub_bounds_the_divergence_of_the_samples():
    for nodes in (uniform_logsnr(-10, 7, 10)[:-1], optimum(-10, 7, 10), atan_levels(-10, 7, 10)):
        assert divergence(nodes, 1) < klub(LEVELS, exact_table(LEVELS), nodes)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_unbiased():
    """For Gaussian data every entry is its expectation times chi^2 / n with n = B dim, whose variance is 2 / n.

    One noise for both levels would give c^2 sin^2(theta_a - theta_b) instead, theta = atan(rho / c).
    """
    B, dim, levels = 500, 40, LEVELS[::4]
    denoiser = gaussian(INTERPOLANTS["vp"], C2, dim)
    K = differences(denoiser, data(B, dim), None, SampleRNG(range(B)), levels, 100)
    a, b = torch.triu_indices(len(levels), len(levels), 1)
    z = (K / dim / exact_table(levels) - 1)[a, b] * math.sqrt(B * dim / 2)
    # 496 dependent entries: |z| < 4.5 for all at once has probability above 0.996, and the draw is fixed
    assert float(z.abs().max()) < 4.5 and float(z.std()) < 1.5
    theta = torch.atan(torch.exp(-levels / 2) / C2**0.5)
    shared = C2 * torch.sin(theta[a] - theta[b]) ** 2
    assert float((shared / exact_table(levels)[a, b] - 1).abs().max()) > 0.5


def test_the_table_of_a_mixture_is_the_difference_of_its_mmse():
    """D is a martingale along a path for every exact denoiser."""
    B, levels = 20_000, torch.linspace(-4, 4, 5, dtype=D64)
    denoiser = mixture_1d(INTERPOLANTS["ve"])
    x0, _ = denoiser.sample(B, torch.Generator().manual_seed(0))
    K = differences(denoiser, x0, None, SampleRNG(range(B)), levels, B)
    draw, mmse = torch.Generator().manual_seed(1), []
    for level in levels:
        x = x0 + torch.exp(-level / 2) * torch.randn(x0.shape, generator=draw, dtype=D64)
        mmse.append(float((x0 - denoiser(x, level.expand(B))).square().mean()))
    for a in range(4):
        assert abs(float(K[a, a + 1]) - (mmse[a] - mmse[a + 1])) < 0.02, a


def test_the_table_is_the_same_in_every_interpolant():
    tables = [
        differences(gaussian(i, C2, 3), data(20, 3), None, SampleRNG(range(20)), LEVELS[::8], 20)
        for i in INTERPOLANTS.values()
    ]
    for other in tables[1:]:
        torch.testing.assert_close(other, tables[0], rtol=1e-9, atol=0)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 40])
@pytest.mark.parametrize("high", [7, 10])
def test_the_minimum_on_gaussian_data_is_uniform_in_log_one_plus_snr(steps, high):
    levels = torch.linspace(-10, high, 128, dtype=D64)
    nodes = least_klub(levels, exact_table(levels), steps, None)
    torch.testing.assert_close(nodes, optimum(-10, high, steps), rtol=0, atol=1e-3)
    assert float(nodes[0]) == -10 and float(nodes[-1]) == high


def test_uniform_in_atan_is_another_grid():
    """It is best for DDIM, and has several times the least KLUB: the two problems must not be mixed up."""
    best, other = optimum(-10, 7, 10), atan_levels(-10, 7, 10)
    table = exact_table(LEVELS)
    assert klub(LEVELS, table, other) > 3 * klub(LEVELS, table, best)
    assert divergence(other, 0) < 0.3 * divergence(best, 0)
    for amplitude in (1e-2, -1e-2):
        moved = other.clone()
        moved[5] += amplitude
        assert divergence(moved, 0) > divergence(other, 0)
        moved = best.clone()
        moved[5] += amplitude
        assert klub(LEVELS, table, moved) > klub(LEVELS, table, best)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_by_monte_carlo_finds_the_minimum(seed):
    """4,096 normal numbers: levels within 0.25 (0.15 was the worst of 12 draws), and 1 % of the least KLUB lost."""
    B, dim = 256, 16
    fitted = AlignYourSteps(steps=10, logsnr_min=-10, logsnr_max=7, sweeps=None)
    seeds = range(1000 * seed, 1000 * seed + B)
    grid = fitted.fit(gaussian(INTERPOLANTS["vp"], C2, dim), data(B, dim, seed), None, SampleRNG(seeds))
    assert isinstance(fitted, FittedGrid) and torch.equal(check_grid(grid), grid)
    best = optimum(-10, 7, 10)
    torch.testing.assert_close(grid[:-1], best, rtol=0, atol=0.25)
    table = exact_table(LEVELS)
    assert klub(LEVELS, table, grid[:-1]) < 1.01 * klub(LEVELS, table, best)


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_stopping_early_makes_better_samples(steps):
    """In the divergence of the samples themselves, for ancestral sampling and for DDIM."""
    table = exact_table(LEVELS)
    early, end = least_klub(LEVELS, table, steps, 5), least_klub(LEVELS, table, steps, None)
    start, edm = (
        grid[:-1] for grid in (uniform_logsnr(-10, 7, steps), karras(math.exp(-3.5), math.exp(5), 7.0, steps))
    )
    assert early.shape == (steps,) and bool((early.diff() > 0).all())
    assert klub(LEVELS, table, end) < klub(LEVELS, table, early) < klub(LEVELS, table, start)
    for eta in (0, 1):
        assert divergence(early, eta) < min(divergence(nodes, eta) for nodes in (end, start, edm))


def test_sweeps_go_to_the_minimum():
    table = exact_table(LEVELS)
    start = uniform_logsnr(-10, 7, 10)[:-1]
    torch.testing.assert_close(least_klub(LEVELS, table, 10, 0), start, rtol=0, atol=1e-12)
    values = [klub(LEVELS, table, least_klub(LEVELS, table, 10, sweeps)) for sweeps in (0, 1, 5, 20, 100)]
    assert values == sorted(values, reverse=True)
    torch.testing.assert_close(least_klub(LEVELS, table, 10, 200), optimum(-10, 7, 10), rtol=0, atol=5e-3)


# ---- what every fit owes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [None, 5])
def test_same_grid_whatever_the_batch_and_the_past_of_the_rng(sweeps):
    B, dim = 40, 3

    def fit(size, rng, dtype=D64, progress=None):
        fitted = AlignYourSteps(
            steps=6, logsnr_min=-10, logsnr_max=7, levels=32, sweeps=sweeps, batch_size=size
        )
        x0 = data(B, dim, dtype=dtype)
        return fitted.fit(gaussian(INTERPOLANTS["vp"], C2, dim), x0, None, rng, progress)

    calls, used = [], SampleRNG(range(B))
    used.randn((dim,))
    whole = fit(B, SampleRNG(range(B)))
    parts = fit(7, used, progress=lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-7)
    assert torch.equal(fit(B, SampleRNG(range(B))), whole)
    assert calls == [(k + 1, 6 * 32) for k in range(6 * 32)]
    assert not torch.allclose(fit(B, SampleRNG(range(B, 2 * B))), whole)
    # float32 draws other numbers
    assert bool(torch.isfinite(fit(B, SampleRNG(range(B)), torch.float32)[:-1]).all())


def test_conditions_are_dealt_out_with_their_examples():
    seen = []

    class Labelled:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            assert logsnr.shape == (x.shape[0],)
            seen.append((x.shape[0], cond["label"].tolist()))
            return 0.5 * x

    fitted = AlignYourSteps(steps=3, logsnr_min=-4, logsnr_max=4, levels=8, batch_size=2)
    fitted.fit(Labelled(), data(3, 2), {"label": torch.tensor([7, 8, 9])}, SampleRNG(range(3)))
    assert seen == [(2, [7, 8])] * 8 + [(1, [9])] * 8


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 200},
        {"logsnr_min": -math.inf},
        {"logsnr_max": -20.0},
        {"levels": 7, "steps": 3},
        {"sweeps": -1},
        {"batch_size": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="AlignYourSteps"):
        AlignYourSteps(**{"steps": 10, "logsnr_min": -10.0, "logsnr_max": 7.0, **settings})


def test_a_fit_needs_one_seed_an_example():
    fitted = AlignYourSteps(steps=3, logsnr_min=-4, logsnr_max=4, levels=8)
    for B, seeds in ((3, 2), (0, 0)):
        with pytest.raises(ValueError, match="one seed an example"):
            fitted.fit(gaussian(INTERPOLANTS["vp"], C2, 2), data(B, 2), None, SampleRNG(range(seeds)))
