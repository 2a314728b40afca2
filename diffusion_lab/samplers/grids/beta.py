r"""Quantiles of a Beta distribution over a schedule's time: many steps at both ends, few in the middle.

    u_i = F^-1(1 - i / N; alpha, beta),      logsnr_i = logsnr(u_i),      i = 0 .. N - 1,      logsnr_N = +inf

with F the distribution function of Beta(alpha, beta). alpha = beta = 1 is `uniform_u`; below 1 the density has its mass
at the ends. u = 1 is noise, so a smaller `beta` crowds the noisy end and a smaller `alpha` the clean one.

Code bases differ in two ways. diffusers' `use_beta_sigmas` takes the quantiles over the noise level itself, which is
the schedule `Karras(rho=1)` here, and puts its last level at u = 0 before the final step: its grid of N levels is this
one of N - 1 steps with sigma_min put before the end. Others (ComfyUI) round u to the training time steps.

References:
    Lee et al., "Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion Models using Stepwise
        Spectral Analysis", 2024 (both parameters 0.6).
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from diffusion_lab.process.schedules.base import Schedule
from diffusion_lab.samplers.grids.common import check_steps, closed


def beta_quantile(schedule: Schedule, steps: int, alpha: float, beta: float) -> Tensor:
    """Return the levels of `schedule` at the quantiles 1, 1 - 1/steps, ..., 1/steps, and +inf; `(steps + 1,)`.

    Raises:
        ValueError: If `steps`, `alpha` or `beta` is not positive, or two quantiles coincide in float64.
    """
    check_steps(steps)
    if not (alpha > 0.0 and beta > 0.0):
        raise ValueError(f"beta_quantile needs alpha > 0 and beta > 0, got {alpha} and {beta}")
    probability = 1.0 - torch.arange(steps, dtype=torch.float64) / steps
    u = torch.from_numpy(stats.beta.ppf(probability.numpy(), alpha, beta))
    if not bool((u.diff() < 0).all()):
        raise ValueError(f"Beta({alpha}, {beta}) is too narrow for {steps} different levels")
    return closed(schedule(u))
