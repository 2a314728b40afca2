"""Fresh noise on every answer: what a denoiser loses by it, a student does not, and training follows."""

import math
from itertools import pairwise

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian

from diffusion_lab.guidance import Unguided
from diffusion_lab.losses import P2, DenoisingLoss, EpsMSE
from diffusion_lab.losses.distillation import DistributionMatchingLoss
from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG, StepRNG
from diffusion_lab.samplers import DDIM, Generation
from diffusion_lab.samplers.grids import from_logsnrs, uniform_u
from diffusion_lab.samplers.renoise import Renoise

VP = INTERPOLANTS["vp"]
S = 0.25


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law(Renoise())


def sample(denoiser, grid, n=400):
    rng = SampleRNG(range(n))
    x = rng.randn((100,), dtype=D64) * VP(grid[0])[1]
    return Renoise()(denoiser, x, grid, rng=rng)


def test_one_step_is_ddims_and_noise_is_needed_for_more():
    denoiser, grid = gaussian(VP, S, dim=100), uniform_u(PURE_COSINE, 1)
    x = SampleRNG(range(9)).randn((100,), dtype=D64)
    rng = SampleRNG(range(9))
    assert torch.equal(Renoise()(denoiser, x, grid, rng=rng), DDIM()(denoiser, x, grid))
    # to the end none is drawn
    answer, _ = Renoise().step(denoiser, x, grid[0].expand(9), grid[1].expand(9), None, None)
    assert torch.equal(answer, denoiser(x, grid[0].expand(9)))
    with pytest.raises(ValueError, match="Renoise draws noise"):
        Renoise()(denoiser, x, uniform_u(PURE_COSINE, 3))


def test_a_denoiser_loses_variance_as_the_formula_says():
    """Var x_next = alpha_next^2 k^2 Var x + sigma_next^2, and more steps do not end at the data's."""
    for steps in (2, 16):
        grid = uniform_u(PURE_COSINE, steps)
        variance = float(VP(grid[0])[1] ** 2)
        for now, then in pairwise(grid):
            (alpha, sigma), (alpha_next, sigma_next) = VP(now), VP(then)
            k = alpha * S / (alpha**2 * S + sigma**2)
            variance = float(alpha_next**2 * k**2 * variance + sigma_next**2)
        found = float(sample(gaussian(VP, S, dim=100), grid).var())
        assert found == pytest.approx(variance, rel=4 * math.sqrt(2 / 40_000))
        assert variance < 0.9 * S


def test_a_student_that_goes_all_the_way_stays_exact():
    class Exact:
        """The map of the whole probability flow."""

        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            alpha, sigma = (level[:, None] for level in VP(logsnr))
            return x * torch.sqrt(S / (alpha**2 * S + sigma**2))

    for steps in (1, 4):
        found = sample(Exact(), uniform_u(PURE_COSINE, steps))
        assert float(found.var()) == pytest.approx(S, rel=4 * math.sqrt(2 / 40_000))


class Watching:
    """A student that writes down where it was asked."""

    interpolant = VP

    def __init__(self):
        self.asked = []

    def __call__(self, x, logsnr, cond=None):
        self.asked.append((x, logsnr))
        return torch.tanh(x + 0.1 * logsnr[:, None])


class Drawn:
    """Training's numbers are the sampler's."""

    def __init__(self, rng, place):
        self.rng, self.place = rng, place

    def randn(self, tag, shape, dtype):
        return self.rng.randn(shape, dtype=dtype)

    def rand(self, tag):
        return self.place


def training(levels):
    schedule = Cosine(logsnr_min=-10.0, logsnr_max=10.0)
    score = DenoisingLoss(schedule=schedule, weighting=EpsMSE(schedule=schedule))
    return DistributionMatchingLoss(
        schedule=schedule, weighting=P2(schedule=schedule, k=0.0), score=score, logsnrs=levels
    )


def test_training_follows_the_samplers_own_steps():
    levels = [-6.0, -2.0, 0.0, 3.0]
    loss = training(levels)
    sampled, trained = Watching(), Watching()
    recipe = Generation(sampler=Renoise(), grid=from_logsnrs(levels), guidance=Unguided, shape=(3,))
    recipe(sampled, seeds=range(8))
    place = (torch.arange(8) + 0.5) / 8
    x, logsnr = loss.inputs(trained, torch.zeros(8, 3), None, Drawn(SampleRNG(range(8)), place))
    for row in range(8):
        expected, level = sampled.asked[row // 2]
        torch.testing.assert_close(x[row], expected[row], rtol=1e-6, atol=1e-6)
        assert float(logsnr[row]) == levels[row // 2] == float(level[row])
    assert len(trained.asked) == 3 and len(sampled.asked) == 4


def test_in_training_too_the_noise_of_each_level_is_fresh():
    class Zero(Watching):
        def __call__(self, x, logsnr, cond=None):
            return 0.0 * super().__call__(x, logsnr)

    zero, rows = Zero(), 400
    rng = StepRNG(seed=0, step=0, positions=slice(None), total=rows)
    x, logsnr = training([-6.0, -2.0, 0.0]).inputs(zero, torch.zeros(rows, 9), None, rng)
    drawn = [noisy / VP(level)[1][:, None] for noisy, level in zero.asked]
    correlation = float((drawn[0] * drawn[1]).mean())
    assert abs(correlation) < 4 / math.sqrt(rows * 9)
    noise = x / VP(logsnr)[1][:, None]
    assert not bool((noise == drawn[0]).all(1)[logsnr > -6.0].any())
    counts = [int((logsnr == level).sum()) for level in (-6.0, -2.0, 0.0)]
    assert sum(counts) == rows and min(counts) > 100
