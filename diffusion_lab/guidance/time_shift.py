r"""Time shift: ask the denoiser about the noise level that a sample has, not the one it ought to have.

The pixels of one image at log-SNR l have, in units where alpha^2 + sigma^2 = 1, about the variance

    var(l) = s^2 sigmoid(l) + sigmoid(-l),        s^2 the variance of the pixels of a clean image,

so a measured variance names a level l*, in closed form, and the denoiser is asked at

    l' = clip(l*, l - window / 2, l + window / 2)        where l < cutoff; at l itself elsewhere.

Sampling errors that made the sample too noisy or too clean are so seen by the network for what they are. The paper
leaves s^2 out (s = 0), which holds at the noise end, and searches a window of time steps; and it puts the coefficients
of the shifted step into its update, where here the sampler keeps its own and rebuilds eps from the x0 it gets.

References:
    Li et al., "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps", 2024, theorem
    3.1 and algorithm 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class TimeShift:
    """A denoiser that is asked at the noise level measured on each sample.

    Args:
        denoiser: The denoiser.
        window: Largest shift, up and down together, in log-SNR; 0 is off.
        cutoff: Log-SNR above which nothing is shifted.
        data_variance: s^2, in [0, 1).

    Raises:
        ValueError: If `window` is negative or `data_variance` is outside [0, 1).
    """

    def __init__(
        self, denoiser: DenoiserFn, window: float = 0.5, cutoff: float = -1.0, data_variance: float = 0.0
    ) -> None:
        if window < 0.0 or not 0.0 <= data_variance < 1.0:
            raise ValueError(
                f"TimeShift needs window >= 0 and 0 <= data_variance < 1, got {window}, {data_variance}"
            )
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.denoiser, self.window, self.cutoff = denoiser, window, cutoff
        self.data_variance = data_variance

    def shifted(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Return the levels l' `(B,)` for samples `x` `(B, *D)` at `logsnr` `(B,)`."""
        alpha, sigma = self.interpolant(logsnr)
        measured = x.flatten(1).var(dim=1).to(logsnr.dtype) / (alpha**2 + sigma**2)
        noise = (measured - self.data_variance) / (1.0 - self.data_variance)
        # a variance that no level has lies beyond the window anyhow
        measured_logsnr = -torch.logit(noise, eps=1e-12)
        shifted = torch.clamp(measured_logsnr, logsnr - self.window / 2, logsnr + self.window / 2)
        return torch.where((logsnr < self.cutoff) & torch.isfinite(logsnr), shifted, logsnr)

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0_hat of the shape of `x`, which needs two numbers a sample at least, and levels `(B,)`."""
        if self.window == 0.0 or x[0].numel() < 2:
            return self.denoiser(x, logsnr, cond)
        level = self.shifted(x, logsnr)
        (a, s), (a2, s2) = self.interpolant(logsnr), self.interpolant(level)
        # the same sample at the length that the process gives it at l'
        length = torch.sqrt((a2**2 + s2**2) / (a**2 + s**2))
        return self.denoiser(broadcast_right(length, x) * x, level, cond)
