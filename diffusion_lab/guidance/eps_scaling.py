r"""Epsilon scaling: shrink the predicted noise a little, against exposure bias.

    eps -> eps / k,    that is    x0 -> x0 / k + (1 - 1 / k) x / alpha

In training the network sees x made of real x0; in sampling it sees its own earlier answers, and its noise prediction
comes out too long. Dividing it by a k slightly above 1 (1.004 to 1.02, more for fewer steps) brings its length back.
The paper's schedule k(t) = k t + b works best almost flat, and the constant b is what it recommends; so is this.

Towards pure noise x / alpha has no bound, and there the network's eps is x itself, which is right: scaling begins at
the log-SNR `low`.

References:
    Ning et al., "Elucidating the Exposure Bias in Diffusion Models", 2024, section 5 and eq. 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class EpsScaling:
    """A denoiser whose noise prediction is divided by a constant.

    Args:
        denoiser: The denoiser.
        scale: k; 1 is off.
        low: Log-SNR from which the noise is scaled, finite.

    Raises:
        ValueError: If `scale` is not positive or `low` is not finite.
    """

    def __init__(self, denoiser: DenoiserFn, scale: float = 1.005, low: float = -6.0) -> None:
        if not scale > 0.0:
            raise ValueError(f"EpsScaling needs scale > 0, got {scale}")
        if not -float("inf") < low < float("inf"):
            raise ValueError(f"EpsScaling needs a finite low, got {low}: alpha is 0 at pure noise")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.scale, self.low = denoiser, scale, low

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0_hat belonging to the scaled noise, of the shape of `x`."""
        x0 = self.denoiser(x, logsnr, cond)
        if self.scale == 1.0:
            return x0
        alpha, _ = self.interpolant(logsnr)
        # a zero weight where scaling is off, with a divisor that is no zero
        on = logsnr >= self.low
        weight = on.to(alpha.dtype) * (1.0 - 1.0 / self.scale)
        drift = broadcast_right(weight / torch.where(on, alpha, torch.ones_like(alpha)), x) * x
        return (1.0 - broadcast_right(weight, x)) * x0 + drift
