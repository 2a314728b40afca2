"""Replacement: what it puts where, the corrector's exact step, and the bias it is known for."""

import math

import pytest
import torch
from measured import KNOW_A, Pairs, assert_moments, cosine_levels, draw, mixture_images, normal, scalars
from problems import D64, INTERPOLANTS

from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.measurements import Inpaint, SuperResolution
from diffusion_lab.posterior import Replacement
from diffusion_lab.process.gaussian import eps_from_x0
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, DPMSolverPP2M, Heun
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.predictor_corrector import PredictorCorrector
from diffusion_lab.typing import MEASUREMENT, SEED

MASK = Inpaint(mask="random", fraction=0.5)
CORRECTED = PredictorCorrector(corrections=1, ancestral=True, snr=math.inf, longest=0.05)


def cond(batch=4, side=4):
    return {MEASUREMENT: MASK(normal(batch, 1, side, side, seed=1)), SEED: torch.arange(batch)}


class Spy:
    """Remembers what it was shown."""

    def __init__(self, denoiser):
        self.interpolant, self.denoiser, self.shown = denoiser.interpolant, denoiser, []

    def __call__(self, x, logsnr, cond=None):
        self.shown.append((x, logsnr))
        return self.denoiser(x, logsnr, cond)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_the_denoiser_is_shown_the_known_pixels_at_the_noise_of_the_moment(interpolant):
    n, level = 40_000, torch.full((1,), 1.3, dtype=D64)
    spy = Spy(scalars(interpolant, 1.0, n))
    y = torch.full((1, 1, 1, n), 0.7, dtype=D64) * MASK.known(torch.zeros(1, 1, 1, n, dtype=D64))
    x = normal(1, 1, 1, n)
    x0 = Replacement(spy, MASK)(x, level, {MEASUREMENT: y, SEED: torch.tensor([3])})
    ((shown, _),) = spy.shown
    known = MASK.known(x) > 0
    alpha, sigma = interpolant(level)
    assert_moments(shown[known], float(0.7 * alpha), float(sigma**2))
    assert torch.equal(shown[~known], x[~known])
    assert torch.equal(x0[known], y[known])
    assert torch.equal(x0[~known], spy.denoiser(shown, level)[~known])


def test_noise_belongs_to_the_seed_and_the_level():
    def shown(level, seeds, x):
        spy = Spy(mixture_images(INTERPOLANTS["vp"]))
        told = {**cond(2), SEED: torch.tensor(seeds)}
        Replacement(spy, MASK)(x, torch.tensor(level, dtype=D64), told)
        return spy.shown[0][0]

    x = normal(2, 1, 4, 4)
    known = (MASK.known(x) > 0)[0, 0]
    first = shown([0.5, 0.5], [8, 9], x)
    assert torch.equal(first, shown([0.5, 0.5], [8, 9], x))
    assert torch.equal(first[..., known], shown([0.5, 0.5], [8, 9], x + 1.0)[..., known])
    assert not torch.equal(first, shown([0.5, 0.5], [8, 10], x))
    other = shown([0.5, 0.6], [8, 9], x)
    assert torch.equal(first[0], other[0]) and bool((first[1] != other[1])[..., known].all())


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), Heun(), DPMSolverPP2M()])
def test_overwriting_what_the_denoiser_sees_is_overwriting_z(sampler, interpolant):
    # a sampler that treats entries alone never reads its own known pixels: put rubbish there after each step
    class Spoiled(type(sampler)):
        def step(self, denoiser, x, logsnr, logsnr_next, state, rng):
            x, state = super().step(denoiser, x, logsnr, logsnr_next, state, rng)
            rubbish = 1e3 * MASK.known(x) * math.sin(float(logsnr))
            return (x if math.isinf(logsnr_next) else x + rubbish), state

    grid = cosine_levels(12, ends=8.0)
    ends = []
    for kind in (type(sampler), Spoiled):
        rng = SampleRNG(range(4))
        x = interpolant(grid[0])[1] * rng.randn((1, 4, 4), dtype=D64)
        ends.append(kind()(Replacement(mixture_images(interpolant), MASK), x, grid, cond=cond(), rng=rng))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
    known = (MASK.known(ends[0]) > 0).expand_as(ends[0])
    assert torch.equal(ends[0][known], cond()[MEASUREMENT][known])


def test_one_call_and_what_is_below_it():
    counting = CountingDenoiser(mixture_images(INTERPOLANTS["vp"]), batch=4)
    x, level = normal(4, 1, 4, 4), torch.zeros(4, dtype=D64)
    Replacement(counting, MASK)(x, level, cond())
    assert counting.calls == 1
    told = {**cond(), "label": torch.zeros(4, dtype=torch.int64)}
    Replacement(counting, MASK, inner=lambda d: ClassifierFree(d, 2.0))(x, level, told)
    assert counting.calls == 3


def test_errors():
    denoiser = mixture_images(INTERPOLANTS["vp"])
    with pytest.raises(ValueError, match="mask such as Inpaint, not SuperResolution"):
        Replacement(denoiser, SuperResolution())
    x, level = normal(4, 1, 4, 4), torch.zeros(4, dtype=D64)
    wrapped = Replacement(denoiser, MASK)
    for told, words in (
        (None, "needs cond\\['measurement'\\]"),
        ({SEED: torch.arange(4)}, "needs cond\\['measurement'\\]"),
        ({**cond(), MEASUREMENT: torch.zeros(4, 1, 2, 2)}, "has shape \\(4, 1, 2, 2\\)"),
        ({MEASUREMENT: cond()[MEASUREMENT]}, "needs cond\\['seed'\\]"),
        ({**cond(), SEED: torch.arange(3)}, "one int64 for each of 4"),
    ):
        with pytest.raises(ValueError, match=words):
            wrapped(x, level, told)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_the_documented_corrector_is_video_diffusions(interpolant):
    # z <- z - (delta / 2) sigma eps + sqrt(delta) sigma n, delta = 0.1
    denoiser = mixture_images(interpolant)
    x, level = normal(3, 1, 4, 4), torch.tensor(0.4, dtype=D64)
    done = CORRECTED.correct(BoundDenoiser(denoiser, None), x, level, SampleRNG(range(3)))
    eps = eps_from_x0(interpolant, x, denoiser(x, level), level)
    _, sigma = interpolant(level)
    n = SampleRNG(range(3)).randn_like(x)
    expected = x - 0.05 * sigma * eps + math.sqrt(0.1) * sigma * n
    torch.testing.assert_close(done, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("sampler", "row"),
    [(DDPM(), (0.94, 0.305)), pytest.param(CORRECTED, (1.22, 0.234), marks=pytest.mark.slow)],
    ids=["plain", "langevin"],
)
def test_table_3e_replacement_is_not_calibrated(sampler, row):
    n = 20_000
    wrapped = Replacement(Pairs(INTERPOLANTS["vp"]), KNOW_A)
    y = torch.tensor([1.5, 0.0], dtype=D64)[:, None].expand(1, 1, 2, n)
    b = draw(wrapped, sampler, cosine_levels(512), y, (1, 2, n))[..., 1, :]
    assert_moments(b, *row, rounding=0.005, reference=20_000)
    # the known bias: short of the posterior's mean 1.35, and wider than its 0.19
    assert float(b.mean()) < 1.25 and float(b.var()) > 0.21
    # but not the prior, of mean 0 and variance 1
    assert float(b.mean()) > 0.9 and float(b.var()) < 0.35
