r"""Improved DDPM's cosine schedule, with its offset: a little noise at the clean end.

    alpha^2(u) = cos^2 theta(u) / cos^2 theta(0),      theta(u) = (u + s) / (1 + s) pi / 2,      alpha^2 + sigma^2 = 1

With s = 0 it is the plain cosine, alpha = cos(pi u / 2), whose first steps of many add next to no noise; hence s. At
u = 0 log-SNR is infinite, at u = 1 it is minus infinity, so u runs over the part between two bounds; the published code
bounds beta by 0.999 instead, which moves nothing but the last few steps.

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules.base import check_range


@dataclass(frozen=True, kw_only=True)
class OffsetCosine:
    """Cosine schedule with offset s, between two finite bounds.

    Args:
        offset: s, positive.
        logsnr_min: Lower end.
        logsnr_max: Upper end.

    Raises:
        ValueError: If the offset is not positive, or the range is empty or infinite.
    """

    offset: float = 0.008
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self) -> None:
        check_range(self.logsnr_min, self.logsnr_max)
        if self.offset <= 0.0 or not math.isfinite(self.logsnr_max - self.logsnr_min):
            raise ValueError("OffsetCosine needs offset > 0 and a finite range")

    @property
    def _start(self) -> float:
        """theta(0)."""
        return self.offset / (1.0 + self.offset) * math.pi / 2.0

    def _angle(self, logsnr: Tensor) -> Tensor:
        """Theta where alpha^2 = sigmoid(logsnr).

        sin^2 theta = sin^2 theta(0) + sigma^2 cos^2 theta(0), a sum of positive numbers: no digits are lost near u = 0.
        """
        sine = math.sin(self._start) ** 2 + torch.sigmoid(-logsnr) * math.cos(self._start) ** 2
        cosine = torch.sigmoid(logsnr) * math.cos(self._start) ** 2
        return torch.atan2(sine.sqrt(), cosine.sqrt())

    def _ends(self) -> tuple[float, float]:
        """Theta at u = 0 and u = 1 of the bounded schedule."""
        ends = torch.tensor([self.logsnr_max, self.logsnr_min], dtype=torch.float64)
        first, last = self._angle(ends).tolist()
        return first, last

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`; sigma^2 / alpha^2 = sin(theta - theta0) sin(theta + theta0) / cos^2 theta."""
        first, last = self._ends()
        theta = first + u * (last - first)
        return 2.0 * torch.log(torch.cos(theta)) - torch.log(
            torch.sin(theta - self._start) * torch.sin(theta + self._start)
        )

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        first, last = self._ends()
        return (self._angle(logsnr) - first) / (last - first)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`; sin 2 theta dtheta = d sin^2 theta = -alpha^2 sigma^2 cos^2 theta0 dlogsnr."""
        first, last = self._ends()
        slope = math.log(math.cos(self._start) ** 2 / (last - first))
        return (
            F.logsigmoid(logsnr)
            + F.logsigmoid(-logsnr)
            + slope
            - torch.log(torch.sin(2.0 * self._angle(logsnr)))
        )
