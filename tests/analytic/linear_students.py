"""Linear students of moment matching, with every second moment exact."""

import math

import torch
from problems import PURE_COSINE

from diffusion_lab.losses import SNRPlusOne
from diffusion_lab.losses.distillation import AlternatingLoss
from diffusion_lab.process import Cosine, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64
VP = VariancePreserving()
WIDE = Cosine(logsnr_min=-20.0, logsnr_max=20.0)
S = 0.25
NOISE = 1.0 - 1e-12


def loss_of(kind=AlternatingLoss, schedule=PURE_COSINE, **options):
    return kind(schedule=schedule, weighting=SNRPlusOne(schedule=schedule), **options)


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


def level(u):
    return PURE_COSINE(torch.as_tensor(u, dtype=D64))


class Linear:
    """x0_hat = gain x + shift."""

    interpolant = VP

    def __init__(self, gain, shift=0.0):
        self.gain, self.shift = gain, shift

    def __call__(self, x, logsnr, cond=None):
        return self.gain * x + self.shift


def signs(count):
    """Every second moment of `count` independent numbers, exactly: (2^count, count)."""
    return torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=D64)] * count).view(-1, count)


def steps_of(loss, student, t, s, start_variance=None):
    """The student's steps from t to each s, over all signs: grouped by s, `(len(s), 4)` each way."""
    n = signs(2)
    s = torch.as_tensor(s, dtype=D64).view(-1, 1).expand(-1, 4).reshape(-1)
    start = level(torch.full_like(s, t))
    x, z = (n[:, i].repeat(len(s) // 4)[:, None] for i in range(2))
    scale = 1.0 if start_variance is None else math.sqrt(start_variance)
    return loss.step(student, scale * x, z, start, level(s))


def slope_of(taken):
    """E[x~ | z_s] = slope z_s, `(number of s, 1)`."""
    x, y = taken.x_next.view(-1, 4), taken.x0.detach().view(-1, 4)
    return ((x * y).mean(1) / x.square().mean(1))[:, None]


def teacher_slope(s, variance=S):
    alpha, sigma = VP(level(s))
    return alpha * variance / (alpha**2 * variance + sigma**2)
