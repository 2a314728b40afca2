r"""From data to noise: DDIM walked backwards, so that DDIM leads from that noise to the data again.

    x_(i+1) = alpha_(i+1) x0_hat(x_i) + (sigma_(i+1) / sigma_i) (x_i - alpha_i x0_hat(x_i)),       levels that fall

The data stand at the first level, which is finite: at +inf they have no noise that could be kept. It is so small there
that nobody sees it, but where data do not vary, as in black corners of images, all noise is grown from it: without any,
what comes out is shorter than noise is. A denoiser's own step back uses x0 at the wrong end of the step, so many steps
are needed; a distilled encoder (`EncoderLoss`) was taught where a few of them end.

References:
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021, section 4.3.
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.4 (encoding).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import ddim_step, marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.typing import Cond, DenoiserFn


def towards_noise(schedule: Schedule, steps: int) -> Tensor:
    """Return the levels of `schedule` at u = 0, 1/steps, ..., 1, falling; `(steps + 1,)` float64.

    Raises:
        ValueError: If `steps` is not positive, or an end of the schedule is infinite.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    levels = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)
    if not bool(torch.isfinite(levels).all()):
        raise ValueError("data can be taken to noise between finite log-SNRs only: give the schedule ends")
    return levels


@torch.no_grad()
def invert(
    denoiser: DenoiserFn,
    x0: Tensor,
    levels: Tensor,
    *,
    cond: Cond | None = None,
    rng: SampleRNG | None = None,
) -> Tensor:
    """Return the noise at `levels[-1]` that belongs to data, of the shape of `x0`.

    Args:
        denoiser: E[x0 | x]; one call a step.
        x0: Clean data `(B, *D)`.
        levels: Falling finite log-SNRs, as `towards_noise` returns them.
        cond: Conditions.
        rng: One stream a sample, for the noise of the first level; None takes the data for x as they are.

    Raises:
        ValueError: If the levels are fewer than two, infinite, or do not fall.
    """
    levels = levels.detach().to(device="cpu", dtype=torch.float64)
    if len(levels) < 2 or not bool(torch.isfinite(levels).all()) or not bool((levels.diff() < 0).all()):
        raise ValueError("inversion needs at least two finite log-SNRs that fall")
    bound = BoundDenoiser(denoiser, cond)
    x = x0 if rng is None else marginal(bound.interpolant, x0, rng.randn_like(x0), levels[0])
    for logsnr, logsnr_next in pairwise(levels.unbind(0)):
        x = ddim_step(bound.interpolant, x, bound(x, logsnr), logsnr, logsnr_next)
    return x
