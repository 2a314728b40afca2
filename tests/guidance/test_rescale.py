"""Rescaled guidance: each sample's contrast is the conditional's, off is classifier-free guidance to the bit."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.rescale import Rescale
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


def spread(x0):
    return (x0 - x0.mean((1, 2), keepdim=True)).square().mean((1, 2)).sqrt()


@each
def test_off_is_conditional_or_classifier_free_to_the_bit(interpolant):
    counting = CountingDenoiser(images(interpolant), batch=4)
    conditional = counting.denoiser(X, LEVEL, LABEL)
    assert torch.equal(Rescale(counting, 1.0, 0.7)(X, LEVEL, LABEL), conditional) and counting.calls == 1
    assert torch.equal(Rescale(counting, 3.0, 0.7, (1.0, 2.0))(X, LEVEL, LABEL), conditional)
    assert counting.calls == 2
    for scale in (0.0, 2.5):
        for interval in ((-math.inf, math.inf), (0.0, 1.0)):
            plain = ClassifierFree(counting.denoiser, scale, interval)(X, LEVEL, LABEL)
            assert torch.equal(Rescale(counting, scale, 0.0, interval)(X, LEVEL, LABEL), plain)
    assert counting.calls == 2 + 2 * (1 + 2)
    without = counting.denoiser(X, LEVEL, None)
    assert torch.equal(Rescale(counting, 3.0, 0.7)(X, LEVEL, None), without)


@each
@pytest.mark.parametrize("batched", [True, False])
def test_contrast_is_the_conditionals_and_mixed(interpolant, batched):
    counting = CountingDenoiser(images(interpolant), batch=4)
    given, cfg = counting.denoiser(X, LEVEL, LABEL), ClassifierFree(counting.denoiser, 4.0)(X, LEVEL, LABEL)
    whole = Rescale(counting, 4.0, 1.0, batched=batched)(X, LEVEL, LABEL)
    assert counting.calls == 2 and conditional_of(Rescale(counting, 4.0)) is counting
    torch.testing.assert_close(spread(whole), spread(given), rtol=0, atol=1e-12)
    # the whole image is scaled, its mean too
    ratio = (spread(given) / spread(cfg))[:, None, None]
    assert bool((ratio < 0.95).any())
    torch.testing.assert_close(whole, ratio * cfg, rtol=0, atol=1e-12)
    for factor in (0.3, 0.7):
        mixed = Rescale(counting, 4.0, factor, batched=batched)(X, LEVEL, LABEL)
        torch.testing.assert_close(mixed, factor * whole + (1 - factor) * cfg, rtol=0, atol=1e-12)


def test_at_the_noise_end_it_is_the_papers_rescaling_of_v():
    # v = (alpha x - x0) / sigma; where alpha is small v = -x0, and the two rescalings meet; later they do not
    vp = INTERPOLANTS["vp"]
    for logsnr, agrees in ((-40.0, True), (0.7, False)):
        level = torch.full((4,), logsnr, dtype=D64)
        alpha, sigma = vp(level[0])
        given, cfg = images(vp)(X, level, LABEL), ClassifierFree(images(vp), 4.0)(X, level, LABEL)
        v_given, v_cfg = ((alpha * X - x0) / sigma for x0 in (given, cfg))
        r = (spread(v_given) / spread(v_cfg))[:, None, None]
        paper = alpha * X - sigma * (0.7 * r * v_cfg + 0.3 * v_cfg)
        r_x0 = 0.7 * (r - 1)  # the module's docstring: rescaling v in terms of x0
        torch.testing.assert_close(paper, cfg + r_x0 * (cfg - alpha * X), rtol=0, atol=1e-12)
        gap = float((Rescale(images(vp), 4.0, 0.7)(X, level, LABEL) - paper).abs().max())
        assert gap < 1e-7 if agrees else gap > 1e-2


@each
def test_levels_that_differ_within_the_batch(interpolant):
    levels = torch.tensor([-3.0, 0.5, 1.0, 4.0], dtype=D64)
    denoiser = images(interpolant)
    mixed = Rescale(denoiser, 2.5, 0.7, (0.0, 2.0))(X, levels, LABEL)
    plain, alone = Rescale(denoiser, 2.5)(X, levels, LABEL), denoiser(X, levels, LABEL)
    assert torch.equal(mixed, torch.stack([alone[0], plain[1], plain[2], alone[3]]))


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_pure_noise_is_finite_and_types_are_kept(name, dtype):
    level = torch.full((4,), -math.inf, dtype=dtype)
    x0 = Rescale(images(INTERPOLANTS[name]), 5.0)(X.to(dtype), level, LABEL)
    assert x0.dtype == dtype and bool(torch.isfinite(x0).all())


@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_samples_without_contrast_are_not_rescaled(dtype):
    class Flat:
        """Answers of one value or of zero, the conditional one but for rounding."""

        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            value = x.new_tensor([0.9, -0.3, 0.0])[:, None].expand_as(x)
            if cond is None:
                return 0.3 * value
            last_bit = (torch.arange(x.shape[1]) % 2).to(dtype) * torch.finfo(dtype).eps
            return value * (1 + last_bit)

    x, label = torch.zeros(3, 70_001, dtype=dtype), {"label": torch.zeros(3, dtype=torch.int64)}
    level = torch.zeros(3, dtype=dtype)
    x0 = Rescale(Flat(), 3.0, 1.0, batched=False)(x, level, label)
    assert (
        torch.equal(x0, ClassifierFree(Flat(), 3.0, batched=False)(x, level, label))
        and x0[0].unique().numel() > 1
    )


def test_factor_and_interval_are_checked():
    for factor in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="factor"):
            Rescale(images(INTERPOLANTS["vp"]), 2.0, factor)
    with pytest.raises(ValueError, match="interval"):
        Rescale(images(INTERPOLANTS["vp"]), 2.0, 0.7, (1.0, 0.0))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
@each
def test_runs_with_samplers_and_splits_of_the_batch(interpolant, sampler):
    guidance = partial(Rescale, scale=4.0, factor=0.7, interval=(-4.0, 6.0))
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=guidance, shape=(3, 2))
    label = torch.arange(8) % 2

    def make(part):
        return recipe(images(interpolant), seeds=part, cond={"label": label[part.start : part.stop]})

    whole = make(range(8))
    assert torch.equal(whole, torch.cat([make(range(3)), make(range(3, 8))]))
    assert whole.dtype == torch.float32 and bool(torch.isfinite(whole).all())
