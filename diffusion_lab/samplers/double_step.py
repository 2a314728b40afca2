r"""A step twice as long, and half of it back by fresh noise: the sampler of students that learnt double steps.

On a grid t_0 > t_1 > ... > t_N = 0, from t_i

    y         = DDIM from t_i to t_(i+2)
    x_(i+1)   = (alpha_(i+1) / alpha_(i+2)) y + sigma_(i+1) sqrt(1 - exp(logsnr_(i+1) - logsnr_(i+2))) z

and from the last level but one a single DDIM step. One call of the denoiser for each step of the grid. Were every long
step exact, each x_i would have the law of noisy data at its level, for that is what diffusing y up again gives.

Students are trained for it by `losses/distillation/guided_steps.py`, DoubleStepLoss, on grid=uniform_u with as many
steps as they learnt; they need no other denoiser's accuracy between the levels. With an ordinary denoiser it is a
first-order stochastic sampler.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.3 and the appendix on the N-step
    stochastic sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import add_noise, ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, check_grid, check_rng
from diffusion_lab.typing import Cond, DenoiserFn, OnStep


@dataclass(frozen=True, kw_only=True)
class DoubleStep:
    """Two steps forth and one back. It is no `Stepper`: a step looks two levels ahead."""

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return True

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Follow the grid from noise to samples `(B, *D)`. See `Stepper.__call__`; a grid of one step draws no noise.

        Raises:
            ValueError: If the grid is malformed, or `rng` is missing.
        """
        check_rng(self, rng)
        assert rng is not None
        bound, levels = BoundDenoiser(denoiser, cond), check_grid(grid).unbind(0)
        for index, (logsnr, logsnr_next) in enumerate(pairwise(levels)):
            x0 = bound(x, logsnr)
            beyond = levels[min(index + 2, len(levels) - 1)]
            x = ddim_step(bound.interpolant, x, x0, logsnr, beyond)
            if beyond != logsnr_next:
                x = add_noise(bound.interpolant, x, rng.randn_like(x), beyond, logsnr_next)
            if on_step is not None:
                on_step(index, logsnr_next, x, x0)
        return x
