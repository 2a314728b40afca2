r"""DDIM: keep the estimated x0 and noise, change the level; eta puts some of the noise anew.

    x_next = alpha_next x0 + sqrt(sigma_next^2 - n^2) eps + n z,      eps = (x - alpha x0) / sigma,
    n = eta sqrt(1 - r) sigma_next,      r = exp(logsnr - logsnr_next)

In the paper's words n = eta (sigma_next / sigma) sqrt(1 - alpha^2 / alpha_next^2) under the variance-preserving
process; with sigma^2 - (alpha / alpha_next)^2 sigma_next^2 = (1 - r) sigma^2 that is the form above, which holds in
every interpolant. So eta = 0 is the first-order solver of the probability-flow ODE, and eta = 1 is ancestral sampling
with the lower variance.

References:
    Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021, eqs. 12 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DDIM(Stepper):
    """DDIM with noise `eta` in [0, 1]. One call of the denoiser a step; order 1.

    Raises:
        ValueError: If `eta` is outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM needs eta in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return self.eta > 0.0

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
        x0 = denoiser(x, logsnr)
        if self.eta == 0.0:
            return ddim_step(denoiser.interpolant, x, x0, logsnr, logsnr_next), None
        assert rng is not None
        (alpha, sigma), (alpha_next, sigma_next) = (
            denoiser.interpolant(level) for level in (logsnr, logsnr_next)
        )
        # n^2 / sigma_next^2, and what is left for the old noise
        fresh = self.eta**2 * -torch.expm1(logsnr - logsnr_next)
        kept, n = sigma_next / sigma * torch.sqrt(1 - fresh), sigma_next * torch.sqrt(fresh)
        x_next = broadcast_right(alpha_next, x) * x0 + broadcast_right(kept, x) * (
            x - broadcast_right(alpha, x) * x0
        )
        return x_next + broadcast_right(n, x) * rng.randn_like(x), None
