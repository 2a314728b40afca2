r"""EDM's stochastic sampler: noise is added before each Heun step, and the step takes it off again.

With rho = sigma / alpha (EDM's sigma), N steps in the grid, and within noise_min <= rho <= noise_max,

    gamma = min(churn / N, sqrt(2) - 1),      rho_hat = (1 + gamma) rho,
    x_hat = (alpha_hat / alpha) x + alpha_hat sqrt(rho_hat^2 - rho^2) noise_scale z,

and Heun's step goes from x_hat at rho_hat to the next level. In log-SNRs, and in every interpolant,

    logsnr_hat = logsnr - 2 ln(1 + gamma),
    alpha_hat sqrt(rho_hat^2 - rho^2) = sigma_hat sqrt(1 - exp(logsnr_hat - logsnr)).

The first rho_hat may lie above the grid. Pure noise (rho infinite) is not churned: it would be pure noise again.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 2 and table 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import add_noise
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.samplers.euler import Heun
from diffusion_lab.typing import Cond, DenoiserFn, OnStep


@dataclass(frozen=True, kw_only=True)
class ChurnedHeun(Stepper):
    """Heun's method with `gamma` given for each step; `EDM` computes it from the length of the grid.

    Attributes:
        gamma: Relative increase of rho = sigma / alpha before a step; 0 is `Heun`.
        noise_min: Smallest rho to which noise is added.
        noise_max: Largest.
        noise_scale: Standard deviation of z; above 1 it makes up for detail that a network's denoising loses.
    """

    gamma: float
    noise_min: float = 0.0
    noise_max: float = math.inf
    noise_scale: float = 1.0

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return self.gamma > 0.0

    def _churned(self, logsnr: Tensor) -> Tensor:
        """Return the level to which noise is added; `logsnr` itself where none is."""
        noisier = logsnr - 2 * math.log1p(self.gamma)
        if logsnr.ndim == 0:
            one = math.exp(min(700.0, -0.5 * float(logsnr)))
            return noisier if self.noise_min <= one <= self.noise_max else logsnr
        rho = torch.exp(-0.5 * logsnr)
        churned = (rho >= self.noise_min) & (rho <= self.noise_max)
        return torch.where(churned, noisier, logsnr) if bool(churned.any()) else logsnr

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
        if self.gamma == 0.0:
            return Heun().step(denoiser, x, logsnr, logsnr_next, None, rng)
        logsnr_hat = self._churned(logsnr)
        if logsnr_hat is not logsnr:
            assert rng is not None
            x = add_noise(denoiser.interpolant, x, self.noise_scale * rng.randn_like(x), logsnr, logsnr_hat)
            logsnr = logsnr_hat
        return Heun().step(denoiser, x, logsnr, logsnr_next, None, rng)


@dataclass(frozen=True, kw_only=True)
class EDM:
    """EDM's algorithm 2. Two calls of the denoiser a step, one at the last; with churn 0 it is `Heun`, of order 2.

    It is no `Stepper`: what a step adds depends on the length of the grid.

    Attributes:
        churn: S_churn, noise added over the whole grid; a step gets churn / N, at most sqrt(2) - 1.
        noise_min: S_min, smallest rho = sigma / alpha to which noise is added.
        noise_max: S_max, largest.
        noise_scale: S_noise, standard deviation of the added noise before scaling.

    Raises:
        ValueError: If a parameter is negative, or noise_min is above noise_max.
    """

    churn: float = 0.0
    noise_min: float = 0.0
    noise_max: float = math.inf
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.churn >= 0.0 and 0.0 <= self.noise_min <= self.noise_max and self.noise_scale >= 0.0):
            raise ValueError(
                f"EDM needs churn and noise_scale of at least 0 and 0 <= noise_min <= noise_max, got {self}"
            )

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.churn > 0.0

    def stepper(self, steps: int) -> ChurnedHeun:
        """Return the step of a grid of N = `steps` steps."""
        return ChurnedHeun(
            gamma=min(self.churn / steps, math.sqrt(2.0) - 1.0),
            noise_min=self.noise_min,
            noise_max=self.noise_max,
            noise_scale=self.noise_scale,
        )

    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Follow the grid from noise to samples `(B, *D)`. See `Stepper.__call__`."""
        # a grid too short to have a step is refused by the stepper
        stepper = self.stepper(max(1, grid.shape[0] - 1))
        return stepper(denoiser, x, grid, cond=cond, rng=rng, on_step=on_step)
