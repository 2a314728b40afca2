r"""The denoising loss, for any weighting, schedule, prediction type and interpolant.

    logsnr ~ p (the schedule's density),     x = alpha x0 + sigma eps,
    loss_i = ½ w(logsnr) / p(logsnr) · mean over the data's dimensions of |eps - eps_hat|^2

For a network the squared error is taken on its own output F, where no digits are lost at either end of the schedule,
and exchanged by |eps - eps_hat|^2 = scale |F - F*|^2 (`denoisers.prediction`). Any other denoiser is judged by its
x0: |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2.

It is the mean, not the sum, over the dimensions, so that a learning rate means the same for any image size; bounds in
nats multiply by the number of dimensions.

References:
    Kingma & Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", 2023, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.denoisers.prediction import eps_error_scale, target
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What a loss returns.

    Attributes:
        total: What is differentiated, 0-d.
        per_example: Loss of each example, `(B,)`; `total` is its mean.
        logsnr: Noise level of each example, `(B,)`.
    """

    total: Tensor
    per_example: Tensor
    logsnr: Tensor


def eps_error(
    denoiser: DenoiserFn, x0: Tensor, eps: Tensor, logsnr: Tensor, cond: Cond | None = None
) -> Tensor:
    """Return the mean over the data's dimensions of |eps - eps_hat|^2 at `logsnr` `(B,)`, of shape `(B,)`."""
    logsnr = logsnr.to(x0.dtype) if x0.dtype == torch.float64 else logsnr.float()
    x = marginal(denoiser.interpolant, x0, eps, logsnr)
    alpha, sigma = denoiser.interpolant(logsnr)
    if isinstance(denoiser, NetworkDenoiser):
        raw = denoiser.predict(x, logsnr, cond).raw
        error = raw - target(denoiser.prediction, x0, eps, alpha, sigma)
        scale = eps_error_scale(denoiser.prediction, alpha, sigma)
    else:
        error = denoiser(x, logsnr, cond) - x0
        scale = (alpha / sigma) ** 2
    return scale * error.square().flatten(1).mean(1)


class DenoisingLoss(nn.Module):
    """Weighted denoising loss of a batch.

    Args:
        schedule: Its density draws the noise levels.
        weighting: The objective, in eps units.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: If `label_dropout` is outside [0, 1].
    """

    def __init__(self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}")
        self.schedule, self.weighting, self.label_dropout = schedule, weighting, label_dropout
        self.noise_levels = NoiseLevels(schedule=schedule)

    def forward(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        logsnr: Tensor | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Args:
            denoiser: What is judged.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows; its device must be that of `x0`.
            logsnr: `(B,)` levels to use instead of drawing them, for loss by noise level; still weighted by w / p.
        """
        if logsnr is None:
            logsnr, log_density = self.noise_levels(rng)
        else:
            log_density = self.schedule.log_density(logsnr)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        ratio = self.weighting(logsnr) * torch.exp(-log_density)
        per_example = 0.5 * ratio.to(x0.dtype) * eps_error(denoiser, x0, eps, logsnr, cond)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
