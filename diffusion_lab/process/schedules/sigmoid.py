r"""The sigmoid schedule: alpha^2 follows a piece of the logistic curve.

References:
    Chen, "On the Importance of Noise Scheduling for Diffusion Models", 2023, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules.base import check_range


def _log_sigmoid_slope(z: Tensor) -> Tensor:
    """Log of sigmoid'(z) = sigmoid(z) sigmoid(-z)."""
    return F.logsigmoid(z) + F.logsigmoid(-z)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Chen's sigmoid schedule: alpha^2 = (g(end) - g(z)) / (g(end) - g(start)), g(z) = sigmoid(z / tau).

    As z goes from start to end, alpha falls from 1 to 0, log-SNR from +inf to -inf; u covers the part between
    logsnr_max and logsnr_min.

    Raises:
        ValueError: If the range is empty, `start >= end`, or `tau` is not positive.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self) -> None:
        check_range(self.logsnr_min, self.logsnr_max)
        if not (self.start < self.end and self.tau > 0.0):
            raise ValueError("Sigmoid needs start < end and tau > 0")

    @property
    def _levels(self) -> tuple[float, float]:
        low, high = (
            1.0 / (1.0 + math.exp(-self.start / self.tau)),
            1.0 / (1.0 + math.exp(-self.end / self.tau)),
        )
        return low, high

    def _z(self, logsnr: Tensor) -> Tensor:
        low, high = self._levels
        # g(z) = g(start) + sigma^2 (g(end) - g(start)), sigma^2 = sigmoid(-logsnr)
        return self.tau * torch.logit(low + torch.sigmoid(-logsnr) * (high - low))

    @property
    def _z_ends(self) -> tuple[float, float]:
        ends = self._z(torch.tensor([self.logsnr_max, self.logsnr_min], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._levels
        z0, z1 = self._z_ends
        g = torch.sigmoid((z0 + u * (z1 - z0)) / self.tau)
        return torch.log(high - g) - torch.log(g - low)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        z0, z1 = self._z_ends
        return (self._z(logsnr) - z0) / (z1 - z0)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`: du/dlogsnr = sigma^2 alpha^2 (g(end) - g(start)) tau / (g'(z) (z1 - z0))."""
        low, high = self._levels
        z0, z1 = self._z_ends
        constant = math.log(self.tau * (high - low) / (z1 - z0))
        return constant + _log_sigmoid_slope(logsnr) - _log_sigmoid_slope(self._z(logsnr) / self.tau)
