r"""Classifier-free guidance, everywhere or in an interval of noise levels.

    x0_hat = x0_uncond + scale (x0_cond - x0_uncond)        for logsnr in [low, high]
    x0_hat = x0_cond                                        elsewhere, without calling the unconditional network

scale = 1 is conditional and scale = 0 unconditional sampling, both to the bit and with one call; scale = 1 + w of Ho
& Salimans. Since x0, eps and the score are affine in each other with the same coefficients in both branches, guiding
x0 guides them all. The interval is on the log-SNR of each evaluation, not of each step; EDM's (sigma_low, sigma_high]
is logsnr = -2 ln sigma.

References:
    Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6.
    Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", 2024, eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.guidance.branches import answers, is_conditional, unconditional
from diffusion_lab.guidance.interval import Interval
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class ClassifierFree:
    """A denoiser guided by its own unconditional answer.

    Args:
        denoiser: Trained with and without conditions.
        scale: Guidance scale; 1 is off.
        interval: `(low, high)`: guide where low <= logsnr <= high.
        batched: Whether both answers come from one call, which needs the memory of both.

    Raises:
        ValueError: If the interval is not ordered.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        scale: float,
        interval: Sequence[float] = (-math.inf, math.inf),
        batched: bool = True,
    ) -> None:
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.scale, self.batched = denoiser, scale, batched
        self.interval = Interval(interval)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0_hat, of the shape of `x`; without a condition there is nothing to guide towards."""
        if self.scale == 1.0 or not is_conditional(cond):
            return self.denoiser(x, logsnr, cond)
        return self.interval(
            x, logsnr, lambda: self.denoiser(x, logsnr, cond), lambda: self._guided(x, logsnr, cond)
        )

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        if self.scale == 0.0:
            return self.denoiser(x, logsnr, unconditional(cond))
        without, given = answers(self.denoiser, x, logsnr, [unconditional(cond), cond], batched=self.batched)
        return torch.lerp(without, given, self.scale)
