r"""Autoguidance: guide a model with a bad version of itself.

    x0_hat = x0_weak + scale (x0 - x0_weak)        for logsnr in [low, high]
    x0_hat = x0                                    elsewhere, without calling the weak model

The weak model is the same model made worse in the way that the good one is still bad: smaller, or trained for less
long, and told the same condition. Where both err alike the difference is small; where the weak one errs more it points
away from the error. So quality rises and the classes keep their variety, which guidance by an unconditional model
trades for it; and it works without conditions. scale = 1 is the model and scale = 0 the weak model, both to the bit
and with one call.

The weak model may live in another interpolant. At one log-SNR they are one process up to the length of x, so it is
asked about

    x_weak = x sqrt((alpha_weak^2 + sigma_weak^2) / (alpha^2 + sigma^2)).

A process that explodes has no x at logsnr = -inf; there it is asked at `LOWEST`, where x still is nothing but noise.

References:
    Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, eq. 3 with D_0 the weak model and
    section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.guidance.interval import EVERYWHERE, Interval
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of

# signal to noise of e^-30 in amplitude, and sigma^2 = 1e26 still is a float32
LOWEST = -60.0


class AutoGuidance:
    """A denoiser guided away from a weaker one. Two evaluations, one of each; one at scale 0 or 1.

    Args:
        denoiser: The denoiser.
        weak: The weak denoiser of the same data, in any interpolant. It is given the same conditions.
        scale: Guidance scale; 1 is off.
        interval: `(low, high)`: guide where low <= logsnr <= high.

    Raises:
        ValueError: If the interval is not ordered, or `weak` is no denoiser.
    """

    def __init__(
        self, denoiser: DenoiserFn, weak: DenoiserFn, scale: float, interval: Sequence[float] = EVERYWHERE
    ) -> None:
        if not callable(weak) or not hasattr(weak, "interpolant"):
            raise ValueError(f"{type(self).__name__} needs a weak denoiser, with an interpolant, got {weak}")
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.weak, self.scale = denoiser, weak, scale
        self.interval = Interval(interval)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0_hat, of the shape of `x`."""
        if self.scale == 1.0:
            return self.denoiser(x, logsnr, cond)
        return self.interval(
            x, logsnr, lambda: self.denoiser(x, logsnr, cond), lambda: self._guided(x, logsnr, cond)
        )

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        weak = self._ask_weak(x, logsnr, cond)
        return weak if self.scale == 0.0 else torch.lerp(weak, self.denoiser(x, logsnr, cond), self.scale)

    def _ask_weak(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        if self.weak.interpolant == self.interpolant:
            return self.weak(x, logsnr, cond)
        level = logsnr.clamp_min(LOWEST)
        (a, s), (a_weak, s_weak) = self.interpolant(level), self.weak.interpolant(level)
        length = torch.sqrt((a_weak**2 + s_weak**2) / (a**2 + s**2))
        return self.weak(broadcast_right(length, x) * x, level, cond)
