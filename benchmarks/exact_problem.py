"""The exact problem of benchmarks/samplers.py: ten Gaussians in 64 dimensions, the classes of scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.process import VariancePreserving
from diffusion_lab.rng import SampleRNG


@cache
def mixture() -> GaussianMixtureDenoiser:
    """Ten Gaussians at the class means of the digits, each with its class's mean variance in 64 dimensions."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 8.0 - 1.0), torch.from_numpy(digits.target)
    return GaussianMixtureDenoiser(
        means=torch.stack([x[y == k].mean(0) for k in range(10)]),
        variances=torch.stack([x[y == k].var(0).mean() for k in range(10)]),
        weights=torch.ones(10, dtype=torch.float64),
        labels=torch.arange(10),
        interpolant=VariancePreserving(),
    )


def moments(problem: GaussianMixtureDenoiser) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the mixture."""
    mean = problem.means.mean(0)
    spread = problem.means - mean
    return mean, torch.diag(problem.variances.mean(0)) + spread.T @ spread / len(problem.means)


def fitted_on_mixture(sampler: Any, problem: GaussianMixtureDenoiser) -> Any:
    """Fit what wants fitting, to samples of the mixture."""
    if getattr(sampler, "fitted", True):
        return sampler
    from diffusion_lab.samplers.dpm_solver_v3_statistics import Statistics

    draw = torch.Generator().manual_seed(1)
    component = torch.randint(10, (256,), generator=draw)
    noise = torch.randn(256, 64, generator=draw, dtype=torch.float64)
    x0 = problem.means[component] + problem.variances[component].sqrt() * noise
    return replace(sampler, statistics=Statistics.of(sampler.fit(problem, x0, None, SampleRNG(range(256)))))


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows; numbers that are not finite count as 0, as they do in a picture."""
    x = torch.nan_to_num(x, posinf=0.0, neginf=0.0)
    return x.mean(0), torch.cov(x.T)
