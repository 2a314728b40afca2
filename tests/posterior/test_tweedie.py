"""Exact Tweedie covariance: E[x0 | x, y] of Gaussian data to rounding, and draws that are calibrated."""

import math

import pytest
import torch
from measured import (
    KNOW_A,
    Pairs,
    assert_moments,
    cosine_levels,
    draw,
    exact_x0,
    gaussian_images,
    matrix_of,
    mixture_images,
    normal,
    posterior_of_gaussian,
    scalars,
)
from problems import D64, INTERPOLANTS

from diffusion_lab.measurements import (
    Colourise,
    GaussianBlur,
    Inpaint,
    JPEGLike,
    Linear,
    MotionBlur,
    SuperResolution,
    measure,
)
from diffusion_lab.posterior import ExactTweedie
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Heun
from diffusion_lab.samplers.predictor_corrector import PredictorCorrector
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
@pytest.mark.parametrize(("noise", "products"), [(0.3, "vjp"), (0.05, "vjp"), (0.05, "jvp")])
def test_is_the_conditional_mean_of_gaussian_images(A, shape, noise, products, interpolant):
    denoiser, mean, S = gaussian_images(interpolant, shape)
    wrapped = ExactTweedie(denoiser, A, noise, iterations=200, tolerance=1e-13, products=products)
    for level in (-8.0, -1.0, 3.0, 9.0):
        logsnr = torch.full((2,), level, dtype=D64)
        alpha, sigma = interpolant(logsnr[0])
        x = alpha * normal(2, *shape) + sigma * normal(2, *shape, seed=1)
        y = A(normal(2, *shape, seed=2))
        x0 = wrapped(x, logsnr, {MEASUREMENT: y})
        exact = exact_x0(
            mean.flatten(), S, matrix_of(A, shape), noise, x.flatten(1), alpha, sigma, y.flatten(1)
        )
        torch.testing.assert_close(x0.flatten(1), exact, rtol=0, atol=1e-8)


def test_vectors_and_no_noise():
    vp, A = INTERPOLANTS["vp"], normal(2, 4, seed=9)
    denoiser, mean, S = gaussian_images(vp, (1, 2, 2))
    denoiser.mean = mean.flatten()
    wrapped = ExactTweedie(denoiser, Linear(A), 0.0, iterations=20, tolerance=1e-13)
    x, y, logsnr = normal(3, 4), normal(3, 2, seed=1), torch.full((3,), 0.4, dtype=D64)
    x0 = wrapped(x, logsnr, {MEASUREMENT: y})
    alpha, sigma = vp(logsnr[0])
    exact = exact_x0(mean.flatten(), S, A, 0.0, x, alpha, sigma, y)
    torch.testing.assert_close(x0, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(x0 @ A.T, y, rtol=0, atol=1e-9)


# ---- draws: conditional-video-discrete.md, sections 3(e) and 6(e) ---------------------------------------------------


@pytest.mark.parametrize(("name", "variance"), [("vp", 1.0), ("ve", 0.25), ("rf", 4.0)])
def test_scalars_are_calibrated(name, variance):
    # y = x0 + 0.3 n = 1; truth: mean v / (v + 0.09), variance 0.09 v / (v + 0.09)
    n = 20_000
    wrapped = ExactTweedie(scalars(INTERPOLANTS[name], variance, n), IDENTITY, 0.3)
    y = torch.ones(1, 1, 1, n, dtype=D64)
    draws = draw(wrapped, Heun(), cosine_levels(200), y, (1, 1, n))
    assert_moments(draws, variance / (variance + 0.09), 0.09 * variance / (variance + 0.09))


@pytest.mark.parametrize(
    ("variance", "row"),
    [
        (1.0, (0.915, 0.081)),
        pytest.param(0.25, (0.736, 0.065), marks=pytest.mark.slow),
        pytest.param(4.0, (0.980, 0.087), marks=pytest.mark.slow),
    ],
)
def test_table_6e_exact_rows(variance, row):
    n = 20_000
    wrapped = ExactTweedie(scalars(INTERPOLANTS["vp"], variance, n), IDENTITY, 0.3)
    y = torch.ones(1, 1, 1, n, dtype=D64)
    draws = draw(wrapped, DDPM(), cosine_levels(1000), y, (1, 1, n))
    assert_moments(draws, *row, rounding=0.0005, reference=20_000)


LANGEVIN = PredictorCorrector(corrections=1, ancestral=True, snr=math.inf, longest=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [DDPM(), LANGEVIN], ids=["ddpm", "langevin"])
def test_table_3e_pairs_are_calibrated(sampler):
    # b given a = 1.5: mean 1.35, variance 0.19
    n = 20_000
    wrapped = ExactTweedie(Pairs(INTERPOLANTS["vp"]), KNOW_A, 0.0)
    y = torch.tensor([1.5, 0.0], dtype=D64)[:, None].expand(1, 1, 2, n)
    draws = draw(wrapped, sampler, cosine_levels(512), y, (1, 2, n))
    # the measured part of a draw is y up to the denoiser's last noise
    assert float((draws[..., 0, :] - 1.5).abs().max()) < 1e-9
    assert_moments(draws[..., 1, :], 1.35, 0.19)


@pytest.mark.parametrize("steps", [64, 256])
def test_table_3e_pairs_at_other_numbers_of_steps(steps):
    n = 20_000
    wrapped = ExactTweedie(Pairs(INTERPOLANTS["rf"]), KNOW_A, 0.0)
    y = torch.tensor([1.5, 0.0], dtype=D64)[:, None].expand(1, 1, 2, n)
    draws = draw(wrapped, Heun(), cosine_levels(steps), y, (1, 2, n))[..., 1, :]
    assert_moments(draws, 1.35, 0.19)


def test_images_are_calibrated():
    shape, noise, B = (1, 6, 6), 0.1, 2000
    A = SuperResolution(factor=2)
    denoiser, mean, S = gaussian_images(INTERPOLANTS["vp"], shape)
    y = measure(A, mean[None] + 0.5, noise, SampleRNG([5])).expand(B, 1, 3, 3)
    wrapped = ExactTweedie(denoiser, A, noise, iterations=30, tolerance=1e-8)
    draws = draw(wrapped, Heun(), cosine_levels(40), y, shape, seeds=range(B)).flatten(1)
    exact_mean, exact = posterior_of_gaussian(mean.flatten(), S, matrix_of(A, shape), noise, y.flatten(1)[:1])
    # 36 means, and 36 x 37 / 2 covariances whose standard error is sqrt((C_ii C_jj + C_ij^2) / B)
    assert float(((draws.mean(0) - exact_mean[0]) / (exact.diag() / B).sqrt()).abs().max()) < 4.0
    error = (torch.outer(exact.diag(), exact.diag()) + exact**2).div(B).sqrt()
    z = (draws.T.cov() - exact) / error
    assert float(z.abs().max()) < 5.0 and float(z.square().mean()) < 1.5
    # and it is not the prior that was drawn
    assert float((S.diag() / exact.diag()).min()) > 3.0


# ---- the solver -----------------------------------------------------------------------------------------------------


def test_calls_are_one_and_the_products():
    counting = CountingDenoiser(scalars(INTERPOLANTS["vp"], 1.0, 9), batch=2)
    wrapped = ExactTweedie(counting, IDENTITY, 0.3, iterations=7, products="jvp")
    y = torch.ones(2, 1, 1, 9, dtype=D64)
    wrapped(normal(2, 1, 1, 9), torch.zeros(2, dtype=D64), {MEASUREMENT: y})
    # V is a multiple of the identity: one product solves it
    assert counting.calls == 2
    denoiser, _, _ = gaussian_images(INTERPOLANTS["vp"], (1, 6, 6))
    counting = CountingDenoiser(denoiser, batch=2)
    for products, calls in (("jvp", 4), ("vjp", 1)):
        counting.calls = 0
        wrapped = ExactTweedie(counting, Inpaint(), 0.1, iterations=3, tolerance=0.0, products=products)
        wrapped(normal(2, 1, 6, 6), torch.zeros(2, dtype=D64), {MEASUREMENT: normal(2, 1, 6, 6)})
        assert counting.calls == calls


@pytest.mark.parametrize("products", ["vjp", "jvp"])
def test_a_covariance_that_is_none_does_no_harm(products):
    # a "denoiser" whose derivative is negative in some directions, as a network's may be, so that V is nearly 0 there
    class Broken:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            return torch.linspace(-0.0141, 0.3, 16, dtype=D64).reshape(1, 1, 4, 4) * x

    x, y, logsnr = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1), torch.zeros(1, dtype=D64)
    x0 = Broken()(x, logsnr)
    wrapped = ExactTweedie(Broken(), IDENTITY, 0.1, iterations=16, tolerance=0.0, products=products)
    residual, edit = y - x0, wrapped(x, logsnr, {MEASUREMENT: y}) - x0
    # solved to the end the edit would be hundreds of residuals long; it goes towards y
    assert float((edit - residual).norm()) < float(residual.norm())


def test_nothing_is_done_where_the_measurement_is_met():
    counting = CountingDenoiser(mixture_images(INTERPOLANTS["vp"]), batch=2)
    x, logsnr = normal(2, 1, 4, 4), torch.zeros(2, dtype=D64)
    x0 = counting.denoiser(x, logsnr)
    A = Inpaint()
    assert torch.equal(ExactTweedie(counting, A, 0.1)(x, logsnr, {MEASUREMENT: A(x0)}), x0)
    assert counting.calls == 1


def test_more_iterations_come_nearer():
    denoiser, mean, S = gaussian_images(INTERPOLANTS["vp"], (1, 6, 6))
    A, logsnr = GaussianBlur(size=5, std=1.0), torch.full((1,), 1.0, dtype=D64)
    x, y = normal(1, 1, 6, 6), normal(1, 1, 6, 6, seed=1)
    alpha, sigma = INTERPOLANTS["vp"](logsnr[0])
    exact = exact_x0(
        mean.flatten(), S, matrix_of(A, (1, 6, 6)), 0.1, x.flatten(1), alpha, sigma, y.flatten(1)
    )
    errors = []
    for iterations in (1, 3, 9, 27):
        x0 = ExactTweedie(denoiser, A, 0.1, iterations=iterations, tolerance=0.0)(x, logsnr, {MEASUREMENT: y})
        errors.append(float((x0.flatten(1) - exact).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0]


def test_only_linear_operators():
    with pytest.raises(ValueError, match="linear"):
        ExactTweedie(scalars(INTERPOLANTS["vp"], 1.0), JPEGLike(), 0.1)
    with pytest.raises(ValueError, match="products vjp or jvp"):
        ExactTweedie(scalars(INTERPOLANTS["vp"], 1.0), IDENTITY, 0.1, products="hvp")
    with pytest.raises(ValueError, match="iterations >= 1"):
        ExactTweedie(scalars(INTERPOLANTS["vp"], 1.0), IDENTITY, 0.1, iterations=0)


def test_the_same_images_in_every_interpolant():
    ends = []
    for interpolant in INTERPOLANTS.values():
        wrapped = ExactTweedie(mixture_images(interpolant), Inpaint(), 0.1, iterations=6, tolerance=0.0)
        y = Inpaint()(normal(3, 1, 4, 4, seed=1))
        ends.append(draw(wrapped, DDIM(), cosine_levels(20, ends=8.0), y, (1, 4, 4), range(3)))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)
