r"""Euler-Maruyama on the reverse SDE, with a diffusion coefficient w that is chosen after training.

Rectified flow's time t goes from 0 at data to 1 at noise: x = (1 - t) x0 + t eps. With velocity v = E[eps - x0 | x] and
score s = -E[eps | x] / t, every w(t) >= 0 gives an SDE, run backwards in t, that shares the flow's marginals:

    dx = (v - w s / 2) dt + sqrt(w) dW,          w = 0: the probability-flow ODE.

One step of length h = t - t_next, with x0 the denoiser's output and eps = (x - (1 - t) x0) / t:

    x_next = x - h v - h w / (2 t) eps + sqrt(w h) z
           = Euler's step - k (x - (1 - t) x0) + sqrt(w h) z,          k = h w / (2 t^2)

Any other interpolant is this flow times n = alpha + sigma, at t = sigma / (alpha + sigma) = sigmoid(-logsnr / 2), so a
step is taken there, on x / n, and the samples are the same in all of them. Euler's step is then DDIM's map.

How w reads on another path. On x = alpha x0 + sigma eps in the path's own time r the score is that of the marginal,
v = alpha' E[x0 | x] + sigma' E[eps | x], and s = (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')). The
reverse of the forward process has

    w_KL = 2 (sigma sigma' - alpha' sigma^2 / alpha) = -sigma^2 dlogsnr/dr = sigma^2 / p(logsnr),

p being the density of the path's schedule: beta for the variance-preserving process, 2 t / (1 - t) for the flow. The
ratio w / w_KL is a number without units, the same on every path, so a w of another path is used here as

    w(t) = (w / w_KL)(logsnr) 2 t / (1 - t).

The ratio is `eta` of `dpmpp_2m_sde`, where it is constant and the step exact for constant x0; Euler-Maruyama pays for
its freedom with step size. It wants h w small beside 2 t^2 where data lie on a thin sheet (images): w_KL and w = t fall
fast enough towards the data, a constant does not, and SiT stops the noise at t = 0.04 (`end`). From there on, at a step
where w is infinite (w_KL at pure noise) and at the last one, steps are Euler's, without noise. Weak order 1.

References:
    Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", 2024,
        section 2 (the SDE, the score from the velocity, the coefficients).
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023
        (any diffusion coefficient).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, combine, is_infinite, scaled_add
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.process.interpolants import RectifiedFlow
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn

Diffusion = Callable[[Tensor, Tensor], Tensor]
"""A diffusion coefficient: `(1 - t, t) -> w`, of the shape of t; infinite at t = 1 is allowed."""


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"{type(self).__name__} needs a finite scale >= 0, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class Sigma(_Scaled):
    """w = scale t, the flow's noise level: SiT's default."""

    def __call__(self, alpha: Tensor, t: Tensor) -> Tensor:
        """Return w."""
        return self.scale * t


@dataclass(frozen=True, kw_only=True)
class SinSquared(_Scaled):
    """w = scale sin(pi t)^2: none at both ends."""

    def __call__(self, alpha: Tensor, t: Tensor) -> Tensor:
        """Return w."""
        return self.scale * torch.sin(math.pi * t) ** 2


@dataclass(frozen=True, kw_only=True)
class Constant(_Scaled):
    """w = scale: the same at every time; needs an `end`, see the head of this file."""

    def __call__(self, alpha: Tensor, t: Tensor) -> Tensor:
        """Return w."""
        return torch.full_like(t, self.scale)


@dataclass(frozen=True, kw_only=True)
class KL(_Scaled):
    """w = scale w_KL = scale 2 t / (1 - t): with 1, the reverse of the forward process; infinite at pure noise."""

    def __call__(self, alpha: Tensor, t: Tensor) -> Tensor:
        """Return w."""
        return self.scale * 2.0 * t / alpha


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Stepper):
    """Euler-Maruyama on SiT's reverse SDE. One call of the denoiser a step; weak order 1; with w = 0 it is `Euler`.

    Args:
        diffusion: w: `Sigma`, `SinSquared`, `Constant`, `KL`, or any function `(1 - t, t) -> w >= 0`.
        end: Flow time in [0, 1] below which no step with noise ends; the steps from there on are Euler's.

    Raises:
        ValueError: If `end` is outside [0, 1].
    """

    diffusion: Diffusion
    end: float = 0.04

    stochastic = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.end <= 1.0:
            raise ValueError(f"EulerMaruyama needs end in [0, 1], got {self.end}")

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
        x_next = ddim_step(denoiser.interpolant, x, x0, logsnr, logsnr_next)
        if is_infinite(logsnr_next, 1):
            return x_next, None
        flow = RectifiedFlow()
        (one_minus_t, t), (_, t_next) = flow(logsnr), flow(logsnr_next)
        w = self.diffusion(one_minus_t, t)
        w = torch.where((t_next >= self.end) & torch.isfinite(w), w, torch.zeros_like(w))
        if not bool(torch.any(w > 0)):
            return x_next, None
        h = t - t_next
        # x / n is the flow's x
        (alpha, sigma), (alpha_next, sigma_next) = (
            denoiser.interpolant(logsnr),
            denoiser.interpolant(logsnr_next),
        )
        n, n_next = alpha + sigma, alpha_next + sigma_next
        k = n_next * h * w / (2 * t**2)
        pull = combine(-k / n, x, k * one_minus_t, x0)
        noise = broadcast_right(n_next * torch.sqrt(w * h), x)
        return scaled_add(x_next + pull, noise, rng.randn_like(x)), None
