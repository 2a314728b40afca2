r"""Power spacing of a schedule's time.

    u_i = (1 - i / N)^power,      logsnr_i = logsnr(u_i),      i = 0 .. N - 1,      logsnr_N = +inf

`power` 1 is `uniform_u`; above 1 the steps become finer towards the data. DEIS puts t^(1/power) on equal steps from T
to t_min with power 2; the ends of u are those of the schedule, so this is that grid with t_min taken at u = 0.

References:
    Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2023 (time discretisation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.schedules.base import Schedule
from diffusion_lab.samplers.grids.common import check_steps, closed


def power_time(schedule: Schedule, steps: int, power: float) -> Tensor:
    """Return the levels of `schedule` at u = 1, ..., (1/steps)^power, and +inf; `(steps + 1,)`.

    Raises:
        ValueError: If `steps` or `power` is not positive.
    """
    check_steps(steps)
    if power <= 0.0:
        raise ValueError(f"power_time needs power > 0, got {power}")
    u = (1.0 - torch.arange(steps, dtype=torch.float64) / steps) ** power
    return closed(schedule(u))
