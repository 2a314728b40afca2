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
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.denoisers.prediction import eps_error_scale, target
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.process.schedules.adaptive import AdaptiveSchedule
from diffusion_lab.process.schedules.learned import LearnedCurve
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What a loss returns.

    Attributes:
        total: What is differentiated, 0-d.
        per_example: Loss of each example, `(B,)`, to compare and to plot; `total` is its mean, unless the loss that
            returns it says otherwise.
        logsnr: Noise level of each example, `(B,)`.
    """

    total: Tensor
    per_example: Tensor
    logsnr: Tensor


def level_for(x0: Tensor, logsnr: Tensor) -> Tensor:
    """Return `logsnr` in the precision that coefficients for `x0` need: float32, float64 where `x0` is."""
    return logsnr.to(x0.dtype) if x0.dtype == torch.float64 else logsnr.float()


def raw_residual(
    denoiser: NetworkDenoiser, raw: Tensor, x0: Tensor, eps: Tensor, logsnr: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the error of a network's own output, and its exchange rate to eps.

    Args:
        denoiser: Whose output it is.
        raw: F, `(B, *D)`.
        x0: Clean data `(B, *D)`.
        eps: Noise `(B, *D)`.
        logsnr: `(B,)`.

    Returns:
        `(error, scale)`, `(B, *D)` and `(B,)`, with (eps - eps_hat)^2 = scale error^2 for each element.
    """
    alpha, sigma = denoiser.interpolant(level_for(x0, logsnr))
    error = raw - target(denoiser.prediction, x0, eps, alpha, sigma)
    return error, eps_error_scale(denoiser.prediction, alpha, sigma)


def eps_residual(
    denoiser: DenoiserFn, x: Tensor, x0: Tensor, eps: Tensor, logsnr: Tensor, cond: Cond | None = None
) -> tuple[Tensor, Tensor]:
    """Return `(error, scale)` as `raw_residual` does, for any denoiser.

    Args:
        denoiser: What is judged; a network by its own output, any other by its x0.
        x: What the denoiser is shown, `(B, *D)`; alpha x0 + sigma eps where nothing else is said.
        x0: Clean data `(B, *D)`.
        eps: Noise `(B, *D)`.
        logsnr: `(B,)`.
        cond: Conditions, or None.
    """
    logsnr = level_for(x0, logsnr)
    if isinstance(denoiser, NetworkDenoiser):
        return raw_residual(denoiser, denoiser.predict(x, logsnr, cond).raw, x0, eps, logsnr)
    alpha, sigma = denoiser.interpolant(logsnr)
    return denoiser(x, logsnr, cond) - x0, (alpha / sigma) ** 2


def eps_error(
    denoiser: DenoiserFn, x0: Tensor, eps: Tensor, logsnr: Tensor, cond: Cond | None = None
) -> Tensor:
    """Return the mean over the data's dimensions of |eps - eps_hat|^2 at `logsnr` `(B,)`, of shape `(B,)`."""
    x = marginal(denoiser.interpolant, x0, eps, level_for(x0, logsnr))
    error, scale = eps_residual(denoiser, x, x0, eps, logsnr, cond)
    return scale * error.square().flatten(1).mean(1)


class DenoisingLoss(nn.Module):
    """Weighted denoising loss of a batch.

    Args:
        schedule: Its density draws the noise levels.
        weighting: The objective, in eps units.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: If `label_dropout` is outside [0, 1], or the schedule, or that of the weighting, learns or adapts:
            this loss would teach the one to make the loss small, and the other nothing.
    """

    adapts: ClassVar[bool] = False
    """Whether the loss moves an adaptive schedule."""

    def __init__(self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}")
        for given in (schedule, getattr(weighting, "schedule", None)):
            if isinstance(given, LearnedCurve):
                raise ValueError(
                    f"{type(given).__name__} learns from the variational bound alone: method=vdm"
                )
            if isinstance(given, AdaptiveSchedule) and not self.adapts:
                raise ValueError(
                    f"{type(self).__name__} would leave an adaptive schedule where it is: method=adaptive"
                )
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
        per_example = self.example_losses(denoiser, x0, eps, logsnr, 0.5 * ratio.to(x0.dtype), cond, rng)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)

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
        """Return the loss of each example, `(B,)`; what a loss that differs in its error alone overrides.

        Args:
            denoiser: What is judged.
            x0: Clean data `(B, *D)`.
            eps: Noise `(B, *D)`.
            logsnr: `(B,)`.
            factor: ½ w / p, `(B,)`.
            cond: Conditions, labels already dropped.
            rng: For further draws, under tags of their own.
        """
        return factor * eps_error(denoiser, x0, eps, logsnr, cond)
