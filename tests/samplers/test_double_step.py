"""Double steps: the marginals that exact steps keep, the variance of those that are not, the edge, the calls.

The laws of every sampler are in test_samplers.py.
"""

import math

import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian

from diffusion_lab.process import Cosine
from diffusion_lab.process.gaussian import inverse_ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.double_step import DoubleStep
from diffusion_lab.samplers.grids import uniform_u

GRID = uniform_u(Cosine(logsnr_min=-12.0, logsnr_max=12.0), 8)


class Sources:
    """The noise of a linear probe: draw k moves coordinate k alone, so a sample's coordinates are its coefficients."""

    def __init__(self):
        self.drawn = 0

    def randn_like(self, x):
        self.drawn += 1
        z = torch.zeros_like(x)
        z[0, self.drawn] = 1.0
        return z


class ExactDoubleSteps:
    """N(0, S): the x0 with which DDIM's step to the level after next is the probability flow's."""

    def __init__(self, interpolant, variance, grid):
        self.interpolant, self.variance, self.levels = interpolant, variance, grid.tolist()

    def length(self, logsnr):
        alpha, sigma = self.interpolant(logsnr)
        return alpha**2 * self.variance + sigma**2

    def __call__(self, x, logsnr, cond=None):
        at, n = logsnr[0], len(self.levels)
        (i,) = [k for k, level in enumerate(self.levels) if level == float(at)]
        to = torch.tensor(self.levels[min(i + 2, n - 1)], dtype=D64)
        reached = torch.sqrt(self.length(to) / self.length(at)) * x
        return inverse_ddim_step(self.interpolant, x, reached, at, to)


def variances(denoiser, interpolant, grid):
    """The variance after each step, exactly: of what is linear in the noise, the sum of squared coefficients."""
    found, rng = [], Sources()
    x = torch.zeros(1, len(grid), dtype=D64)
    alpha, sigma = interpolant(grid[0])
    x[0, 0] = torch.sqrt(alpha**2 * 0.25 + sigma**2)
    DoubleStep()(
        denoiser, x, grid, rng=rng, on_step=lambda k, level, x, x0: found.append(float(x.square().sum()))
    )
    return found, rng.drawn


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_were_the_long_steps_exact_every_level_has_its_variance_and_the_end_that_of_the_data(
    interpolant, steps
):
    grid = uniform_u(Cosine(logsnr_min=-12.0, logsnr_max=12.0), steps)
    denoiser = ExactDoubleSteps(interpolant, 0.25, grid)
    found, drawn = variances(denoiser, interpolant, grid)
    wanted = [float(denoiser.length(level)) for level in grid[1:-1]] + [0.25]
    assert found == pytest.approx(wanted, rel=1e-12)
    # all but the last step draw
    assert drawn == steps - 1


def test_the_variance_of_four_steps_by_hand():
    """DDIM's gain over two levels, then the noise between them, in plain numbers (pure cosine, S = 0.25)."""
    grid = uniform_u(PURE_COSINE, 4)

    def level(t):
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)

    def gain(t, s):
        (a, b), (a_s, b_s) = level(t), level(s)
        k = a * 0.25 / (a**2 * 0.25 + b**2)
        return (a_s - a * b_s / b) * k + b_s / b

    variance, wanted = 1.0, []
    for t in (1.0, 0.75, 0.5, 0.25):
        to, back = max(t - 0.5, 0.0), t - 0.25
        variance *= gain(t, to) ** 2
        if back > 0:
            (a, b), (a_back, b_back) = level(to), level(back)
            variance = (a_back / a) ** 2 * variance + b_back**2 - (a_back / a) ** 2 * b**2
        wanted.append(variance)
    found, rng = [], Sources()
    x = torch.zeros(1, 5, dtype=D64)
    x[0, 0] = 1.0
    DoubleStep()(
        gaussian(INTERPOLANTS["vp"], 0.25, dim=5), x, grid, rng=rng,
        on_step=lambda k, level, x, x0: found.append(float(x.square().sum())),
    )  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-10)


def test_one_step_is_ddims_and_n_steps_are_n_calls():
    denoiser, x = gaussian(INTERPOLANTS["vp"], 0.25, dim=3), torch.ones(2, 3, dtype=D64)
    one = uniform_u(Cosine(logsnr_min=-12.0, logsnr_max=12.0), 1)
    assert torch.equal(DoubleStep()(denoiser, x, one, rng=SampleRNG([0, 1])), DDIM()(denoiser, x, one))
    counting = CountingDenoiser(denoiser)
    DoubleStep()(counting, x, GRID, rng=SampleRNG([0, 1]))
    assert counting.calls == len(GRID) - 1


def test_noise_needs_streams():
    with pytest.raises(ValueError, match="DoubleStep draws noise"):
        DoubleStep()(gaussian(INTERPOLANTS["vp"], 0.25), torch.ones(1, 1, dtype=D64), GRID)
