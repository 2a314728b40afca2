"""Pseudoinverse guidance: exact for white Gaussian data of the variance it assumes, biased both ways otherwise."""

import pytest
import torch
from measured import assert_moments, cosine_levels, draw, exact_x0, matrix_of, mixture_images, normal, scalars
from problems import D64, INTERPOLANTS

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.measurements import (
    Colourise,
    GaussianBlur,
    Inpaint,
    JPEGLike,
    MotionBlur,
    SuperResolution,
)
from diffusion_lab.posterior import PiGDM
from diffusion_lab.samplers import DDPM, CountingDenoiser, Heun
from diffusion_lab.typing import MEASUREMENT

IDENTITY = SuperResolution(factor=1)
OPERATORS = {
    "inpaint": (Inpaint(), (1, 6, 6)),
    "super_resolution": (SuperResolution(factor=2), (1, 6, 6)),
    "gaussian_blur": (GaussianBlur(size=5, std=1.0), (1, 6, 6)),
    "motion_blur": (MotionBlur(length=5.0, angle=30.0), (1, 6, 6)),
    "colourise": (Colourise(), (3, 4, 4)),
}


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize(("A", "shape"), OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_is_the_conditional_mean_of_white_gaussian_images(A, shape, variance, interpolant):
    mean, n = 0.3 * normal(*shape, seed=3), 0.2
    S = torch.tensor(variance, dtype=D64)
    denoiser = GaussianDenoiser(mean=mean, covariance=S, interpolant=interpolant)
    wrapped = PiGDM(denoiser, A, n, data_variance=variance, iterations=200, tolerance=1e-13)
    for level in (-8.0, -1.0, 3.0, 9.0):
        logsnr = torch.full((2,), level, dtype=D64)
        alpha, sigma = interpolant(logsnr[0])
        x, y = normal(2, *shape), A(normal(2, *shape, seed=2))
        exact = exact_x0(
            mean.flatten(),
            S * torch.eye(mean.numel(), dtype=D64),
            matrix_of(A, shape),
            n,
            x.flatten(1),
            alpha,
            sigma,
            y.flatten(1),
        )
        x0 = wrapped(x, logsnr, {MEASUREMENT: y})
        torch.testing.assert_close(x0.flatten(1), exact, rtol=0, atol=1e-8)


def test_defaults_solve_masks_and_super_resolution_in_one_iteration():
    denoiser = mixture_images(INTERPOLANTS["vp"])
    x, logsnr = normal(2, 1, 4, 4), torch.zeros(2, dtype=D64)
    for A in (Inpaint(), SuperResolution(factor=2)):
        cond = {MEASUREMENT: A(normal(2, 1, 4, 4, seed=1))}
        one, many = (PiGDM(denoiser, A, 0.1, iterations=k, tolerance=0.0)(x, logsnr, cond) for k in (1, 20))
        torch.testing.assert_close(one, many, rtol=0, atol=1e-12)


def test_levels_that_differ_within_the_batch():
    denoiser = mixture_images(INTERPOLANTS["rf"])
    x, logsnr = normal(3, 1, 4, 4), torch.tensor([-4.0, 0.0, 5.0], dtype=D64)
    A = GaussianBlur(size=3, std=0.8)
    y = A(normal(3, 1, 4, 4, seed=1))
    wrapped = PiGDM(denoiser, A, 0.1)
    alone = [wrapped(x[i : i + 1], logsnr[i : i + 1], {MEASUREMENT: y[i : i + 1]}) for i in range(3)]
    assert torch.equal(wrapped(x, logsnr, {MEASUREMENT: y}), torch.cat(alone))


# ---- draws: conditional-video-discrete.md, section 6(e) -------------------------------------------------------------


def drawn(variance, sampler, steps, assumed=1.0, n=20_000):
    wrapped = PiGDM(scalars(INTERPOLANTS["vp"], variance, n), IDENTITY, 0.3, data_variance=assumed)
    y = torch.ones(1, 1, 1, n, dtype=D64)
    return draw(wrapped, sampler, cosine_levels(steps), y, (1, 1, n))


@pytest.mark.parametrize(
    ("variance", "row"),
    [
        pytest.param(1.0, (0.917, 0.081), marks=pytest.mark.slow),
        (0.25, (0.650, 0.071)),
        pytest.param(4.0, (0.994, 0.075), marks=pytest.mark.slow),
    ],
)
def test_table_6e_is_biased_away_from_unit_variance(variance, row):
    draws = drawn(variance, DDPM(), 1000)
    assert_moments(draws, *row, rounding=0.0005, reference=20_000)
    mean, spread = variance / (variance + 0.09), 0.09 * variance / (variance + 0.09)
    if variance < 1.0:
        # y is trusted too little: 0.65 for 0.735, and the draws are too wide
        assert float(draws.mean()) < mean - 0.07 and float(draws.var()) > spread + 0.003
    elif variance > 1.0:
        # and too much: 0.994 for 0.978, and too narrow
        assert float(draws.mean()) > mean + 0.01 and float(draws.var()) < spread - 0.008


@pytest.mark.parametrize("variance", [1.0, 0.25, 4.0])
def test_calibrated_for_the_variance_it_is_told(variance):
    draws = drawn(variance, Heun(), 200, assumed=variance)
    assert_moments(draws, variance / (variance + 0.09), 0.09 * variance / (variance + 0.09))


def test_table_6e_without_the_variance_of_x0_it_collapses():
    draws = drawn(1.0, DDPM(), 1000, assumed=0.0)
    assert_moments(draws, 0.999, 0.044, rounding=0.0005, reference=20_000)
    # truth 0.917 and 0.083
    assert float(draws.mean()) > 0.95 and float(draws.var()) < 0.06


def test_one_call_and_its_errors():
    counting = CountingDenoiser(mixture_images(INTERPOLANTS["vp"]), batch=2)
    x, logsnr = normal(2, 1, 4, 4), torch.zeros(2, dtype=D64)
    PiGDM(counting, GaussianBlur(size=3), 0.1)(x, logsnr, {MEASUREMENT: normal(2, 1, 4, 4)})
    assert counting.calls == 1
    with pytest.raises(ValueError, match="needs a linear operator, which JPEGLike is not"):
        PiGDM(counting, JPEGLike(), 0.1)
    with pytest.raises(ValueError, match="data_variance"):
        PiGDM(counting, IDENTITY, 0.0, data_variance=0.0)
    with pytest.raises(ValueError, match="noise >= 0"):
        PiGDM(counting, IDENTITY, -1.0)
