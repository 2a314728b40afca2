"""DPS: the paper's step to rounding, residuals that fall with its length, and that it is not calibrated."""

import math

import pytest
import torch
from measured import assert_moments, cosine_levels, draw, gaussian_images, mixture_images, normal, scalars
from problems import D64, INTERPOLANTS

from diffusion_lab.measurements import Inpaint, JPEGLike, PhaseRetrieval, SuperResolution
from diffusion_lab.posterior import DPS
from diffusion_lab.posterior.dps import FLOOR
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Heun
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import MEASUREMENT

IDENTITY = SuperResolution(factor=1)
GRID = cosine_levels(12, ends=8.0)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("A", [Inpaint(), PhaseRetrieval()], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("index", [0, 5, 10, 11])
def test_ancestral_step_is_the_papers(A, index, interpolant):
    denoiser, step = mixture_images(interpolant), 0.4
    x, y = normal(3, 1, 4, 4), A(normal(3, 1, 4, 4, seed=1))
    level, later = GRID[index], GRID[index + 1]
    ddpm, cond = DDPM(), {MEASUREMENT: y}

    def ancestral(d):
        return ddpm.step(BoundDenoiser(d, cond), x, level, later, None, SampleRNG(range(3)))[0]

    guided, plain = ancestral(DPS(denoiser, A, step, GRID)), ancestral(denoiser)
    # z = x / k in variance-preserving units
    (a, s), (a2, s2) = interpolant(level), interpolant(later)
    k, k2 = torch.sqrt(a**2 + s**2), torch.sqrt(a2**2 + s2**2)
    z = (x / k).requires_grad_()
    residual = y - A(denoiser(k * z, level.expand(3)))
    squared = residual.square().flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(squared.sum(), z)
    zeta = step / squared.sqrt().detach()[:, None, None, None]
    expected = plain / k2 - zeta * gradient
    torch.testing.assert_close(guided / k2, expected, rtol=0, atol=1e-11)


def test_public_codes_scale_is_twice_the_step():
    vp, A = INTERPOLANTS["vp"], Inpaint()
    denoiser, x, y = mixture_images(vp), normal(1, 1, 4, 4), A(normal(1, 1, 4, 4, seed=1))
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(y - A(denoiser(at, GRID[11].expand(1)))), at)
    guided = DPS(denoiser, A, 0.35, GRID)(x, GRID[11].expand(1), {MEASUREMENT: y})
    torch.testing.assert_close(guided, denoiser(x, GRID[11].expand(1)) - 0.7 * gradient, rtol=0, atol=1e-12)


def test_coefficient_is_that_of_the_step_a_level_is_in():
    wrapped = DPS(scalars(INTERPOLANTS["ve"], 1.0), IDENTITY, 1.0, GRID)
    later = GRID[1:]
    c = -torch.expm1(GRID[:-1] - later) * torch.sigmoid(later).sqrt()
    c[-1] = 1.0
    torch.testing.assert_close(wrapped.coefficient(GRID[:-1]), c, rtol=0, atol=1e-15)
    # rounded levels still begin their step, and a solver's inner stages belong to it
    single = wrapped.coefficient(GRID[:-1].float())
    torch.testing.assert_close(single, c.float(), rtol=1e-6, atol=0)
    for part in (0.01, 0.5, 0.999999):
        between = GRID[:-2] + part * GRID[:-1].diff()
        assert torch.equal(wrapped.coefficient(between), wrapped.coefficient(GRID[:-2]))
    outside = torch.tensor([-math.inf, -20.0, 30.0], dtype=D64)
    torch.testing.assert_close(wrapped.coefficient(outside), c[[0, 0, -1]], rtol=0, atol=1e-15)


def test_a_grid_from_pure_noise_has_finite_coefficients():
    grid = torch.tensor([-math.inf, -3.0, 2.0, math.inf], dtype=D64)
    wrapped = DPS(scalars(INTERPOLANTS["vp"], 1.0), IDENTITY, 1.0, grid)
    torch.testing.assert_close(
        wrapped.coefficient(grid[0]), torch.sigmoid(grid[1]).sqrt(), rtol=0, atol=1e-15
    )


def test_no_residual_is_no_step():
    denoiser, x, logsnr = mixture_images(INTERPOLANTS["vp"]), normal(2, 1, 4, 4), GRID[4].expand(2)
    x0 = denoiser(x, logsnr)
    y = x0.clone()
    y[1] += 1e-12
    guided = DPS(denoiser, IDENTITY, 1.0, GRID)(x, logsnr, {MEASUREMENT: y})
    assert torch.equal(guided[0], x0[0])
    # the floor divides, not the tiny residual
    assert 0.0 < float((guided[1] - x0[1]).abs().max()) < 100 * 1e-12 / FLOOR


# ---- draws: conditional-video-discrete.md, section 6(e) -------------------------------------------------------------


def drawn(step, n=4000):
    """y = x0 + 0.3 n = 1 with x0 ~ N(0, 1): a sample each, for the norm is of a sample."""
    grid = cosine_levels(1000)
    wrapped = DPS(scalars(INTERPOLANTS["vp"], 1.0), IDENTITY, step, grid)
    return draw(wrapped, DDPM(), grid, torch.ones(n, 1, 1, 1, dtype=D64), (1, 1, 1), seeds=range(n))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "row", "rounding"),
    [(3e-4, (0.22, 0.79), 0.005), (1e-3, (0.63, 0.37), 0.005), (3e-3, (0.99, 0.006), 0.005)],
)
def test_table_6e_no_step_is_calibrated(step, row, rounding):
    draws = drawn(step)
    assert_moments(draws, *row, rounding=rounding, reference=20_000)
    # truth: 0.917 and 0.083. Where the mean comes near, the variance is gone; where there is variance, the mean is not
    if step < 2e-3:
        assert float(draws.mean()) < 0.7 and float(draws.var()) > 0.3
    else:
        assert float(draws.mean()) > 0.95 and float(draws.var()) < 0.02


@pytest.mark.parametrize("step", [0.01, 0.03])
def test_table_6e_long_steps_collapse_to_y(step):
    draws = drawn(step, n=1000)
    # printed as 1.0 and ~0: y itself, to within the length of a step
    assert abs(float(draws.mean()) - 1.0) < 2 * step and 0.0 <= float(draws.var()) < (2 * step) ** 2


def test_residuals_fall_with_the_step():
    def residual(step):
        return float((drawn(step, n=500) - 1.0).abs().mean())

    residuals = [residual(step) for step in (0.0, 3e-4, 1e-3, 3e-3)]
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < 0.05 * residuals[0]
    # until they are as short as the steps, which then overshoot
    assert residual(0.01) < 2 * 0.01


@pytest.mark.parametrize(
    "A", [Inpaint(), SuperResolution(factor=2), JPEGLike(quality=50.0), PhaseRetrieval()]
)
def test_residuals_of_images_fall_with_the_step(A):
    denoiser, mean, _ = gaussian_images(INTERPOLANTS["vp"], (1, 8, 8))
    grid = cosine_levels(60, ends=10.0)
    y = A(mean[None] + 0.5).expand(8, *A(mean[None]).shape[1:])
    residuals = []
    for step in (0.0, 0.01, 0.03, 0.1):
        end = draw(DPS(denoiser, A, step, grid), DDPM(), grid, y, (1, 8, 8), seeds=range(8))
        residuals.append(float((y - A(end)).square().mean().sqrt()))
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < 0.5 * residuals[0]


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(), Heun()], ids=["ddpm", "ddim", "heun"])
def test_the_same_images_in_every_interpolant(sampler):
    y = Inpaint()(normal(3, 1, 4, 4, seed=1))
    ends = []
    for interpolant in INTERPOLANTS.values():
        wrapped = DPS(mixture_images(interpolant), Inpaint(), 0.05, GRID)
        ends.append(draw(wrapped, sampler, GRID, y, (1, 4, 4), range(3)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


def test_one_call_and_its_errors():
    counting = CountingDenoiser(mixture_images(INTERPOLANTS["vp"]), batch=2)
    DPS(counting, Inpaint(), 1.0, GRID)(
        normal(2, 1, 4, 4), torch.zeros(2, dtype=D64), {MEASUREMENT: normal(2, 1, 4, 4)}
    )
    assert counting.calls == 1
    with pytest.raises(ValueError, match="step >= 0"):
        DPS(counting, Inpaint(), -1.0, GRID)
    with pytest.raises(ValueError, match="must end at"):
        DPS(counting, Inpaint(), 1.0, GRID[:-1])
    with pytest.raises(ValueError, match="grid"):
        DPS(counting, Inpaint(), 1.0, uniform_u)
