"""Autoguidance: identities to the bit, true costs, the closed form on two Gaussians, and a weak model elsewhere."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.guidance.autoguidance import AutoGuidance
from diffusion_lab.process import Cosine
from diffusion_lab.samplers import CountingDenoiser, Generation
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import conditional_of

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
LABEL = {"label": torch.tensor([0, 1, 1, 0])}
X = torch.linspace(-2, 2, 4, dtype=D64)[:, None]
LEVEL = torch.full((4,), 0.7, dtype=D64)
each = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


def wider(interpolant, dtype=D64):
    """The two classes of `mixture_1d`, each too wide: what a weak model has learned."""
    return GaussianMixtureDenoiser(
        means=torch.tensor([[-0.8], [0.6]], dtype=dtype),
        variances=torch.tensor([0.4, 0.6], dtype=dtype) ** 2,
        weights=torch.tensor([0.4, 0.6], dtype=dtype),
        labels=torch.tensor([0, 1]),
        interpolant=interpolant,
    )


def pair(interpolant):
    return tuple(CountingDenoiser(make(interpolant), batch=4) for make in (mixture_1d, wider))


@each
def test_off_is_the_denoiser_and_the_weak_one_is_not_called(interpolant):
    strong, weak = pair(interpolant)
    expected = strong.denoiser(X, LEVEL, LABEL)
    for scale, interval in ((1.0, (-math.inf, math.inf)), (3.0, (1.0, 2.0)), (0.0, (1.0, 2.0))):
        assert torch.equal(AutoGuidance(strong, weak, scale, interval)(X, LEVEL, LABEL), expected)
    assert (strong.calls, weak.calls) == (3, 0)


@each
def test_scale_zero_is_the_weak_one_alone(interpolant):
    strong, weak = pair(interpolant)
    x0 = AutoGuidance(strong, weak, 0.0)(X, LEVEL, LABEL)
    assert torch.equal(x0, weak.denoiser(X, LEVEL, LABEL)) and (strong.calls, weak.calls) == (0, 1)


@each
@pytest.mark.parametrize("cond", [LABEL, None], ids=["label", "none"])
def test_guided_is_the_lerp_under_the_same_condition(interpolant, cond):
    strong, weak = pair(interpolant)
    good, bad = strong.denoiser(X, LEVEL, cond), weak.denoiser(X, LEVEL, cond)
    guidance = AutoGuidance(strong, weak, 2.5)
    torch.testing.assert_close(guidance(X, LEVEL, cond), bad + 2.5 * (good - bad), rtol=0, atol=1e-14)
    assert (strong.calls, weak.calls) == (1, 1) and conditional_of(guidance) is strong
    assert torch.equal(AutoGuidance(strong, weak, 2.5, (0.7, 0.7))(X, LEVEL, cond), guidance(X, LEVEL, cond))


@each
def test_levels_that_differ_within_the_batch(interpolant):
    strong, weak = pair(interpolant)
    levels = torch.tensor([-3.0, 0.5, 1.0, 4.0], dtype=D64)
    mixed = AutoGuidance(strong, weak, 2.5, (0.0, 2.0))(X, levels, LABEL)
    plain, alone = AutoGuidance(strong, weak, 2.5)(X, levels, LABEL), strong(X, levels, LABEL)
    assert torch.equal(mixed, torch.stack([alone[0], plain[1], plain[2], alone[3]]))


@each
@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_two_gaussians_in_closed_form(interpolant, scale):
    # N(m, s) guided by N(m', s'): noised they have precisions 1 / v and 1 / v', and the guided eps is that of
    # precision P = scale / v - (scale - 1) / v' and mean alpha (scale m / v - (scale - 1) m' / v') / P
    m, s, m_weak, s_weak = 0.7, 0.3, 0.5, 0.9
    alpha, sigma = (c[:, None] for c in interpolant(LEVEL))
    v, v_weak = alpha**2 * s + sigma**2, alpha**2 * s_weak + sigma**2
    P = scale / v - (scale - 1) / v_weak
    mean = alpha * (scale * m / v - (scale - 1) * m_weak / v_weak) / P
    strong, weak = gaussian(interpolant, s, mean=m), gaussian(interpolant, s_weak, mean=m_weak)
    x0 = AutoGuidance(strong, weak, scale)(X, LEVEL)
    torch.testing.assert_close((X - alpha * x0) / sigma, sigma * P * (X - mean), rtol=0, atol=1e-12)
    if scale > 1:  # narrower than the model, where a wider one guides it
        assert bool((1 / P < v).all())


@each
@pytest.mark.parametrize("other", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_the_weak_one_may_live_in_another_interpolant(interpolant, other):
    levels = torch.tensor([-5.0, -0.3, 2.0, 8.0], dtype=D64)
    here = AutoGuidance(mixture_1d(interpolant), wider(interpolant), 2.5)(X, levels, LABEL)
    there = AutoGuidance(mixture_1d(interpolant), wider(other), 2.5)(X, levels, LABEL)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("other", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_pure_noise_is_finite_and_types_are_kept(other, dtype):
    level = torch.full((4,), -math.inf, dtype=dtype)
    for name in ("vp", "rf"):
        x0 = AutoGuidance(mixture_1d(INTERPOLANTS[name]), wider(other), 2.0)(X.to(dtype), level, LABEL)
        assert x0.dtype == dtype and bool(torch.isfinite(x0).all())
        # nothing of x is left, so the answers are the means of the classes, -1 and .8 guided by -.8 and .6
        expected = torch.tensor([[-1.2], [1.0], [1.0], [-1.2]], dtype=dtype)
        torch.testing.assert_close(x0, expected, rtol=0, atol=1e-6)


def test_a_config_that_nobody_loaded_is_an_error():
    for weak in ({"run": None, "ema": None}, lambda x, logsnr, cond=None: x):
        with pytest.raises(ValueError, match="weak denoiser"):
            AutoGuidance(mixture_1d(INTERPOLANTS["vp"]), weak, 2.0)
    with pytest.raises(ValueError, match="interval"):
        AutoGuidance(*pair(INTERPOLANTS["vp"]), 2.0, (1.0, 0.0))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
@each
def test_runs_with_samplers_and_splits_of_the_batch(interpolant, sampler):
    guidance = partial(AutoGuidance, weak=wider(INTERPOLANTS["rf"]), scale=2.0, interval=(-4.0, 6.0))
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=guidance, shape=(1,))
    label = torch.arange(8) % 2

    def make(part):
        return recipe(mixture_1d(interpolant), seeds=part, cond={"label": label[part.start : part.stop]})

    whole = make(range(8))
    assert torch.equal(whole, torch.cat([make(range(3)), make(range(3, 8))]))
    assert whole.dtype == torch.float32 and bool(torch.isfinite(whole).all())
