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

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class ClassifierFree:
    """A denoiser guided by its own unconditional answer.

    Args:
        denoiser: Trained with and without conditions.
        scale: Guidance scale; 1 is off.
        interval: `(low, high)`: guide where low <= logsnr <= high.

    Raises:
        ValueError: If the interval is not ordered.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        scale: float,
        interval: Sequence[float] = (-math.inf, math.inf),
    ) -> None:
        low, high = interval
        if low > high:
            raise ValueError(f"a guidance interval needs low <= high, got {low} and {high}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.scale, self.low, self.high = denoiser, scale, float(low), float(high)
        self._everywhere = math.isinf(self.low) and math.isinf(self.high) and self.low < self.high

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0_hat, of the shape of `x`; without `cond` there is nothing to guide towards."""
        if cond is None or self.scale == 1.0:
            return self.denoiser(x, logsnr, cond)
        if self._everywhere:
            return self._guided(x, logsnr, cond)
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        if not bool(inside.any()):
            return self.denoiser(x, logsnr, cond)
        if bool(inside.all()):
            return self._guided(x, logsnr, cond)
        # levels differ within the batch: the conditional answer stands where guidance is off
        conditional = self.denoiser(x, logsnr, cond)
        guided = torch.lerp(self.denoiser(x, logsnr, None), conditional, self.scale)
        return torch.where(broadcast_right(inside, x).bool(), guided, conditional)

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond) -> Tensor:
        unconditional = self.denoiser(x, logsnr, None)
        if self.scale == 0.0:
            return unconditional
        return torch.lerp(unconditional, self.denoiser(x, logsnr, cond), self.scale)
