r"""A printed list of noise levels, brought to another number of steps.

Published grids of n steps list n + 1 noise levels sigma_0 > ... > sigma_n. Their logarithm is interpolated linearly in
the index, and the last level becomes 0:

    log sigma'_i = interpolation of log sigma at i n / N,   i = 0 .. N - 1,      sigma'_N = 0.

So N = n keeps the first n levels, as diffusers and ComfyUI use these lists; sigma_n only shapes other numbers of steps.

References:
    Sabour, Fidler & Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models", 2024 (the tables, and
        the log-linear interpolation of its quickstart page).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.samplers.grids.basic import from_sigmas
from diffusion_lab.samplers.grids.common import check_steps, closed


def interpolated(sigmas: Sequence[float], steps: int) -> Tensor:
    """Return `steps` levels interpolated log-linearly in the list's first to last noise level, and +inf.

    Args:
        sigmas: Decreasing EDM noise levels sigma / alpha, n + 1 of them for a grid of n steps, the last not zero.
        steps: Number of steps wanted.

    Raises:
        ValueError: If `steps` is not positive, or there are not two or more positive levels in decreasing order.
    """
    check_steps(steps)
    if len(sigmas) < 2 or sigmas[-1] <= 0.0:
        raise ValueError("interpolated needs at least two noise levels, the last of them not zero")
    levels = from_sigmas(sigmas)[:-1]
    n = len(levels) - 1
    positions = np.arange(steps) * (n / steps)
    return closed(torch.from_numpy(np.interp(positions, np.arange(n + 1), levels.numpy())))
