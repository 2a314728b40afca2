r"""iDDPM's hybrid loss: the mean learns by denoising, the variance of the reverse step by the variational bound.

    loss_i = ½ w/p |eps - eps_hat|^2  +  lambda_vlb L_vlb,      L_vlb = T L_i,    i uniform in 1 .. T

at the levels t_i = i / T of the schedule, i-th step from t = t_i to s = t_(i-1). In L_vlb the gradient of the mean is
stopped, and the denoising loss does not see the variance, so each half of the network's output learns from one term.

For i > 1, L_i is the KL divergence of two Gaussians, of q(x_s | x_t, x0) from p(x_s | x_t). With the variance
var = var_lower exp(D), D = c ln(sigma_t^2 / sigma_s^2), and var_lower = (1 - SNR_t / SNR_s) sigma_s^2,

    L_i = ½ [ exp(-D) - 1 + D + (SNR_s / SNR_t - 1) exp(-D) (eps - eps_hat)^2 ]

(sigma of the variance-preserving process, the only coordinates in it; the length of x drops out). For i = 1 it is
-log p(x0 | x_1), the probability of the bin of x0 under N(x0_hat, var): bins of width 2 / (grey_levels - 1) about the
grey levels, the outermost reaching to infinity, no probability below 1e-12. There var_lower would be zero; as in the
published code it is that of the second step, and var_upper = sigma_1^2.

L_vlb is in nats and a mean over the dimensions, as all losses of the house. The paper's weight 0.001 is for an L_simple
without our ½ and, in the published code, an L_vlb in bits: the same ratio is lambda_vlb = 0.001 / (2 ln 2) = 7.2e-4.

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 4-7 (L_vlb), 15 (variance), 16.
    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, eq. 13 (the decoder).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoisers.learned_variance import LearnedVarianceDenoiser, VarianceOutput
from diffusion_lab.losses.denoising import DenoisingLoss, level_for, raw_residual
from diffusion_lab.losses.noise_levels import U_MARGIN, DiscreteNoiseLevels
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn

SMALLEST_PROBABILITY = 1e-12


def step_kl(fraction: Tensor, squared_error: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
    """Return KL(q(x_next | x, x0) || p(x_next | x)) of each element, in nats, like `fraction`.

    Args:
        fraction: c, `(B, *D)`.
        squared_error: (eps - eps_hat)^2, `(B, *D)`.
        logsnr: Level of x, `(B,)`, finite.
        logsnr_next: The cleaner level, `(B,)`, finite.
    """
    upper_to_lower = F.logsigmoid(-logsnr) - F.logsigmoid(-logsnr_next)
    D = fraction * broadcast_right(upper_to_lower, fraction)
    gain = broadcast_right(torch.expm1(logsnr_next - logsnr), fraction)
    return 0.5 * (torch.expm1(-D) + D + gain * torch.exp(-D) * squared_error)


def normal_cdf(z: Tensor) -> Tensor:
    """Return P(N(0, 1) < z); unlike `torch.special.ndtr`, which is 1 + erf, it keeps its digits in the lower tail."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def bin_nll(x0: Tensor, mean: Tensor, log_var: Tensor, grey_levels: int) -> Tensor:
    """Return -log P of the bin of each element of `x0` in [-1, 1] under N(mean, exp(log_var)), in nats.

    Args:
        x0: Data at `grey_levels` equally spaced values from -1 to 1, `(B, *D)`.
        mean: Of the Gaussian, like `x0`.
        log_var: Logarithm of its variance, like `x0`.
        grey_levels: Number of bins.
    """
    half = 1.0 / (grey_levels - 1)
    std = torch.exp(0.5 * log_var)
    above, below = (x0 - mean + half) / std, (x0 - mean - half) / std
    # far above the mean both ends of the bin have probability 1 to all digits; mirrored, they keep them
    far = x0 > mean
    high, low = torch.where(far, -below, above), torch.where(far, -above, below)
    inside = normal_cdf(high) - normal_cdf(low)
    probability = torch.where(
        x0 < -1.0 + half,
        normal_cdf(above),
        torch.where(x0 > 1.0 - half, normal_cdf(-below), inside),
    )
    return -torch.log(probability.clamp(min=SMALLEST_PROBABILITY))


class HybridLoss(DenoisingLoss):
    """Denoising loss plus the variational bound of a learned variance; see the module.

    Levels that are given, not drawn, need not be among the T: the step leads from them to 1 / T less of the schedule's
    u, and from below 1.5 / T to the data.

    Args:
        schedule: Its levels at u = 1/T, 2/T, ..., 1 are the steps.
        weighting: Of the denoising term, in eps units; `EpsMSE` for the paper's L_simple.
        label_dropout: Probability of hiding an example's label.
        steps: T, at least 2.
        lambda_vlb: Weight of the bound.
        grey_levels: Values that the data can take, 256 for 8-bit images.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        label_dropout: float = 0.0,
        steps: int = 1000,
        lambda_vlb: float = 7.2e-4,
        grey_levels: int = 256,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if steps < 2 or lambda_vlb < 0.0 or grey_levels < 2:
            raise ValueError(
                "HybridLoss needs steps >= 2, lambda_vlb >= 0 and grey_levels >= 2, got "
                f"{steps}, {lambda_vlb} and {grey_levels}"
            )
        self.steps, self.lambda_vlb, self.grey_levels = steps, lambda_vlb, grey_levels
        self.noise_levels = DiscreteNoiseLevels(schedule=schedule, steps=steps)

    def _level(self, u: Tensor) -> Tensor:
        return self.schedule(u.clamp(U_MARGIN, 1.0 - U_MARGIN))

    def bound(
        self, fraction: Tensor, squared_error: Tensor, x0_hat: Tensor, x0: Tensor, logsnr: Tensor
    ) -> Tensor:
        """Return L_vlb = T L_i of each example in nats per dimension, `(B,)`.

        Args:
            fraction: c, `(B, *D)`.
            squared_error: (eps - eps_hat)^2, `(B, *D)`.
            x0_hat: E[x0 | x], `(B, *D)`.
            x0: Clean data, `(B, *D)`.
            logsnr: `(B,)` levels of the schedule.
        """
        logsnr = logsnr.double()
        t = self.schedule.inverse(logsnr)
        last = t < 1.5 / self.steps
        # each formula sees harmless levels in the rows that are the other's
        kl = step_kl(
            fraction, squared_error, logsnr, torch.where(last, logsnr, self._level(t - 1.0 / self.steps))
        )
        first = torch.where(last, t, 1.0 / self.steps)
        l1, l2 = self._level(first), self._level(first + 1.0 / self.steps)
        log_upper, shrink = F.logsigmoid(-l1), torch.log(-torch.expm1(l2 - l1))
        log_var = broadcast_right(log_upper, x0) + (1.0 - fraction) * broadcast_right(shrink, x0)
        nll = bin_nll(x0, x0_hat, log_var, self.grey_levels)
        per_element = torch.where(broadcast_right(last.to(x0.dtype), x0).bool(), nll, kl)
        return self.steps * per_element.flatten(1).mean(1)

    def example_losses(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        eps: Tensor,
        logsnr: Tensor,
        factor: Tensor,
        cond: Cond | None,
        rng: StepRNG,
    ) -> Tensor:
        """See `DenoisingLoss.example_losses`.

        Raises:
            ValueError: If the denoiser learns no variance.
        """
        if not isinstance(denoiser, LearnedVarianceDenoiser):
            raise ValueError("HybridLoss needs a LearnedVarianceDenoiser (method=iddpm)")
        level = level_for(x0, logsnr)
        output = denoiser.predict(marginal(denoiser.interpolant, x0, eps, level), level, cond)
        assert isinstance(output, VarianceOutput)
        error, scale = raw_residual(denoiser, output.raw, x0, eps, logsnr)
        simple = factor * (scale * error.square().flatten(1).mean(1))
        squared_error = broadcast_right(scale, x0) * error.detach().square()
        bound = self.bound(output.fraction, squared_error, output.x0.detach(), x0, logsnr)
        return simple + self.lambda_vlb * bound
