r"""Loss weightings w(logsnr), all in the same unit: that of the squared error in eps.

    L = ½ E_{logsnr ~ p} [ w(logsnr) / p(logsnr) |eps - eps_hat|^2 ]  =  ½ ∫ w(logsnr) |eps - eps_hat|^2 dlogsnr

w is the objective; the density p with which noise levels are drawn only changes the variance of the estimate. Weights
stated for other predictions are converted by (s = SNR = exp(logsnr))

    |eps_err|^2 = s |x0_err|^2 = |v_err|^2 / (1 + 1/s) = |velocity_err|^2 / (1 + 1/sqrt(s))^2.

Losses of the form "plain mean squared error at the noise levels that the schedule draws" have no w without their
schedule: for them w contains its density p, so that w / p is the factor they put before the eps error when trained
with it.

    ELBO            1                                   Kingma et al. 2021
    EpsMSE = SNR    p                                   Ho et al. 2020: |eps_err|^2 = s |x0_err|^2
    VMSE            p (1 + 1/s)                         Salimans & Ho 2022: |v_err|^2 = (s + 1) |x0_err|^2
    VelocityMSE     p (1 + 1/sqrt(s))^2                 Liu et al. 2022
    TruncatedSNR    p max(1, 1/s)                       Salimans & Ho 2022: max(s, 1) |x0_err|^2
    MinSNR          p min(1, gamma / s)                 Hang et al. 2023: min(s, gamma) |x0_err|^2
    P2              p / (k + s)^gamma                   Choi et al. 2022
    Sigmoid         sigmoid(bias - logsnr)              Kingma & Gao 2023; Hoogeboom et al. 2024
    EDM             p_LN (1/s + d^2) / d^2              Karras et al. 2022: p_LN log-normal, d = sigma_data
    EDMMonotonic    EDM's, its peak's below the peak    Kingma & Gao 2023

References:
    Kingma & Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", 2023, table 1 and
    appendix D (the unit, and most rows).
    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, eq. 14.
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, section 4.
    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, eq. 9.
    Choi et al., "Perception Prioritized Training of Diffusion Models", 2022, eq. 8.
    Hoogeboom et al., "Simpler Diffusion (SiD2)", 2024, section 3.1.
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, table 1.
    Liu et al., "Flow Straight and Fast", 2022, eq. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.process.schedules import LogNormal, Schedule


@runtime_checkable
class Weighting(Protocol):
    """A weight of the squared eps error as a function of log-SNR."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """Return w, positive, of the shape and dtype of `logsnr`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """w = 1: the variational bound, up to its end terms."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.ones_like(logsnr)


@dataclass(frozen=True, kw_only=True)
class EpsMSE:
    """w = p: plain squared error in eps at the levels of `schedule`; the same as SNR-weighted error in x0."""

    schedule: Schedule

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.exp(self.schedule.log_density(logsnr))


SNR = EpsMSE
"""SNR times the squared error in x0, which is `EpsMSE` by another name."""


@dataclass(frozen=True, kw_only=True)
class VMSE:
    """w = p (1 + 1/s): plain squared error in v; the same as SNR + 1 weighted error in x0."""

    schedule: Schedule

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        # 1 + exp(-logsnr) = 1 / sigmoid(logsnr)
        return torch.exp(self.schedule.log_density(logsnr) - F.logsigmoid(logsnr))


SNRPlusOne = VMSE
"""SNR + 1 times the squared error in x0, which is `VMSE` by another name."""


@dataclass(frozen=True, kw_only=True)
class VelocityMSE:
    """w = p (1 + 1/sqrt(s))^2: plain squared error in rectified flow's velocity eps - x0."""

    schedule: Schedule

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.exp(self.schedule.log_density(logsnr) - 2.0 * F.logsigmoid(0.5 * logsnr))


@dataclass(frozen=True, kw_only=True)
class TruncatedSNR:
    """w = p max(1, 1/s): max(SNR, 1) times the squared error in x0."""

    schedule: Schedule

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.exp(self.schedule.log_density(logsnr) + F.relu(-logsnr))


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """w = p min(1, gamma / s): min(SNR, gamma) times the squared error in x0."""

    schedule: Schedule
    gamma: float = 5.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.exp(self.schedule.log_density(logsnr)) * torch.exp(-logsnr).mul(self.gamma).clamp(
            max=1.0
        )


@dataclass(frozen=True, kw_only=True)
class P2:
    """w = p / (k + s)^gamma."""

    schedule: Schedule
    k: float = 1.0
    gamma: float = 1.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.exp(self.schedule.log_density(logsnr)) * (self.k + torch.exp(logsnr)) ** -self.gamma


@dataclass(frozen=True, kw_only=True)
class SigmoidWeighting:
    """w = sigmoid(bias - logsnr): falling, so a bound on augmented data. SiD2 lowers the bias as images grow."""

    bias: float = 0.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.sigmoid(self.bias - logsnr)


@dataclass(frozen=True, kw_only=True)
class EDMWeighting:
    """w = p_LN (1/s + d^2) / d^2, whatever density the levels are drawn with.

    Args:
        p_mean: Mean of ln sigma.
        p_std: Standard deviation of ln sigma.
        sigma_data: d, standard deviation of the data.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        log_density = LogNormal(mean=self.p_mean, std=self.p_std).log_density(logsnr)
        return torch.exp(log_density) * (torch.exp(-logsnr) / self.sigma_data**2 + 1.0)


@dataclass(frozen=True, kw_only=True)
class EDMMonotonic(EDMWeighting):
    """EDM's weighting, held at its highest value below its peak: falling, so a bound on augmented data.

    With the defaults the peak is at logsnr = -3.308. Kingma & Gao, "Understanding Diffusion Objectives as the ELBO with
    Simple Data Augmentation", 2023.

    Args:
        p_mean: Mean of ln sigma.
        p_std: Standard deviation of ln sigma.
        sigma_data: d, standard deviation of the data.
    """

    @property
    def peak(self) -> float:
        """The log-SNR at which EDM's weighting is largest."""
        return _edm_peak(self.p_mean, self.p_std, self.sigma_data)

    def __call__(self, logsnr: Tensor) -> Tensor:
        """See `Weighting`."""
        return super().__call__(logsnr.clamp(min=self.peak))


@lru_cache(maxsize=64)
def _edm_peak(p_mean: float, p_std: float, sigma_data: float) -> float:
    """Return the argmax of log w = log p_LN + log(1 + exp(-logsnr) / d²).

    Its derivative is -(logsnr - mu) / s² - sigmoid(-logsnr - 2 log d) for logsnr ~ N(mu, s²), so the peak is between
    mu - s² and mu. For s > 2 there may be two: the higher is taken on a grid, and refined where the derivative changes
    sign.
    """
    mu, variance = -2.0 * p_mean, (2.0 * p_std) ** 2
    shift = 2.0 * math.log(sigma_data)
    grid = torch.linspace(mu - variance, mu, 4097, dtype=torch.float64)
    log_w = -0.5 * (grid - mu) ** 2 / variance + F.softplus(-grid - shift)
    best = int(log_w.argmax())
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 4096)])
    for _ in range(60):
        middle = 0.5 * (low + high)
        rises = -(middle - mu) / variance > 1.0 / (1.0 + math.exp(middle + shift))
        low, high = (middle, high) if rises else (low, middle)
    return 0.5 * (low + high)
