r"""Linear schedules: linear in log-SNR (VDM), and linear in beta (DDPM, the VP SDE).

References:
    Kingma et al., "Variational Diffusion Models", 2021 (linear log-SNR).
    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020; Song et al., "Score-Based Generative Modeling
    through Stochastic Differential Equations", 2021, appendix B (linear beta, in continuous time).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules.base import check_range


@dataclass(frozen=True, kw_only=True)
class LinearLogSNR:
    """logsnr(u) = logsnr_max - u (logsnr_max - logsnr_min): uniform in log-SNR. VDM uses -5 to 13.3.

    Raises:
        ValueError: If the range is empty or infinite.
    """

    logsnr_min: float = -5.0
    logsnr_max: float = 13.3

    def __post_init__(self) -> None:
        check_range(self.logsnr_min, self.logsnr_max)
        if not math.isfinite(self.logsnr_max - self.logsnr_min):
            raise ValueError("LinearLogSNR needs a finite range")

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.logsnr_max - u * (self.logsnr_max - self.logsnr_min)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return (self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.full_like(logsnr, -math.log(self.logsnr_max - self.logsnr_min))


@dataclass(frozen=True, kw_only=True)
class LinearBeta:
    """DDPM's linear beta in continuous time (the VP SDE): alpha^2 = exp(-B), B(s) = b0 s + (b1 - b0) s^2 / 2.

    With alpha^2 + sigma^2 = 1, logsnr = -log(expm1(B)). At s = 0 it is infinite, so u runs over s in [s_min, 1];
    s_min = 1e-3 is DDPM's first of 1000 steps, score-SDE trains down to 1e-5.

    Args:
        beta_min: b0; DDPM's 1e-4 a step times 1000 steps.
        beta_max: b1; DDPM's 0.02 a step times 1000 steps.
        s_min: Smallest s, in (0, 1).

    Raises:
        ValueError: If a parameter is out of its range.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    s_min: float = 1e-3

    def __post_init__(self) -> None:
        if not (0.0 <= self.beta_min < self.beta_max and 0.0 < self.s_min < 1.0):
            raise ValueError("LinearBeta needs 0 <= beta_min < beta_max and 0 < s_min < 1")

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        s = self.s_min + u * (1.0 - self.s_min)
        B = s * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * s)
        # log(expm1(B)) without overflow: B + log(1 - exp(-B))
        return -(B + torch.log(-torch.expm1(-B)))

    def _s(self, B: Tensor) -> Tensor:
        # the positive root of (b1 - b0)/2 s^2 + b0 s - B, in a form without cancellation, inf / inf or 0 / 0
        ratio = self.beta_min / B if self.beta_min > 0.0 else torch.zeros_like(B)
        return 2.0 / (ratio + torch.sqrt(ratio**2 + 2.0 * (self.beta_max - self.beta_min) / B))

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return (self._s(F.softplus(-logsnr)) - self.s_min) / (1.0 - self.s_min)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`; dlogsnr/ds = -B'(s) / (1 - exp(-B)) and 1 - exp(-B) = sigmoid(-logsnr)."""
        s = self._s(F.softplus(-logsnr))
        slope = self.beta_min + (self.beta_max - self.beta_min) * s
        return F.logsigmoid(-logsnr) - torch.log(slope) - math.log(1.0 - self.s_min)
