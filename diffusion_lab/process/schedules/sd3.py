r"""Densities of rectified flow's time that SD3 compares, told as schedules.

The flow's time t = sigma = sigmoid(-logsnr / 2) is 0 at data and 1 at noise; a schedule is t as a function of u.

    uniform         t = u                                              `ModeSampling(scale=0.0)`
    logit-normal    logit(t) ~ N(mean, std^2)                          `LogitNormal`
    mode            t = u + scale (u - sin(pi u / 2)^2)                `ModeSampling`
    cosmap          t = tan(pi u / 2) / (1 + tan(pi u / 2))            unbounded `Cosine`: logsnr = -2 ln tan(pi u / 2)
    shifted         t -> shift t / (1 + (shift - 1) t)                 `ShiftedFlow`, of any of them

Mode sampling puts more (scale > 0) or less (scale < 0) weight on the middle while neither end loses its density:

    dt/du = 1 + scale (1 - (pi / 2) sin(pi u)),

which is 1 + scale at the ends and positive everywhere for -1 < scale < 2 / (pi - 2) = 1.75.

The shift is that of a larger image: its many neighbouring pixels agree, so at the same t less of it is hidden. With m
pixels in place of n the same uncertainty is found at shift = sqrt(m / n), the ratio of the sides. Since the odds
t / (1 - t) are multiplied by `shift`, it is a plain move in log-SNR, by -2 ln shift: simple diffusion's shift.

References:
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, section 3.1 (mode
        sampling, CosMap), section 5.3.2, eq. 23 (the shift). Their u runs from noise to data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules.base import Schedule


@dataclass(frozen=True, kw_only=True)
class ModeSampling:
    """t = u + scale (u - sin(pi u / 2)^2) in rectified flow's time: mode sampling with heavy tails. Unbounded.

    The inverse has no closed form; it is found by bisection to the last bit of float64.

    Args:
        scale: More weight on the middle, in (-1, 2 / (pi - 2)); 0 is uniform in t, 1.29 customary.

    Raises:
        ValueError: If `scale` is outside that range.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1.0 < self.scale < 2.0 / (math.pi - 2.0):
            raise ValueError(f"ModeSampling needs -1 < scale < 2 / (pi - 2), got {self.scale}")

    def _t(self, u: Tensor) -> Tensor:
        return (1.0 + self.scale) * u - self.scale * torch.sin(0.5 * math.pi * u) ** 2

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`; 1 - t(u) = t(1 - u)."""
        return 2.0 * (torch.log(self._t(1.0 - u)) - torch.log(self._t(u)))

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`; 60 halvings in float64, on the side where t or 1 - t is small and keeps its digits."""
        half = 0.5 * logsnr.double().abs()
        target = 1.0 / (1.0 + torch.exp(half))
        low, high = torch.zeros_like(target), torch.full_like(target, 0.5)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self._t(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # the lower end, which is exactly 0 at infinite log-SNR
        return torch.where(logsnr > 0, low, 1.0 - low).to(logsnr.dtype)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`: p = (du/dt) |dt/dlogsnr|, and dt/dlogsnr = -t (1 - t) / 2."""
        slope = 1.0 + self.scale * (1.0 - 0.5 * math.pi * torch.sin(math.pi * self.inverse(logsnr.double())))
        half = 0.5 * logsnr
        return F.logsigmoid(half) + F.logsigmoid(-half) - math.log(2.0) - torch.log(slope).to(logsnr.dtype)


@dataclass(frozen=True, kw_only=True)
class ShiftedFlow:
    """`base` with t -> shift t / (1 + (shift - 1) t) in rectified flow's time: logsnr - 2 ln shift.

    Args:
        base: Any schedule; its density is moved with it.
        shift: Above 1 for more noise: the ratio of the image's side to that for which `base` is right. SD3 takes 3 for
            1024 pixels, by human preference.

    Raises:
        ValueError: If `shift` is not positive.
    """

    base: Schedule
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"ShiftedFlow needs a positive shift, got {self.shift}")

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.base(u) - 2.0 * math.log(self.shift)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.base.inverse(logsnr + 2.0 * math.log(self.shift))

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.base.log_density(logsnr + 2.0 * math.log(self.shift))
