r"""Schedules told in EDM's noise level sigma = exp(-logsnr / 2), the noise-to-signal ratio.

    Karras        sigma^(1/rho) linear in u: the sampling grid
    LogNormal     ln sigma ~ N(mean, std^2): the training density
    LogitNormal   the same family told in rectified flow's time

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, eq. 5 and table 1.
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Karras:
    """EDM's sampling grid as a schedule: sigma^(1/rho) linear in u, with EDM's noise level sigma = exp(-logsnr / 2).

    Raises:
        ValueError: If the noise levels are not 0 < sigma_min < sigma_max or rho is not positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0.0 < self.sigma_min < self.sigma_max and self.rho > 0.0):
            raise ValueError("Karras needs 0 < sigma_min < sigma_max and rho > 0")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1.0 / self.rho), self.sigma_max ** (1.0 / self.rho)

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._ends
        return -2.0 * self.rho * torch.log(low + u * (high - low))

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._ends
        return (torch.exp(-0.5 * logsnr / self.rho) - low) / (high - low)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._ends
        return -0.5 * logsnr / self.rho - math.log(2.0 * self.rho * (high - low))


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """EDM's training density: ln sigma ~ N(mean, std^2), that is logsnr ~ N(-2 mean, (2 std)^2). Unbounded.

    Raises:
        ValueError: If `std` is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0.0:
            raise ValueError(f"{type(self).__name__} needs std > 0, got {self.std}")

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        return -2.0 * (self.mean + self.std * torch.special.ndtri(u))

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.special.ndtr((-0.5 * logsnr - self.mean) / self.std)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        z = (-0.5 * logsnr - self.mean) / self.std
        return -0.5 * z**2 - math.log(2.0 * self.std * math.sqrt(2.0 * math.pi))


@dataclass(frozen=True, kw_only=True)
class LogitNormal(LogNormal):
    """SD3's training density: logit(s) ~ N(mean, std^2) for the rectified-flow time s.

    Under rectified flow s = sigma = sigmoid(-logsnr / 2), so logit(s) = -logsnr / 2 = ln(sigma / alpha): the same
    family as `LogNormal`, told in the flow's words and with its defaults.
    """

    mean: float = 0.0
    std: float = 1.0
