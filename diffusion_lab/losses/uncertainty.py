r"""EDM2's learned uncertainty: every noise level pulls on the network alike, whatever its loss.

    objective_i = loss_i / exp(u(logsnr_i)) + u(logsnr_i)

around any loss. For a fixed level its mean is smallest at u = ln E[loss], so the network's gradient is that of the loss
divided by its own present size: a multi-task weighting by homoscedastic uncertainty, where a level is a task. u is one
linear layer on Fourier features of log-SNR,

    u(l) = b + sum_k  a_k √2 cos(f_k l) + b_k √2 sin(f_k l),

zero at initialisation, where the objective is the loss. EDM2 draws f from N(0, (2π/8)^2) (its features are of
ln(sigma) / 4 = -l / 8, in turns); here f_k are that law's quantiles, so that nothing is drawn.

`total` is the mean of the objectives. `per_example` stays the loss of the loss inside, so that curves and losses by
noise level compare with those of a run without the uncertainty.

References:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024 (EDM2).
    Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion_lab.losses.adaptive import Adaptive
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms
from diffusion_lab.losses.loss_aware import LossAware
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn

BANDWIDTH = 2.0 * math.pi / 8.0
"""EDM2's standard deviation of the angular frequencies, in radians per unit of log-SNR."""


class LogUncertainty(nn.Module):
    """u(logsnr), learned, zero at first.

    Args:
        features: Number of Fourier features; even. EDM2 takes 128.

    Raises:
        ValueError: If `features` is not positive and even.
    """

    frequencies: Tensor

    def __init__(self, *, features: int = 128) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise ValueError(f"LogUncertainty needs a positive even number of features, got {features}")
        quantiles = (torch.arange(features // 2, dtype=torch.float64) + 0.5) / (features // 2)
        frequencies = BANDWIDTH * math.sqrt(2.0) * torch.erfinv(quantiles)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, logsnr: Tensor) -> Tensor:
        """Return u for finite `logsnr` of any shape, in at least float32."""
        angles = logsnr.to(self.frequencies.dtype)[..., None] * self.frequencies
        features = math.sqrt(2.0) * torch.cat([angles.cos(), angles.sin()], dim=-1)
        # a sum, not a matrix product: autocast would make that bfloat16
        return (features * self.weight).sum(-1) + self.bias


class UncertaintyLoss(nn.Module):
    """Balances the noise levels of `loss` by a learned log-uncertainty; see the module.

    Args:
        loss: A loss whose `total` is the mean of its `per_example`, all positive.
        features: Fourier features of the uncertainty.

    Raises:
        ValueError: If `loss` is a `LossAware`, whose losses carry importance weights that u would learn, or another
            that adapts, which would not get to.
    """

    def __init__(self, *, loss: DenoisingLoss, features: int = 128) -> None:
        super().__init__()
        if isinstance(loss, LossAware):
            raise ValueError("UncertaintyLoss takes a loss without importance weights, not LossAware")
        if isinstance(loss, Adaptive):
            raise ValueError(f"UncertaintyLoss would keep {type(loss).__name__} from adapting")
        self.loss = loss
        self.uncertainty = LogUncertainty(features=features)

    def forward(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        logsnr: Tensor | None = None,
    ) -> LossTerms:
        """Return the objective of clean examples `x0` `(B, *D)` as `total`, and their losses as `per_example`.

        Args:
            denoiser: What is judged.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            logsnr: `(B,)` levels to use instead of drawing them.
        """
        terms: LossTerms = self.loss(denoiser, x0, cond, rng, logsnr=logsnr)
        u = self.uncertainty(terms.logsnr)
        objective = terms.per_example * torch.exp(-u) + u
        return replace(terms, total=objective.mean())
