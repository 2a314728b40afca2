"""Feynman-Kac corrector: the product law that plain guidance misses, its normaliser, weights by hand, true costs."""

import math
from functools import partial
from itertools import pairwise

import laws
import numpy as np
import pytest
import torch
from problems import D64, INTERPOLANTS, STOCHASTIC, mixture_1d
from scipy import integrate, stats

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.posterior.feynman_kac import FeynmanKacCorrector, Product, ProductWeights
from diffusion_lab.posterior.resampling import Ahead
from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Generation, Stepper
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import NO_LABEL

VP = INTERPOLANTS["vp"]
M, S2, S = 0.7, 0.2, 1.0  # p(x | c) = N(.7, .2), p(x) = N(0, 1)
SCHEDULE = Cosine(logsnr_min=-14, logsnr_max=14)


class Classes:
    """Conditional N(M, s2), unconditional N(0, S)."""

    def __init__(self, interpolant=VP, s2=S2):
        self.interpolant = interpolant
        make = partial(GaussianDenoiser, interpolant=interpolant)
        self.given = make(mean=torch.tensor([M], dtype=D64), covariance=torch.tensor([s2], dtype=D64))
        self.without = make(mean=torch.zeros(1, dtype=D64), covariance=torch.tensor([S], dtype=D64))

    def __call__(self, x, logsnr, cond=None):
        label = torch.full((len(x),), NO_LABEL) if cond is None else cond["label"]
        return torch.where((label != NO_LABEL)[:, None], self.given(x, logsnr), self.without(x, logsnr))


def product(w):
    """Mean, variance and normaliser of p(x | c)^w p(x)^(1 - w)."""
    P = w / S2 + (1 - w) / S

    def density(x):
        return math.exp(w * stats.norm.logpdf(x, M, S2**0.5) + (1 - w) * stats.norm.logpdf(x, 0, S**0.5))

    return w * M / S2 / P, 1 / P, integrate.quad(density, -8, 8, points=[w * M / S2 / P], limit=200)[0]


def plain(w):
    """Mean and variance that the reverse SDE under classifier-free guidance ends with, by an ODE for both."""

    def slope(t, y):
        v = math.exp(-t)
        P = w / (S2 + v) + (1 - w) / (S + v)
        return v * np.array([w * M / (S2 + v) - P * y[0], 1 - 2 * P * y[1]])

    found = integrate.solve_ivp(
        slope, (-14, 40), [0.0, 1 + math.exp(14)], method="Radau", rtol=1e-10, atol=1e-12
    )
    return found.y[:, -1]


def labels(n):
    return {"label": torch.zeros(n, dtype=torch.long)}


def weighted(w, steps, n, interpolant=VP):
    """`n` particles of one stepper run by hand, never resampled, and their log-weights."""
    tilted = Product(Classes(interpolant), w, True)
    ahead, weigher = Ahead(tilted, labels(n)), ProductWeights(tilted, math.inf)
    levels = uniform_u(SCHEDULE, steps).unbind(0)

    class Noise:
        generator = torch.Generator().manual_seed(0)

        def randn_like(self, x):
            return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    rng, total = Noise(), torch.zeros(n, dtype=D64)
    x = interpolant(levels[0])[1] * rng.randn_like(torch.empty(n, 1, dtype=D64))
    weigher.start(ahead, x, levels[0])
    for a, b in pairwise(levels):
        x, _ = DDPM(interpolation=0.5).step(ahead, x, a, b, None, rng)
        total = total + weigher.weigh(ahead, x, a, b, True)
    return x[:, 0], total


@pytest.mark.parametrize(
    ("w", "interpolant"),
    [
        pytest.param(2.0, "vp", marks=pytest.mark.slow),
        pytest.param(0.5, "vp", marks=pytest.mark.slow),
        (2.0, "ve"),
        pytest.param(0.5, "rf", marks=pytest.mark.slow),
    ],
)
def test_weighted_paths_have_the_products_normaliser_mean_and_variance(w, interpolant):
    x, log_w = weighted(w, 800, 20_000, INTERPOLANTS[interpolant])
    mean, variance, Z = product(w)
    W = log_w.exp()
    # the mean of the weights is the normaliser, of which each density has one
    assert abs(float(W.mean()) / Z - 1) < 4 * float(W.std()) / Z / math.sqrt(len(W)) + 0.01
    W = W / W.sum()
    size = 1 / float(W.square().sum())
    got = float((W * x).sum())
    spread = float((W * (x - got) ** 2).sum())
    assert size > 1000
    assert abs(got - mean) < 4 * math.sqrt(variance / size) + 0.002
    assert abs(spread / variance - 1) < 4 * math.sqrt(2 / size) + 0.01
    # and without weights they are those of classifier-free guidance, which is another law
    exact = plain(w)
    assert abs(float(x.mean()) - exact[0]) < 4 * math.sqrt(exact[1] / len(x)) + 0.002
    assert abs(float(x.var()) / exact[1] - 1) < 4 * math.sqrt(2 / len(x)) + 0.02
    assert abs(exact[0] - mean) > 0.05 and abs(exact[1] / variance - 1) > 0.15


def run(w, steps, K, n, sampler=DDPM(interpolation=0.5), **options):  # noqa: B008
    rng = SampleRNG(range(n))
    x = rng.randn((1,), dtype=D64)
    guidance = FeynmanKacCorrector(scale=w, particles=K, **options)
    return guidance.around(sampler)(Classes(), x, uniform_u(SCHEDULE, steps), cond=labels(n), rng=rng)


def distances(got, target):
    """How far mean and variance are from those of a law, in standard errors."""
    mean, variance = target[:2]
    n = len(got)
    return (
        (float(got.mean()) - mean) / math.sqrt(variance / n),
        (float(got.var()) / variance - 1) / math.sqrt(2 / n),
    )


def test_corrected_samples_follow_the_product_and_plain_ones_do_not():
    corrected, uncorrected = run(0.5, 100, 8, 3000), run(0.5, 100, 1, 3000)
    assert max(map(abs, distances(corrected, product(0.5)))) < 4
    assert max(map(abs, distances(uncorrected, plain(0.5)))) < 4
    assert min(map(abs, distances(corrected, plain(0.5)))) > 5
    assert min(map(abs, distances(uncorrected, product(0.5)))) > 5


@pytest.mark.slow
def test_the_bias_falls_with_the_number_of_particles_at_scales_above_one():
    mean, _, _ = product(2.0)
    ends = [run(2.0, 200, K, n) for K, n in ((1, 8000), (4, 4000), (64, 2000))]
    errors = [float(end.mean()) - mean for end in ends]
    assert 0.055 < errors[0] < 0.075 and 0.03 < errors[1] < 0.06
    assert max(map(abs, distances(ends[2], product(2.0)))) < 4
    assert min(map(abs, distances(ends[2], plain(2.0)))) > 5


def test_classes_of_one_variance_all_weigh_the_same_and_exactly():
    # d = M / (1 + S snr): |d|^2 integrates to M^2 / S, and log Z is w (w - 1) / 2 of it
    for steps in (3, 20):
        tilted = Product(Classes(s2=S), 3.0, True)
        ahead, weigher = Ahead(tilted, labels(5)), ProductWeights(tilted, math.inf)
        levels = uniform_u(SCHEDULE, steps).unbind(0)
        x = torch.linspace(-1, 1, 5, dtype=D64)[:, None]
        weigher.start(ahead, x, levels[0])
        parts = [weigher.weigh(ahead, x + k, a, b, True) for k, (a, b) in enumerate(pairwise(levels))]
        snr = float(levels[-2].exp())
        short = M**2 * float(levels[0].exp())  # the part of the integral before the first level
        last = M**2 * snr / (1 + S * snr) ** 2 - M**2 / S / (
            1 + S * snr
        )  # the last step's rule for b snr >> 1
        expected = 3.0 * (M**2 / S - short + last)
        total = torch.stack(parts).sum(0)
        torch.testing.assert_close(total, torch.full((5,), expected, dtype=D64), rtol=1e-8, atol=1e-6)


def test_until_leaves_the_last_steps_out():
    tilted = Product(Classes(), 2.0, True)
    ahead = Ahead(tilted, labels(2))
    weigher = ProductWeights(tilted, 1.0)
    x, levels = torch.ones(2, 1, dtype=D64), torch.tensor([-1.0, 1.0, 2.0, math.inf], dtype=D64).unbind(0)
    weigher.start(ahead, x, levels[0])
    assert weigher.weigh(ahead, x, *levels[:2], True) is not None
    assert weigher.weigh(ahead, x, *levels[1:3], True) is None
    assert weigher.weigh(ahead, x, *levels[2:4], True) is None
    assert run(2.0, 20, 4, 3, until=1.0).isfinite().all()


def test_particles_keep_their_own_distance_when_they_are_resampled():
    tilted = Product(Classes(), 2.0, True)
    ahead, weigher = Ahead(tilted, labels(3)), ProductWeights(tilted, math.inf)
    x = torch.tensor([[-1.0], [0.3], [1.5]], dtype=D64)
    a, b = torch.tensor([0.0, 1.0], dtype=D64).unbind(0)
    weigher.start(ahead, x, a)
    before = weigher.before.clone()
    weigher.take(torch.tensor([2, 2, 0]))
    got = weigher.weigh(ahead, x, a, b, True)
    expected = before[[2, 2, 0]] * tilted.distance * (math.e - 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_there_is_nothing_to_correct(scale):
    counting = CountingDenoiser(mixture_1d(VP), batch=3)
    grid = uniform_u(SCHEDULE, 10)
    recipe = Generation(
        sampler=DDPM(), grid=grid, guidance=FeynmanKacCorrector(scale=scale, particles=4), shape=(1,)
    )
    recipe(counting, seeds=range(3), cond={"label": torch.tensor([0, 1, 1])})
    assert counting.calls == 40


@pytest.mark.parametrize(("K", "calls"), [(1, 20), (4, 80)])
@pytest.mark.parametrize("batched", [True, False])
def test_calls_are_those_of_guidance_times_the_particles(K, calls, batched):
    counting = CountingDenoiser(mixture_1d(VP), batch=3)
    guidance = FeynmanKacCorrector(scale=2.0, particles=K, batched=batched, every=2)
    recipe = Generation(sampler=DDPM(), grid=uniform_u(SCHEDULE, 10), guidance=guidance, shape=(1,))
    recipe(counting, seeds=range(3), cond={"label": torch.tensor([0, 1, 1])})
    assert counting.calls == calls


def test_one_particle_is_plain_guidance():
    cond = {"label": torch.tensor([0, 1, 1, 0])}
    grid = uniform_u(SCHEDULE, 10)
    ends = [
        Generation(sampler=DDPM(), grid=grid, guidance=guidance, shape=(1,))(
            mixture_1d(VP), seeds=range(4), cond=cond
        )
        for guidance in (FeynmanKacCorrector(scale=2.0, particles=1), partial(ClassifierFree, scale=2.0))
    ]
    assert torch.equal(*ends)


STEPPERS = {name: sampler for name, sampler in STOCHASTIC.items() if isinstance(sampler, Stepper)}


@pytest.mark.parametrize("sampler", STEPPERS.values(), ids=STEPPERS.keys())
def test_laws(sampler):
    steered = FeynmanKacCorrector(scale=1.5, particles=4, ess_threshold=1.0).around(sampler)
    for law in laws.LAWS:
        law(steered)


def test_a_batch_of_eight_is_three_and_five_with_a_condition():
    # laws run without one
    label = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    guidance = FeynmanKacCorrector(scale=1.5, particles=4, ess_threshold=0.9)
    recipe = Generation(sampler=DDPM(), grid=uniform_u(SCHEDULE, 20), guidance=guidance, shape=(1,))
    whole = recipe(mixture_1d(VP), seeds=range(8), cond={"label": label})
    parts = [
        recipe(mixture_1d(VP), seeds=range(a, b), cond={"label": label[a:b]}) for a, b in ((0, 3), (3, 8))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_mistakes_are_one_clear_line():
    with pytest.raises(ValueError, match="FeynmanKacCorrector needs a sampler made of steps that draw noise"):
        FeynmanKacCorrector(scale=2.0).around(DDIM())
    with pytest.raises(ValueError, match="FeynmanKacCorrector needs particles"):
        FeynmanKacCorrector(scale=2.0, particles=0).around(DDPM())
