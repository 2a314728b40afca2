r"""Diffusion posterior sampling (DPS): after each ancestral step, a step of fixed length towards y.

    z_s = z'_s - zeta grad_z |y - A(x0(z))|^2,        zeta = step / |y - A(x0(z))|,

z in variance-preserving units at level t, z'_s the ancestral draw at the next level s. The mean of that draw holds
c x0, c = (1 - e^(l_t - l_s)) alpha_s, so the same z_s comes of the edit

    x0 <- x0 - (zeta / c) grad_z |y - A(x0(z))|^2,

by which DPS runs with every sampler; with `ddpm` it is the paper's algorithm. A sampler that does not go along the
grid step by step (adaptive, restarting, with corrections) is pushed at each call, which is not the paper's total. In
another interpolant x = k z with k = sqrt(alpha^2 + sigma^2), so grad_z = k grad_x and images are the same in all. The
next level is a matter of the grid: an evaluation inside a step (a solver's second stage) takes that step's c, and the
last step, to +inf, has c = 1.

NOT calibrated: the length of the step does not know the noise of y nor the spread of x0, so `step` trades consistency
with y for keeping to the prior, and no value gives the posterior's mean and variance. On N(0, 1), y = x0 + 0.3 n = 1,
1000 steps: step 3e-4 gives mean 0.22 and variance 0.79; 1e-3 0.63 and 0.37; 3e-3 0.99 and 0.006; 0.01 and more y itself
without variance. The truth is 0.92 and 0.083. Use it for A that are not linear, and for one good image, not for error
bars. The effect of a step also grows with the number of steps.

The norm is each sample's own, and `FLOOR` keeps 1 / |residual| finite. zeta is the paper's; its public code has
`scale` = 2 step.

References:
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_lab.guidance import unguided
from diffusion_lab.measurements import Operator
from diffusion_lab.posterior.common import answer, dot, measurement
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant, VariancePreserving
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, conditional_of

# smallest |y - A x0| that is divided by
FLOOR = 1e-8


class DPS:
    """A denoiser guided by steps of fixed length towards y. One call an evaluation, with its backward pass.

    Not calibrated: see the module.

    Args:
        denoiser: Unconditional denoiser, or one under its own conditions.
        operator: A, differentiable.
        step: Length of a step, at least 0; about 0.4 to 1 in the paper, for 1000 steps of 256 x 256 pixels.
        grid: The sampler's grid: increasing log-SNRs that end at +inf.
        inner: Guidance below this one.

    Raises:
        ValueError: If `step` is negative or the grid is malformed, or (at call) the measurement is missing or does not
            fit.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        operator: Operator,
        step: float,
        grid: Tensor,
        inner: GuidanceFactory = unguided,
    ) -> None:
        if not step >= 0.0:
            raise ValueError(f"DPS needs step >= 0, got {step}")
        self.denoiser, self.operator = inner(denoiser), operator
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.step = step
        self.grid = _levels(grid)
        # c of each step of the grid
        now, later = self.grid[:-1], self.grid[1:]
        self.coefficients = -torch.expm1(now - later) * VariancePreserving()(later)[0]

    def coefficient(self, logsnr: Tensor) -> Tensor:
        """Return c, the share of x0 in the ancestral step over `logsnr`, of its shape."""
        # compared in the level's own precision: a level of the grid begins a step, however it was rounded
        inner_levels = self.grid[1:-1].to(logsnr)
        index = torch.searchsorted(inner_levels, logsnr.contiguous(), right=True)
        return self.coefficients.to(logsnr)[index]

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0, of the shape of `x`."""
        at = answer(self.denoiser, self.operator, x, logsnr, cond)
        residual = measurement(cond, at.predicted, self.operator) - at.predicted
        length = torch.sqrt(dot(residual, residual)).clamp_min(FLOOR)
        alpha, sigma = self.interpolant(logsnr)
        k = torch.sqrt(alpha**2 + sigma**2)
        # zeta grad |y - A x0|^2 = -2 step J^T (y - A x0) / |y - A x0|
        towards = 2.0 * self.step * at.pull(residual / length)
        return at.x0 + broadcast_right(k / self.coefficient(logsnr), x) * towards


def _levels(grid: Any) -> Tensor:
    if not isinstance(grid, Tensor) or grid.ndim != 1:
        raise ValueError(
            f"DPS needs the sampler's grid, a 1-D tensor of log-SNRs, got {type(grid).__name__}: a grid that is fitted "
            "to a model must be fitted first"
        )
    return check_grid(grid)
