"""Exact problems with a measurement, on which posterior samplers are proved."""

import math

import torch
from problems import D64

from diffusion_lab.denoisers import GaussianDenoiser, GaussianMixtureDenoiser
from diffusion_lab.measurements import Inpaint
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import MEASUREMENT, SEED

INF = math.inf


def normal(*shape, seed=0, dtype=D64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine_levels(steps, ends=15.0):
    """`steps` log-SNRs of the cosine schedule from -ends towards ends, and +inf: the grid of the closed-form tables."""
    u = torch.linspace(1, 0, steps + 1, dtype=D64)
    low, high = math.atan(math.exp(-0.5 * ends)), math.atan(math.exp(0.5 * ends))
    levels = -2 * torch.log(torch.tan(low + (high - low) * u))
    return torch.cat([levels[:-1], torch.tensor([INF], dtype=D64)])


# ---- many copies of a small problem in one sample: `(1, 1, numbers, copies)` ----------------------------------------

PAIR = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=D64)
KNOW_A = Inpaint(mask="half", side="bottom")
"""Of a pair (a, b), in the two rows of an image, a is known."""


class Pairs:
    """Each column of an image `(B, 1, 2, K)` is a draw of N(0, PAIR)."""

    def __init__(self, interpolant, covariance=PAIR):
        self.interpolant, self.covariance = interpolant, covariance

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = (broadcast_right(c, x) for c in self.interpolant(expand_logsnr(logsnr, x)))
        S = self.covariance.to(x)
        eye = torch.eye(2, dtype=x.dtype)
        gain = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * eye)
        return gain @ x


def scalars(interpolant, variance, copies=1):
    """Each of the `copies` pixels of an image is a draw of N(0, variance)."""
    return GaussianDenoiser(
        mean=torch.zeros(1, 1, copies, dtype=D64),
        covariance=torch.tensor(variance, dtype=D64),
        interpolant=interpolant,
    )


def draw(denoiser, sampler, grid, y, shape, seeds=(0,), dtype=D64):
    """Samples `(len(seeds), *shape)` given y."""
    rng = SampleRNG(seeds)
    x = denoiser.interpolant(grid[0])[1] * rng.randn(shape, dtype=dtype)
    cond = {MEASUREMENT: y, SEED: torch.tensor(list(seeds))}
    return sampler(denoiser, x.to(dtype), grid, cond=cond, rng=rng)


def assert_moments(draws, mean, variance, rounding=0.0, reference=INF):
    """Mean and variance of `draws` within four standard errors, with those of `reference` draws and printed digits."""
    n = draws.numel()
    found_mean, found_variance = float(draws.mean()), float(draws.var())
    share = 1 / n + 1 / reference
    spread = max(variance, found_variance)
    assert abs(found_mean - mean) <= 4 * math.sqrt(spread * share) + rounding, (found_mean, found_variance)
    assert abs(found_variance - variance) <= 4 * spread * math.sqrt(2 * share) + rounding, (
        found_mean,
        found_variance,
    )


# ---- Gaussian images, whose posterior is known ----------------------------------------------------------------------


def smooth_covariance(C, H, W, length=1.5):
    """A covariance `(n, n)` of images in which near pixels, and channels, are alike."""
    c, i, j = (
        a.flatten().to(D64)
        for a in torch.meshgrid(torch.arange(C), torch.arange(H), torch.arange(W), indexing="ij")
    )
    distance = (i[:, None] - i) ** 2 + (j[:, None] - j) ** 2 + 2.0 * (c[:, None] - c) ** 2
    S = 0.6 * torch.exp(-distance / (2 * length**2))
    return S + 0.02 * torch.eye(len(S), dtype=D64)


def gaussian_images(interpolant, shape):
    """Denoiser of N(m, S) of images `shape`, with m and S."""
    mean = 0.3 * normal(*shape, seed=3)
    S = smooth_covariance(*shape)
    return GaussianDenoiser(mean=mean, covariance=S, interpolant=interpolant), mean, S


def matrix_of(operator, shape):
    """A `(m, n)` of a linear operator on samples of `shape`."""
    n = math.prod(shape)
    return operator(torch.eye(n, dtype=D64).reshape(n, *shape)).reshape(n, -1).T


def posterior_of_gaussian(mean, S, A, noise, y):
    """Mean `(B, n)` and covariance of x0 ~ N(mean, S) given y = A x0 + noise n `(B, m)`."""
    gain = S @ A.T @ torch.linalg.pinv(A @ S @ A.T + noise**2 * torch.eye(len(A), dtype=D64), hermitian=True)
    return mean + (y - mean @ A.T) @ gain.T, S - gain @ A @ S


def exact_x0(mean, S, A, noise, x, alpha, sigma, y):
    """E[x0 | x, y] `(B, n)`: both measurements in one."""
    both = torch.cat([A, (alpha / sigma) * torch.eye(A.shape[1], dtype=D64)])
    noises = torch.cat([torch.full((len(A),), noise, dtype=D64), torch.ones(A.shape[1], dtype=D64)])
    gain = S @ both.T @ torch.linalg.pinv(both @ S @ both.T + torch.diag(noises**2), hermitian=True)
    seen = torch.cat([y, x / sigma], 1)
    return mean + (seen - mean @ both.T) @ gain.T


def mixture_images(interpolant, shape=(1, 4, 4)):
    """A mixture of three Gaussians of images."""
    return GaussianMixtureDenoiser(
        means=normal(3, *shape, seed=7),
        variances=torch.tensor([0.1, 0.2, 0.15], dtype=D64),
        weights=torch.tensor([0.3, 0.3, 0.4], dtype=D64),
        interpolant=interpolant,
    )
