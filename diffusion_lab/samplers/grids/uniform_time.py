r"""Equal steps in the time of rectified flow, from pure noise to data.

    t_i = 1 - i / N,      logsnr_i = 2 log((1 - t_i) / t_i),      i = 0 .. N,      logsnr_0 = -inf,  logsnr_N = +inf

t is the flow's time in this library's direction, 1 at noise: under rectified flow alpha = 1 - t and sigma = t, and the
straight line from noise to data is cut into equal pieces. The levels are those of log-SNR, so the grid serves the
variance-preserving process as well; the exploding one has no samples at logsnr = -inf.

References:
    Liu et al., "Flow Straight and Fast", 2022, section 2.1 (Euler's method with equal steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.samplers.grids.common import check_steps, closed


def uniform_time(steps: int) -> Tensor:
    """Return the levels at t = 1, 1 - 1/steps, ..., 1/steps, and +inf; `(steps + 1,)`, the first is -inf.

    Raises:
        ValueError: If `steps` is not positive.
    """
    check_steps(steps)
    i = torch.arange(steps, dtype=torch.float64)
    # (1 - t) / t = i / (N - i), with no rounding in the difference
    return closed(2.0 * torch.log(i / (steps - i)))
