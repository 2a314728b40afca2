r"""Grids in closed form: a schedule's spacing, the solvers', EDM's, and a list of noise levels.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.process.schedules.base import Schedule
from diffusion_lab.process.schedules.learned import LearnedCurve
from diffusion_lab.samplers.grids.common import check_steps, closed


def uniform_u(schedule: Schedule, steps: int) -> Tensor:
    """Return the levels of `schedule` at u = 1, 1 - 1/steps, ..., 1/steps, and +inf; `(steps + 1,)`.

    Raises:
        ValueError: If `steps` is not positive, or the schedule is one that learns: what it learnt is in the loss of its
            run, not in the settings that it is built of here.
    """
    check_steps(steps)
    if isinstance(schedule, LearnedCurve):
        raise ValueError(
            "a learned schedule stays in its run's loss: grid=uniform_logsnr, with the ends it was trained on"
        )
    u = 1.0 - torch.arange(steps, dtype=torch.float64) / steps
    return closed(schedule(u))


def uniform_logsnr(logsnr_min: float, logsnr_max: float, steps: int) -> Tensor:
    """Return `steps` equidistant levels from `logsnr_min` to `logsnr_max` inclusive, and +inf; `(steps + 1,)`.

    Raises:
        ValueError: If `steps` is not positive or the range is empty or infinite.
    """
    check_steps(steps)
    if not (math.isfinite(logsnr_min) and math.isfinite(logsnr_max) and logsnr_min < logsnr_max):
        raise ValueError(
            f"uniform_logsnr needs finite logsnr_min < logsnr_max, got {logsnr_min} and {logsnr_max}"
        )
    return closed(torch.linspace(logsnr_min, logsnr_max, steps, dtype=torch.float64))


def karras(sigma_min: float, sigma_max: float, rho: float, steps: int) -> Tensor:
    """Return EDM's grid: `steps` noise levels from `sigma_max` to `sigma_min` inclusive, and zero; `(steps + 1,)`.

    Raises:
        ValueError: If `steps` is not positive or the levels are not 0 < sigma_min < sigma_max.
    """
    check_steps(steps)
    if not (0.0 < sigma_min < sigma_max and rho > 0.0):
        raise ValueError("karras needs 0 < sigma_min < sigma_max and rho > 0")
    ends = (sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho))
    return closed(-2.0 * rho * torch.log(torch.linspace(*ends, steps, dtype=torch.float64)))


def from_sigmas(sigmas: Sequence[float]) -> Tensor:
    """Return the grid of decreasing EDM noise levels sigma / alpha; a final 0 may be given or left out.

    Raises:
        ValueError: If the levels do not decrease or one is negative.
    """
    levels = torch.tensor(list(sigmas), dtype=torch.float64)
    levels = levels[:-1] if len(levels) > 1 and float(levels[-1]) == 0.0 else levels
    if len(levels) == 0 or not bool((levels > 0).all()) or not bool((levels.diff() < 0).all()):
        raise ValueError("from_sigmas needs positive noise levels in decreasing order")
    return closed(-2.0 * torch.log(levels))
