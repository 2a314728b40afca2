"""Classifier-free guidance: identities to the bit, true costs, and the closed form on Gaussian classes."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, mixture_1d

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.guidance import ClassifierFree, Unguided
from diffusion_lab.process import Cosine
from diffusion_lab.samplers import CountingDenoiser, Generation, Heun
from diffusion_lab.samplers.grids import karras, uniform_u
from diffusion_lab.typing import NO_LABEL

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
LABEL = {"label": torch.tensor([0, 1, 1, 0])}
X = torch.linspace(-2, 2, 4, dtype=D64)[:, None]
LEVEL = torch.full((4,), 0.7, dtype=D64)


@pytest.fixture(params=INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def counting(request):
    return CountingDenoiser(mixture_1d(request.param), batch=4)


def test_scale_one_is_conditional_with_one_call(counting):
    assert torch.equal(ClassifierFree(counting, 1.0)(X, LEVEL, LABEL), counting.denoiser(X, LEVEL, LABEL))
    assert counting.calls == 1


def test_scale_zero_is_unconditional_with_one_call(counting):
    assert torch.equal(ClassifierFree(counting, 0.0)(X, LEVEL, LABEL), counting.denoiser(X, LEVEL, None))
    assert counting.calls == 1


def test_guided_mean_is_the_lerp(counting):
    conditional, unconditional = (counting.denoiser(X, LEVEL, c) for c in (LABEL, None))
    guided = ClassifierFree(counting, 2.5)(X, LEVEL, LABEL)
    torch.testing.assert_close(
        guided, unconditional + 2.5 * (conditional - unconditional), rtol=0, atol=1e-14
    )
    assert counting.calls == 2


def test_one_call_answers_like_two():
    class Calls(CountingDenoiser):
        pass

    for text in ({}, {"text": torch.ones(4, 2)}):
        one, two = (Calls(mixture_1d(INTERPOLANTS["vp"])) for _ in range(2))
        cond = {**LABEL, **text}
        a = ClassifierFree(one, 2.5)(X, LEVEL, cond)
        b = ClassifierFree(two, 2.5, batched=False)(X, LEVEL, cond)
        assert torch.equal(a, b) and two.calls == 2
        # only a label has a value for "none" in one example of a batch
        assert one.calls == (2 if text else 1)


def test_infinite_interval_is_plain_guidance(counting):
    plain = ClassifierFree(counting, 2.5)(X, LEVEL, LABEL)
    assert torch.equal(ClassifierFree(counting, 2.5, (-math.inf, math.inf))(X, LEVEL, LABEL), plain)
    assert torch.equal(ClassifierFree(counting, 2.5, (0.7, 0.7))(X, LEVEL, LABEL), plain)


def test_outside_the_interval_the_unconditional_network_is_not_called(counting):
    outside = ClassifierFree(counting, 2.5, (1.0, 3.0))(X, LEVEL, LABEL)
    assert torch.equal(outside, counting.denoiser(X, LEVEL, LABEL)) and counting.calls == 1


def test_levels_that_differ_within_the_batch(counting):
    levels = torch.tensor([-3.0, 0.5, 1.0, 4.0], dtype=D64)
    mixed = ClassifierFree(counting, 2.5, (0.0, 2.0))(X, levels, LABEL)
    plain = ClassifierFree(counting, 2.5)(X, levels, LABEL)
    conditional = counting.denoiser(X, levels, LABEL)
    assert torch.equal(mixed, torch.stack([conditional[0], plain[1], plain[2], conditional[3]]))


def test_without_a_condition_there_is_nothing_to_guide(counting):
    assert torch.equal(ClassifierFree(counting, 3.0)(X, LEVEL, None), counting.denoiser(X, LEVEL, None))


def test_interval_must_be_ordered(counting):
    with pytest.raises(ValueError, match="interval"):
        ClassifierFree(counting, 2.0, (1.0, 0.0))


class TwoGaussians:
    """Conditional N(m, s^2), unconditional N(0, S)."""

    def __init__(self, interpolant, m, s2, S):
        self.interpolant = interpolant
        make = partial(GaussianDenoiser, interpolant=interpolant)
        self.conditional = make(mean=torch.tensor([m], dtype=D64), covariance=torch.tensor([s2], dtype=D64))
        self.unconditional = make(mean=torch.zeros(1, dtype=D64), covariance=torch.tensor([S], dtype=D64))

    def __call__(self, x, logsnr, cond=None):
        label = torch.full((len(x),), NO_LABEL) if cond is None else cond["label"]
        given = (label != NO_LABEL)[:, None]
        return torch.where(given, self.conditional(x, logsnr), self.unconditional(x, logsnr))


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("w", [0.0, 0.5, 2.0, -1.0])
def test_guided_gaussian_classes_in_closed_form(interpolant, w):
    # papers/distillation.md 8: guided eps is that of a Gaussian of precision P = (1 + w) / v_c - w / v_u and mean
    # (1 + w) alpha m / (v_c P)
    m, s2, S = 0.7, 0.3, 1.5
    alpha, sigma = interpolant(LEVEL)
    v_c, v_u = alpha**2 * s2 + sigma**2, alpha**2 * S + sigma**2
    P = (1 + w) / v_c - w / v_u
    mean = (1 + w) * alpha * m / (v_c * P)
    eps = sigma[:, None] * P[:, None] * (X - mean[:, None])
    x0 = ClassifierFree(TwoGaussians(interpolant, m, s2, S), 1 + w)(X, LEVEL, LABEL)
    torch.testing.assert_close((X - alpha[:, None] * x0) / sigma[:, None], eps, rtol=0, atol=1e-12)


GUIDANCE = {
    "none": Unguided,
    "cfg": partial(ClassifierFree, scale=2.0),
    "interval": partial(ClassifierFree, scale=3.0, interval=(-1.0, 4.0)),
    "nested": lambda d: ClassifierFree(ClassifierFree(d, 1.5), 1.0),
}


@pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE.keys())
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_every_guidance_runs_with_every_sampler(sampler, guidance, interpolant):
    recipe = Generation(sampler=sampler, grid=GRID, guidance=guidance, shape=(1,))
    samples = recipe(mixture_1d(interpolant), seeds=range(4), cond=LABEL)
    assert samples.shape == (4, 1) and bool(torch.isfinite(samples).all())


def test_interval_saves_calls_over_a_whole_trajectory():
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]), batch=4)
    inside = int(((GRID[:-1] >= -1.0) & (GRID[:-1] <= 4.0)).sum())
    for interval, calls in (((-math.inf, math.inf), 24), ((-1.0, 4.0), 12 + inside), ((50.0, 60.0), 12)):
        counting.calls = 0
        guidance = partial(ClassifierFree, scale=2.0, interval=interval)
        recipe = Generation(sampler=ALL_SAMPLERS["ddim"], grid=GRID, guidance=guidance, shape=(1,))
        recipe(counting, seeds=range(4), cond=LABEL)
        assert counting.calls == calls


def test_heun_pays_for_guidance_by_evaluation_not_by_step():
    """EDM2's published interval, (0.19, 1.61], holds the levels 17 to 22 of 32; Heun evaluates each twice."""
    grid = karras(0.002, 80.0, 7.0, 32)
    interval = (-2 * math.log(1.61), -2 * math.log(0.19))
    inside = [k for k, level in enumerate(grid[:-1].tolist()) if interval[0] <= level <= interval[1]]
    assert inside == [17, 18, 19, 20, 21, 22]
    assert torch.exp(-grid[[17, 22, 23]] / 2).tolist() == pytest.approx([1.609, 0.283, 0.1886], rel=1e-3)
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["ve"]), batch=4)
    guidance = partial(ClassifierFree, scale=2.0, interval=interval)
    Generation(sampler=Heun(), grid=grid, guidance=guidance, shape=(1,))(counting, seeds=range(4), cond=LABEL)
    # two evaluations a step but for the last, and one more wherever the level is inside
    assert counting.calls == 2 * 32 - 1 + 2 * len(inside)
