r"""DPM-Solver: single steps of order 1, 2 and 3 in noise prediction.

With half log-SNRs lam, y = x / alpha satisfies dy / dlam = -e^{-lam} eps, so with h = (logsnr_next - logsnr) / 2

    x_next = (alpha_next / alpha) x - sigma_next int_0^h e^{h - s} eps(lam + s) ds.

Expanding eps about the start, with u(r) the level lam + r h and phi(h) = (e^h - 1) / h - 1:

    order 1    x_next = (alpha_next / alpha) x - sigma_next (e^h - 1) eps                              (this is DDIM)
    order 2    r = 1/2;  x_u by order 1 to u(r);
               x_next = [order 1] - sigma_next / (2 r) (e^h - 1) (eps_u - eps)
    order 3    r1 = 1/3, r2 = 2/3;  x_1 by order 1 to u(r1);
               x_2 = [order 1 to u(r2)] - sigma_2 (r2 / r1) phi(r2 h) (eps_1 - eps)
               x_next = [order 1] - sigma_next / r2 phi(h) (eps_2 - eps)

At the last step e^h is infinite and u lies at +inf; it is of order 1 and returns the denoiser's output. A first step
from pure noise, where alpha = 0, is of order 1 too.

References:
    Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", 2022,
        section 3 and algorithms 1 and 2 (DPM-Solver-2 and -3), section 4.1 (order 1 is DDIM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import ddim_step, eps_from_x0
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Stepper):
    """Single-step DPM-Solver. `order` calls of the denoiser a step, one at the last: `order` (N - 1) + 1 for N steps.

    Args:
        order: 1, 2 or 3.

    Raises:
        ValueError: If `order` is another number.
    """

    order: int = 3

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPMSolver needs order 1, 2 or 3, got {self.order}")

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
        interpolant, x0 = denoiser.interpolant, denoiser(x, logsnr)
        first = ddim_step(interpolant, x, x0, logsnr, logsnr_next)
        if self.order == 1 or bool((torch.isposinf(logsnr_next) | torch.isneginf(logsnr)).all()):
            return first, None
        eps, h = eps_from_x0(interpolant, x, x0, logsnr), 0.5 * (logsnr_next - logsnr)
        _, sigma_next = interpolant(logsnr_next)

        def change(x_u: Tensor, level: Tensor) -> Tensor:
            """How eps at `x_u` differs from that at the start."""
            return eps_from_x0(interpolant, x_u, denoiser(x_u, level), level) - eps

        if self.order == 2:
            u = logsnr + 0.5 * (logsnr_next - logsnr)
            D = change(ddim_step(interpolant, x, x0, logsnr, u), u)
            return first - broadcast_right(sigma_next * torch.expm1(h), x) * D, None
        r1, r2 = 1 / 3, 2 / 3
        u1, u2 = (logsnr + r * (logsnr_next - logsnr) for r in (r1, r2))
        D1 = change(ddim_step(interpolant, x, x0, logsnr, u1), u1)
        x_2 = ddim_step(interpolant, x, x0, logsnr, u2)
        D2 = change(x_2 - broadcast_right(interpolant(u2)[1] * r2 / r1 * _phi(r2 * h), x) * D1, u2)
        return first - broadcast_right(sigma_next / r2 * _phi(h), x) * D2, None


def _phi(h: Tensor) -> Tensor:
    """Return (e^h - 1) / h - 1."""
    return torch.expm1(h) / h - 1
