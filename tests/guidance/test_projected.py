"""Projected guidance: classifier-free at eta 1, right angles at eta 0, bounded steps, and a momentum worked by hand."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.projected import Projected
from diffusion_lab.process import Cosine
from diffusion_lab.samplers import CountingDenoiser, Generation
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import conditional_of

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
LABEL = {"label": torch.tensor([0, 1, 1, 0])}
X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=D64)
LEVEL = torch.full((4,), 0.7, dtype=D64)
each = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


def images(interpolant):
    """Two classes of `(3, 2)` images that are no multiples of each other."""
    generator = torch.Generator().manual_seed(1)
    return GaussianMixtureDenoiser(
        means=torch.randn(2, 3, 2, generator=generator, dtype=D64) + 0.5,
        variances=torch.tensor([0.2, 0.35], dtype=D64) ** 2,
        weights=torch.tensor([0.3, 0.7], dtype=D64),
        labels=torch.tensor([0, 1]),
        interpolant=interpolant,
    )


def branches(denoiser, levels=LEVEL, x=X):
    given = denoiser(x, levels, LABEL)
    return given, given - denoiser(x, levels, None)


def dot(a, b):
    return (a * b).sum((1, 2))


@each
def test_off_is_conditional_or_classifier_free_to_the_bit(interpolant):
    counting = CountingDenoiser(images(interpolant), batch=4)
    conditional, without = counting.denoiser(X, LEVEL, LABEL), counting.denoiser(X, LEVEL, None)
    full = {"eta": 0.0, "norm_threshold": 0.5, "momentum": -0.5}
    assert torch.equal(Projected(counting, 1.0, **full)(X, LEVEL, LABEL), conditional)
    assert torch.equal(Projected(counting, 3.0, **full, interval=(1.0, 2.0))(X, LEVEL, LABEL), conditional)
    assert torch.equal(Projected(counting, 3.0, **full)(X, LEVEL, None), without)
    assert counting.calls == 3
    for scale in (0.0, 2.5):
        plain = ClassifierFree(counting.denoiser, scale)(X, LEVEL, LABEL)
        assert torch.equal(Projected(counting, scale, eta=1.0)(X, LEVEL, LABEL), plain)
    assert counting.calls == 3 + 1 + 2


@each
@pytest.mark.parametrize("batched", [True, False])
def test_eta_one_is_classifier_free_through_the_projection_too(interpolant, batched):
    counting = CountingDenoiser(images(interpolant), batch=4)
    plain = ClassifierFree(counting.denoiser, 7.5)(X, LEVEL, LABEL)
    # a threshold that nothing reaches
    guided = Projected(counting, 7.5, eta=1.0, norm_threshold=1e9, batched=batched)
    torch.testing.assert_close(guided(X, LEVEL, LABEL), plain, rtol=0, atol=1e-12)
    assert counting.calls == 2 and conditional_of(guided) is counting


@each
def test_the_difference_is_split_along_and_across_the_conditional_answer(interpolant):
    denoiser, scale = images(interpolant), 5.0
    given, d = branches(denoiser)
    added = (Projected(denoiser, scale, eta=0.0)(X, LEVEL, LABEL) - given) / (scale - 1)
    assert float(dot(added, given).abs().max()) < 1e-12
    # what was taken away is a multiple of the conditional answer, sample by sample
    taken = d - added
    along = (dot(d, given) / dot(given, given))[:, None, None]
    torch.testing.assert_close(taken, along * given, rtol=0, atol=1e-12)
    assert float(dot(taken, given).abs().max()) > 1.0 and float(dot(added, added).max()) > 0.1
    for eta in (0.3, 2.0):
        x0 = Projected(denoiser, scale, eta=eta)(X, LEVEL, LABEL)
        torch.testing.assert_close(x0, given + (scale - 1) * (added + eta * taken), rtol=0, atol=1e-12)


@each
def test_the_norm_of_each_sample_is_bounded(interpolant):
    denoiser, scale = images(interpolant), 5.0
    given, d = branches(denoiser)
    norms = dot(d, d).sqrt()
    r = float(norms.sort().values[1:3].mean())  # two samples are over it, two are under
    added = (Projected(denoiser, scale, eta=1.0, norm_threshold=r)(X, LEVEL, LABEL) - given) / (scale - 1)
    torch.testing.assert_close(dot(added, added).sqrt(), norms.clamp_max(r), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        added / norms.clamp_max(r)[:, None, None], d / norms[:, None, None], rtol=0, atol=1e-12
    )
    # no difference at all: nothing to divide by
    unlabelled = {"label": torch.full((4,), -1)}
    x0 = Projected(denoiser, scale, eta=0.0, norm_threshold=r)(X, LEVEL, unlabelled)
    assert torch.equal(x0, denoiser(X, LEVEL, None))


@each
def test_momentum_over_three_levels_by_hand(interpolant):
    denoiser, scale, beta, r = images(interpolant), 3.0, -0.5, 0.4
    guided = Projected(denoiser, scale, eta=1.0, norm_threshold=r, momentum=beta)
    average = torch.zeros_like(X)
    for logsnr in (-1.0, 0.0, 2.0):
        levels = torch.full((4,), logsnr, dtype=D64)
        given, d = branches(denoiser, levels)
        # the average is not clipped, what is added is
        average = d + beta * average
        clipped = average * (r / dot(average, average).sqrt()).clamp_max(1.0)[:, None, None]
        x0 = guided(X, levels, LABEL)
        torch.testing.assert_close(x0, given + (scale - 1) * clipped, rtol=0, atol=1e-12)


def test_momentum_is_forgotten_where_the_level_does_not_rise():
    denoiser = images(INTERPOLANTS["vp"])

    def make():
        return Projected(denoiser, 3.0, eta=1.0, momentum=-0.5)

    def at(logsnr):
        return torch.full((4,), logsnr, dtype=D64)

    first, later = make()(X, at(0.0), LABEL), make()(X, at(1.0), LABEL)
    guided = make()
    assert torch.equal(guided(X, at(0.0), LABEL), first)
    assert not torch.equal(guided(X, at(1.0), LABEL), later)  # remembers
    assert torch.equal(guided(X, at(1.0), LABEL), later)  # the same level again: anew
    assert torch.equal(guided(X, at(0.0), LABEL), first)  # a lower one: anew
    # another batch: anew
    assert torch.equal(guided(X[:2], at(1.0)[:2], {"label": LABEL["label"][:2]}), later[:2])
    # no momentum, no memory
    plain = Projected(denoiser, 3.0, eta=0.0)
    assert torch.equal(plain(X, at(0.0), LABEL), Projected(denoiser, 3.0)(X, at(0.0), LABEL))
    assert torch.equal(plain(X, at(1.0), LABEL), Projected(denoiser, 3.0)(X, at(1.0), LABEL))


def test_outside_the_interval_nothing_is_remembered():
    denoiser = CountingDenoiser(images(INTERPOLANTS["vp"]), batch=4)
    inside = Projected(denoiser, 3.0, eta=1.0, momentum=-0.5, interval=(0.0, 4.0))
    expected = Projected(denoiser, 3.0, eta=1.0, momentum=-0.5)
    for logsnr in (-2.0, -1.0):
        inside(X, torch.full((4,), logsnr, dtype=D64), LABEL)
    assert denoiser.calls == 2
    for logsnr in (0.5, 1.0):
        levels = torch.full((4,), logsnr, dtype=D64)
        assert torch.equal(inside(X, levels, LABEL), expected(X, levels, LABEL))


@each
def test_levels_that_differ_within_the_batch(interpolant):
    levels = torch.tensor([-3.0, 0.5, 1.0, 4.0], dtype=D64)
    denoiser, settings = images(interpolant), {"eta": 0.0, "norm_threshold": 0.5}
    mixed = Projected(denoiser, 2.5, **settings, interval=(0.0, 2.0))(X, levels, LABEL)
    plain, alone = Projected(denoiser, 2.5, **settings)(X, levels, LABEL), denoiser(X, levels, LABEL)
    assert torch.equal(mixed, torch.stack([alone[0], plain[1], plain[2], alone[3]]))
    with pytest.raises(ValueError, match="different noise levels"):
        Projected(denoiser, 2.5, momentum=-0.5)(X, levels, LABEL)


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_pure_noise_is_finite_and_types_are_kept(name, dtype):
    guided = Projected(images(INTERPOLANTS[name]), 5.0, eta=0.0, norm_threshold=1.0, momentum=-0.5)
    for logsnr in (-math.inf, 0.0, 60.0):
        x0 = guided(X.to(dtype), torch.full((4,), logsnr, dtype=dtype), LABEL)
        assert x0.dtype == dtype and bool(torch.isfinite(x0).all())


def test_a_conditional_answer_of_zero_has_no_direction():
    class Zero:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            return torch.zeros_like(x) if cond else torch.ones_like(x)

    x0 = Projected(Zero(), 3.0, eta=0.0, batched=False)(X.float(), LEVEL.float(), LABEL)
    assert torch.equal(x0, torch.full_like(X, -2.0).float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_threshold": 0.0}, "norm_threshold"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -1.0}, "momentum"),
        ({"interval": (1.0, 0.0)}, "interval"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Projected(images(INTERPOLANTS["vp"]), 2.0, **settings)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
@each
def test_runs_with_samplers_and_splits_of_the_batch(interpolant, sampler):
    guidance = partial(Projected, scale=4.0, eta=0.0, norm_threshold=1.0, momentum=-0.5, interval=(-4.0, 6.0))
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=guidance, shape=(3, 2))
    label = torch.arange(8) % 2

    def make(part):
        return recipe(images(interpolant), seeds=part, cond={"label": label[part.start : part.stop]})

    whole = make(range(8))
    assert torch.equal(whole, torch.cat([make(range(3)), make(range(3, 8))]))
    assert whole.dtype == torch.float32 and bool(torch.isfinite(whole).all())
