r"""Predictor-corrector sampling: a step of the reverse diffusion, and Langevin steps that mend its distribution.

With y = x / alpha, rho = sigma / alpha and the score s = grad_y log p = (x0 - y) / rho^2 = -eps / rho, at each level

    corrector, `corrections` times   y <- y + e s + sqrt(2 e) z,          e = 2 (snr |z| / |s|)^2,
    predictor                        y_next = y + (rho^2 - rho_next^2) s + n z,

                                     n^2 = rho^2 - rho_next^2                             reverse diffusion,
                                     n^2 = rho_next^2 (rho^2 - rho_next^2) / rho^2        ancestral,

and at rho_next = 0 the predictor's mean is returned, which is x0. In x, with r = rho_next^2 / rho^2, that mean is the
posterior's, q(x_next | x, x0), and the noise has standard deviation alpha_next rho sqrt(1 - r) or
sigma_next sqrt(1 - r); the corrector is

    x <- x - (e / rho^2) sigma eps + sqrt(2 e / rho^2) sigma z,      e / rho^2 = 2 (snr |z| / |eps|)^2.

Three departures from the paper:

* It averages |z| and |s| over the batch, by which an image would depend on its neighbours. Here |z| stands for its
  expectation in D dimensions, sqrt(2) Gamma((D + 1) / 2) / Gamma(D / 2), which such averages estimate, and |s| is each
  sample's own. So e depends on x, and what Langevin steps leave invariant as snr -> 0 is p |s|^2, not p: on Gaussian
  data a variance too large by 2 / D, nothing for images. (The sample's own |z| would add as much again.) To that comes
  the error of steps that are not small, snr^2 for Gaussian data.
* With few dimensions |s| may be close to zero, so e / rho^2 is bounded by `longest`: at 1 the drift reaches the
  denoiser's output and no further. A shorter step always is a better Langevin step. The bound acts where |eps|^2 is
  below 2 snr^2 D, which needs noise far below the smallest scale of the data. `longest = inf` is the paper.
* Its variance-preserving form multiplies e by alpha_i^2 / alpha_(i+1)^2 = 1 - beta, which is 1 in the limit of many
  steps; without it the three interpolants give the same samples.

From pure noise (rho infinite) reverse diffusion has infinite noise; that step is ancestral.

References:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    section 4.2 and the predictor-corrector algorithms of the appendix; the order within a step (corrector first) is
    that of the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, is_infinite
from diffusion_lab.process.gaussian import coefficients, eps_from_x0, posterior
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Stepper):
    """Reverse diffusion with Langevin corrections. `1 + corrections` calls of the denoiser a step.

    Attributes:
        corrections: M, Langevin steps at each level, before the predictor leaves it.
        snr: Signal-to-noise ratio of a correction; the paper's 0.16 is for CIFAR-10 under the exploding process.
        ancestral: Predictor with the posterior's variance (then, without corrections, it is DDPM's sampler with the
            lower variance) instead of reverse diffusion's.
        longest: Largest e / rho^2; see the module.

    Raises:
        ValueError: If a number is negative, or `longest` is zero.
    """

    corrections: int = 1
    snr: float = 0.16
    ancestral: bool = False
    longest: float = 1.0

    stochastic = True

    def __post_init__(self) -> None:
        if not (self.corrections >= 0 and self.snr >= 0.0 and self.longest > 0.0):
            raise ValueError(
                f"PredictorCorrector needs corrections >= 0, snr >= 0 and longest > 0, got {self}"
            )

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
        for _ in range(self.corrections):
            x = self.correct(denoiser, x, logsnr, rng)
        return self.predict(denoiser, x, logsnr, logsnr_next, rng), None

    def correct(self, denoiser: DenoiserFn, x: Tensor, logsnr: Tensor, rng: SampleRNG) -> Tensor:
        """Return `x` after one Langevin step at `logsnr`, `(B, *D)`."""
        eps = eps_from_x0(denoiser.interpolant, x, denoiser(x, logsnr), logsnr)
        _, sigma = coefficients(denoiser.interpolant, logsnr, x)
        z, D = rng.randn_like(x), eps[0].numel()
        norm_z = math.sqrt(2.0) * math.exp(math.lgamma((D + 1) / 2) - math.lgamma(D / 2))
        # of each sample, never over the batch
        norm_eps = torch.linalg.vector_norm(eps.flatten(1), dim=1)
        e = broadcast_right((2 * (self.snr * norm_z / norm_eps) ** 2).clamp(max=self.longest), x)
        return x + sigma * (torch.sqrt(2 * e) * z - e * eps)

    def predict(
        self, denoiser: DenoiserFn, x: Tensor, logsnr: Tensor, logsnr_next: Tensor, rng: SampleRNG
    ) -> Tensor:
        """Return `x` at `logsnr_next`; at +inf the denoiser's output."""
        x0 = denoiser(x, logsnr)
        if is_infinite(logsnr_next, 1):
            return x0
        mean, lower, _ = posterior(denoiser.interpolant, x, x0, logsnr, logsnr_next)
        if self.ancestral or is_infinite(logsnr, -1):
            return mean + torch.sqrt(lower) * rng.randn_like(x)
        (alpha, sigma), (alpha_next, _) = denoiser.interpolant(logsnr), denoiser.interpolant(logsnr_next)
        n = alpha_next * (sigma / alpha) * torch.sqrt(-torch.expm1(logsnr - logsnr_next))
        return mean + broadcast_right(n, x) * rng.randn_like(x)
