r"""Euler and Heun on the probability-flow ODE in EDM's coordinates.

With y = x / alpha and rho = sigma / alpha the ODE is the same in every interpolant,

    dy / drho = eps(y; rho) = (x - alpha x0) / sigma.

Euler's step y + (rho_next - rho) eps is DDIM's map with eta = 0: alpha_next x0 + (sigma_next / sigma)(x - alpha x0).
Heun's step averages the slopes at both ends,

    y_next = y + (rho_next - rho) (eps + eps') / 2,    eps' = eps at Euler's prediction x',
    x_next = x' + ½ (sigma_next - alpha_next rho) (eps' - eps)
           = x' + ½ alpha_next (rho / rho_next - 1) (x0' - x0),

the second line being the same in x, and the third in x0, since x' has the eps of x: eps' - eps is
(alpha_next / sigma_next) (x0 - x0'). The last step, to rho = 0, is Euler's, and so is a first step from pure noise
(rho infinite), where the coordinates end.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import is_infinite, scaled_add
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class Euler(Stepper):
    """Euler's method. One call of the denoiser a step; order 1; identical to DDIM with eta = 0."""

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
        return ddim_step(denoiser.interpolant, x, denoiser(x, logsnr), logsnr, logsnr_next), None


@dataclass(frozen=True, kw_only=True)
class Heun(Stepper):
    """Heun's method. Two calls of the denoiser a step, one at the last, so 2 N - 1 for N steps; order 2."""

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
        interpolant = denoiser.interpolant
        x0 = denoiser(x, logsnr)
        x_euler = ddim_step(interpolant, x, x0, logsnr, logsnr_next)
        if is_infinite(logsnr_next, 1) or is_infinite(logsnr, -1):
            return x_euler, None
        # rho / rho_next = exp((logsnr_next - logsnr) / 2)
        c = 0.5 * interpolant(logsnr_next)[0] * torch.expm1(0.5 * (logsnr_next - logsnr))
        return scaled_add(x_euler, c, denoiser(x_euler, logsnr_next) - x0), None
