r"""Ancestral sampling: draw from the Gaussian reverse kernel with x0 replaced by its estimate.

    x_next = mean(x, x0) + sqrt(var) z,      var = var_lower^(1 - c) var_upper^c,     c = interpolation

Lower and upper variance are those of `process.gaussian.posterior`. At the last step the mean is x0 and no noise is
added. DDPM's two choices are c = 0 and c = 1; classifier-free guidance uses 0.2 and 0.3, simple diffusion 0.2. With c
= 0 the images are the same in every interpolant; the upper variance is defined in the units of the variance-
preserving process, so it is computed there.

References:
    Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020, section 3.2.
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 15 (interpolated log-variance).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, is_infinite, scaled_add
from diffusion_lab.process.gaussian import posterior
from diffusion_lab.process.interpolants import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DDPM(Stepper):
    """Ancestral sampler. One call of the denoiser a step; weak order 1.

    Args:
        interpolation: c in [0, 1]: 0 for the lower variance, 1 for the upper one, linear in the log between.

    Raises:
        ValueError: If `interpolation` is outside [0, 1].
    """

    interpolation: float = 0.0

    stochastic = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.interpolation <= 1.0:
            raise ValueError(f"DDPM needs interpolation in [0, 1], got {self.interpolation}")

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`."""
        assert rng is not None
        x0 = denoiser(x, logsnr)
        mean, lower, _ = posterior(denoiser.interpolant, x, x0, logsnr, logsnr_next)
        if is_infinite(logsnr_next, 1):
            return mean, None
        n = torch.sqrt(lower)
        if self.interpolation > 0.0:
            # var_upper / var_lower = (sigma / sigma_next)^2 of the variance-preserving process
            vp = VariancePreserving()
            n = n * broadcast_right((vp(logsnr)[1] / vp(logsnr_next)[1]) ** self.interpolation, x)
        return scaled_add(mean, n, rng.randn_like(x)), None
