"""MCG: DPS's gradient, a projection that holds to the end, and no error bars."""

from itertools import pairwise

import pytest
import torch
from measured import (
    KNOW_A,
    PAIR,
    Pairs,
    assert_moments,
    cosine_levels,
    draw,
    gaussian_images,
    matrix_of,
    mixture_images,
    normal,
    scalars,
)
from problems import D64, INTERPOLANTS

from diffusion_lab.measurements import (
    Colourise,
    GaussianBlur,
    Inpaint,
    JPEGLike,
    Linear,
    SuperResolution,
)
from diffusion_lab.posterior import DPS, MCG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Heun
from diffusion_lab.typing import MEASUREMENT

GRID = cosine_levels(12, ends=8.0)


@pytest.mark.parametrize(
    ("A", "shape"),
    [
        (Inpaint(), (1, 4, 4)),
        (SuperResolution(factor=2), (1, 4, 4)),
        (Colourise(), (3, 4, 4)),
        (GaussianBlur(size=3, std=0.5), (1, 4, 4)),
    ],
    ids=["mask", "super_resolution", "colourise", "blur"],
)
def test_is_dps_and_a_projection(A, shape):
    denoiser = mixture_images(INTERPOLANTS["vp"], shape)
    x, logsnr = normal(2, *shape), torch.tensor([-1.0, 2.0], dtype=D64)
    y = A(normal(2, *shape, seed=1))
    gradient = DPS(denoiser, A, 0.1, GRID)(x, logsnr, {MEASUREMENT: y})
    x0 = MCG(denoiser, A, 0.1, GRID, iterations=100, tolerance=1e-12)(x, logsnr, {MEASUREMENT: y})
    torch.testing.assert_close(A(x0), y, rtol=0, atol=1e-9)
    # the nearest such point
    pseudoinverse = torch.linalg.pinv(matrix_of(A, shape))
    expected = gradient.flatten(1) + (y - A(gradient)).flatten(1) @ pseudoinverse.T
    torch.testing.assert_close(x0.flatten(1), expected, rtol=0, atol=1e-9)


def test_vectors():
    matrix = normal(2, 4, seed=4)
    denoiser = mixture_images(INTERPOLANTS["vp"], (4,))
    x, y = normal(3, 4), normal(3, 2, seed=1)
    x0 = MCG(denoiser, Linear(matrix), 0.0, GRID, tolerance=1e-12)(
        x, torch.zeros(3, dtype=D64), {MEASUREMENT: y}
    )
    plain = denoiser(x, torch.zeros(3, dtype=D64))
    expected = plain + (y - plain @ matrix.T) @ torch.linalg.pinv(matrix).T
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(), Heun()], ids=["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("A", [Inpaint(), SuperResolution(factor=2)], ids=["mask", "super_resolution"])
def test_samples_end_on_the_measurement(A, sampler):
    denoiser, mean, _ = gaussian_images(INTERPOLANTS["vp"], (1, 8, 8))
    y = A(mean[None] + 0.5).expand(3, *A(mean[None]).shape[1:])
    end = draw(MCG(denoiser, A, 0.02, GRID), sampler, GRID, y, (1, 8, 8), range(3))
    torch.testing.assert_close(A(end), y, rtol=0, atol=1e-6)
    # known pixels are put in bit for bit
    if isinstance(A, Inpaint):
        known = (A.known(end) > 0).expand_as(end)
        assert torch.equal(end[known], y[known])


def test_without_a_gradient_it_has_the_bias_of_replacement():
    # section 3(e): the known part follows q(z_s | z_t, y) instead of a fresh draw each step. Everything is linear, so
    # mean m and covariance P of z = (a, b) can be led through the ancestral steps
    n, grid, vp = 20_000, cosine_levels(512), INTERPOLANTS["vp"]
    m, P = torch.zeros(2, dtype=D64), vp(grid[0])[1] ** 2 * torch.eye(2, dtype=D64)
    for level, later in pairwise(grid):
        (alpha, sigma), (alpha_next, sigma_next) = vp(level), vp(later)
        gain = alpha * PAIR @ torch.linalg.inv(alpha**2 * PAIR + sigma**2 * torch.eye(2, dtype=D64))
        gain[0] = 0.0
        c = -torch.expm1(level - later)
        M = (sigma_next / sigma) ** 2 * alpha / alpha_next * torch.eye(2, dtype=D64) + c * alpha_next * gain
        m = M @ m + c * alpha_next * torch.tensor([1.5, 0.0], dtype=D64)
        P = M @ P @ M.T + c * sigma_next**2 * torch.eye(2, dtype=D64)
    wrapped = MCG(Pairs(vp), KNOW_A, 0.0, grid)
    y = torch.tensor([1.5, 0.0], dtype=D64)[:, None].expand(1, 1, 2, n)
    b = draw(wrapped, DDPM(), grid, y, (1, 2, n))[..., 1, :]
    assert_moments(b, float(m[1]), float(P[1, 1]))
    # truth 1.35 and 0.19
    assert 0.85 < float(b.mean()) < 1.25 and 0.25 < float(b.var()) < 0.5


def test_noise_of_y_is_not_averaged_out():
    # y = x0 + 0.3 n = 1, x0 ~ N(0, 1): truth 0.917 and 0.083; MCG returns y itself, without variance
    n, A = 100, SuperResolution(factor=1)
    grid = cosine_levels(100)
    wrapped = MCG(scalars(INTERPOLANTS["vp"], 1.0), A, 1e-3, grid)
    draws = draw(wrapped, DDPM(), grid, torch.ones(n, 1, 1, 1, dtype=D64), (1, 1, 1), seeds=range(n))
    assert_moments(draws, 1.0, 0.0, rounding=1e-6)


def test_one_call_and_its_errors():
    counting = CountingDenoiser(mixture_images(INTERPOLANTS["vp"]), batch=2)
    A = GaussianBlur(size=3)
    MCG(counting, A, 1.0, GRID)(
        normal(2, 1, 4, 4), torch.zeros(2, dtype=D64), {MEASUREMENT: normal(2, 1, 4, 4)}
    )
    assert counting.calls == 1
    with pytest.raises(ValueError, match="needs a linear operator"):
        MCG(counting, JPEGLike(), 1.0, GRID)
    with pytest.raises(ValueError, match="needs cond"):
        MCG(counting, A, 1.0, GRID)(normal(2, 1, 4, 4), torch.zeros(2, dtype=D64))
