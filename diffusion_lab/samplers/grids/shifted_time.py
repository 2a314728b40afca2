r"""Equal steps in the time of rectified flow, shifted for the size of the image.

    t_i = shift s_i / (1 + (shift - 1) s_i),      s_i = 1 - i / N,      logsnr_i = logsnr(s_i) - 2 ln shift

`shift` above 1 spends more steps on noise; 1 is `uniform_time`. `process/schedules/sd3.py` has the same shift for
training.

References:
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, eq. 23.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffusion_lab.samplers.grids.uniform_time import uniform_time


def shifted_time(steps: int, shift: float) -> Tensor:
    """Return the levels at the shifted times of `steps` equal steps; `(steps + 1,)`, from -inf to +inf.

    Raises:
        ValueError: If `steps` or `shift` is not positive.
    """
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shifted_time needs a positive shift, got {shift}")
    return uniform_time(steps) - 2.0 * math.log(shift)
