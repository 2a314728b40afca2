"""Guiding where the noise level is inside an interval, and paying for guidance only there.

The interval is closed: EDM's (sigma_low, sigma_high] is -2 ln sigma_high <= logsnr <= -2 ln sigma_low but for sigma_low
itself, which is guided here. Where levels differ within a batch, both answers are made for all of it.

References:
    Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", 2024, eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right

EVERYWHERE = (-math.inf, math.inf)


class Interval:
    """The log-SNRs low <= logsnr <= high.

    Args:
        ends: `(low, high)`.

    Raises:
        ValueError: If there are not two ends, or they are not ordered.
    """

    def __init__(self, ends: Sequence[float]) -> None:
        if len(ends) != 2:
            raise ValueError(f"a guidance interval is two log-SNRs, [low, high], got {list(ends)}")
        low, high = ends
        if not low <= high:
            raise ValueError(f"a guidance interval needs low <= high, got {low} and {high}")
        self.low, self.high = float(low), float(high)
        self._everywhere = math.isinf(self.low) and math.isinf(self.high) and self.low < self.high

    def __call__(
        self, x: Tensor, logsnr: Tensor, outside: Callable[[], Tensor], inside: Callable[[], Tensor]
    ) -> Tensor:
        """Return `inside()` where the levels are in the interval, `outside()` elsewhere; call one where one will do.

        Args:
            x: Noisy samples `(B, *D)`.
            logsnr: Their levels, `x.shape[:k]`, or 0-d.
            outside: Makes the answer without guidance, of the shape of `x`.
            inside: Makes the guided answer.
        """
        if self._everywhere:
            return inside()
        within = (logsnr >= self.low) & (logsnr <= self.high)
        if not bool(within.any()):
            return outside()
        if bool(within.all()):
            return inside()
        # levels differ within the batch
        return torch.where(broadcast_right(within, x).bool(), inside(), outside())
