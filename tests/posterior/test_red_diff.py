"""RED-diff: a mode near the posterior's mean with too little spread, its gradient, its start, and its costs."""

import math

import pytest
import torch
from problems import D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.measurements import Inpaint, Linear, SuperResolution
from diffusion_lab.posterior.red_diff import REDDiff
from diffusion_lab.process import Cosine
from diffusion_lab.process.gaussian import eps_from_x0
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser, Generation
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import MEASUREMENT

VP = INTERPOLANTS["vp"]
SCHEDULE = Cosine(logsnr_min=-12, logsnr_max=12)
FIRST = Linear(torch.tensor([[1.0, 0.0]], dtype=D64))
MEAN, COVARIANCE = torch.tensor([0.3, -0.2], dtype=D64), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=D64)
PAIR = GaussianDenoiser(mean=MEAN, covariance=COVARIANCE, interpolant=VP)


def optimise(guidance, denoiser, y, steps=50, dim=2, seeds=None, dtype=D64, on_step=None):
    seeds = range(len(y)) if seeds is None else seeds
    x = torch.full((len(y), dim), 9.0, dtype=dtype)
    grid = uniform_u(SCHEDULE, steps)
    return guidance.around(DDIM())(
        denoiser, x, grid, cond={MEASUREMENT: y}, rng=SampleRNG(seeds), on_step=on_step
    )


@pytest.mark.parametrize("y", [1.0, -0.5])
def test_on_gaussian_data_it_ends_about_the_posterior_mean_with_far_too_little_spread(y):
    # x = (x1, x2), y = x1 + 0.05 n: the posterior's mean is MEAN + C1 (y - MEAN1) / (1 + .0025), x2's variance .3616
    noise = 0.05
    n, gain = 200, COVARIANCE[0] / (1 + noise**2)
    mean = MEAN + gain * (y - float(MEAN[0]))
    variance = 1 - 0.8 * float(gain[1])
    got = optimise(REDDiff(operator=FIRST, lr=0.03), PAIR, torch.full((n, 1), y, dtype=D64), steps=1000)
    # what is measured is y itself
    assert abs(float(got[:, 0].mean()) - y) < 0.003
    # what is not is nearly right: some 8% short of the way from the prior's mean
    way = (float(got[:, 1].mean()) - float(MEAN[1])) / (float(mean[1]) - float(MEAN[1]))
    assert 0.85 < way < 0.97
    # a sampler would have 1 here
    assert 0.02 < float(got[:, 1].var()) / variance < 0.12 and float(got[:, 0].var()) < 0.1 * noise**2


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_where_y_is_noisy_it_is_trusted_too_much(weight):
    # x ~ N(0, 1), y = x + n = 1: the posterior is N(1/2, 1/2)
    y = torch.ones(200, 1, dtype=D64)
    identity = Linear(torch.ones(1, 1, dtype=D64))
    guidance = REDDiff(operator=identity, weight=weight, lr=0.03)
    got = optimise(guidance, gaussian(VP, 1.0), y, 1000, dim=1)
    assert 0.95 < float(got.mean()) < 1.05 and float(got.var()) < 0.01


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_steps_are_adams_on_the_papers_gradient(name):
    interpolant = INTERPOLANTS[name]
    denoiser, weight = mixture_1d(interpolant), 0.7
    y, identity = torch.linspace(-1, 1, 8, dtype=D64)[:, None], Linear(torch.ones(1, 1, dtype=D64))
    seen = []

    class Spy:
        def __init__(self):
            self.interpolant = interpolant

        def __call__(self, x, logsnr, cond=None):
            seen.append((x, logsnr))
            return denoiser(x, logsnr)

    ends = []
    guidance = REDDiff(operator=identity, weight=weight, lr=0.2)
    optimise(guidance, Spy(), y, steps=2, dim=1, on_step=lambda k, logsnr, x, x0: ends.append(x))
    mu, decay, mean, square, drawn = y, (0.9, 0.99), 0, 0, SampleRNG(range(8))
    for k, (x, logsnr) in enumerate(seen):
        alpha, sigma = (c[:, None] for c in interpolant(logsnr))
        eps = (x - alpha * mu) / sigma
        # each sample's own noise
        torch.testing.assert_close(eps, drawn.randn((1,), dtype=D64), rtol=0, atol=1e-6)
        lam = weight * sigma / alpha
        g = (mu - y) + lam * (eps_from_x0(interpolant, x, denoiser(x, logsnr), logsnr) - eps)
        mean, square = (
            d * old + (1 - d) * new for d, old, new in zip(decay, (mean, square), (g, g**2), strict=True)
        )
        a, b = (old / (1 - d ** (k + 1)) for d, old in zip(decay, (mean, square), strict=True))
        mu = mu - 0.2 * a / (b.sqrt() + 1e-8)
        torch.testing.assert_close(ends[k], mu, rtol=0, atol=1e-6)


def test_it_starts_at_the_measurement():
    x0 = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D64)
    for operator in (Inpaint(mask="half", side="right"), SuperResolution(factor=2)):
        y = operator(x0)
        start = REDDiff(operator=operator).around(DDIM())._start(torch.zeros_like(x0), y)
        torch.testing.assert_close(operator(start), y, rtol=0, atol=1e-12)
    assert torch.equal(
        REDDiff(operator=FIRST).around(None)._start(torch.zeros(1, 2), torch.zeros(1, 1)), torch.zeros(1, 2)
    )


def test_a_measurement_that_is_not_linear_is_differentiated():
    class Square:
        linear = False

        def __call__(self, x0):
            return x0[:, :1] ** 2

    got = optimise(REDDiff(operator=Square(), lr=0.05), PAIR, torch.full((6, 1), 0.64, dtype=D64), 400)
    torch.testing.assert_close(got[:, 0].abs(), torch.full((6,), 0.8, dtype=D64), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_a_batch_of_eight_is_three_and_five(dtype):
    y = torch.linspace(-1, 1, 8, dtype=dtype)[:, None]
    identity = Linear(torch.ones(1, 1, dtype=D64))
    whole = optimise(REDDiff(operator=identity), mixture_1d(VP), y, dim=1, dtype=dtype)
    parts = [
        optimise(REDDiff(operator=identity), mixture_1d(VP), y[a:b], dim=1, seeds=range(a, b), dtype=dtype)
        for a, b in ((0, 3), (3, 8))
    ]
    assert torch.equal(whole, torch.cat(parts)) and whole.dtype == dtype


def test_interpolants_agree():
    y, identity = torch.linspace(-1, 1, 4, dtype=D64)[:, None], Linear(torch.ones(1, 1, dtype=D64))
    ends = [optimise(REDDiff(operator=identity), mixture_1d(i), y, dim=1) for i in INTERPOLANTS.values()]
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-9)


def test_one_call_a_step_under_any_sampler_and_from_pure_noise():
    counting = CountingDenoiser(mixture_1d(VP), batch=3)
    cond = {MEASUREMENT: torch.zeros(3, 1), "label": torch.tensor([0, 1, 1])}
    identity = Linear(torch.ones(1, 1, dtype=D64))
    for grid in (uniform_u(SCHEDULE, 10), uniform_u(Cosine(logsnr_min=-math.inf, logsnr_max=math.inf), 10)):
        counting.calls = 0
        recipe = Generation(sampler=DDIM(), grid=grid, guidance=REDDiff(operator=identity), shape=(1,))
        with torch.inference_mode():
            end = recipe(counting, seeds=range(3), cond={k: v.clone() for k, v in cond.items()})
        assert counting.calls == 10 and bool(torch.isfinite(end).all()) and not end.requires_grad
    guided = REDDiff(operator=identity, inner=lambda d: ClassifierFree(d, 2.0))
    counting.calls = 0
    Generation(sampler=DDIM(), grid=uniform_u(SCHEDULE, 10), guidance=guided, shape=(1,))(
        counting, seeds=range(3), cond=cond
    )
    assert counting.calls == 20


def test_mistakes_are_one_clear_line():
    with pytest.raises(ValueError, match="measurement=inpaint"):
        REDDiff(operator=None).around(DDIM())
    for options in (dict(weight=-1.0), dict(lr=0.0)):
        with pytest.raises(ValueError, match="REDDiff needs weight"):
            REDDiff(operator=FIRST, **options)
    with pytest.raises(ValueError, match="measurement"):
        REDDiff(operator=FIRST).around(DDIM())(
            PAIR, torch.zeros(1, 2), uniform_u(SCHEDULE, 3), rng=SampleRNG([0])
        )
    with pytest.raises(ValueError, match="shape"):
        optimise(REDDiff(operator=FIRST), PAIR, torch.zeros(2, 3, dtype=D64))
    with pytest.raises(ValueError, match="rng=SampleRNG"):
        REDDiff(operator=FIRST).around(DDIM())(PAIR, torch.zeros(1, 2), uniform_u(SCHEDULE, 3))
