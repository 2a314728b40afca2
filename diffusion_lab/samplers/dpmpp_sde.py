r"""DPM-Solver++ for the reverse SDE: multistep, first or second order, with noise `eta`.

With lam half the log-SNR, the family of reverse SDEs that share the process's marginals has for each eta >= 0 the
solution

    x_next = (sigma_next / sigma) e^{-eta h} x + alpha_next (1 + eta) int_0^h e^{-(1 + eta)(h - s)} x0(lam + s) ds
             + sigma_next sqrt(1 - e^{-2 eta h}) z,                      h = (logsnr_next - logsnr) / 2.

eta = 0 is the probability-flow ODE, eta = 1 the reverse of the forward process. With H = (1 + eta) h and x0 held, or
extrapolated linearly from the previous step, the integral is

    alpha_next (1 - e^{-H}) D,      D = x0 + w (x0 - x0_previous) h / h_previous,
    w = 0                           order 1
    w = 1 / 2                       order 2, "midpoint"
    w = 1 / (1 - e^{-H}) - 1 / H    order 2, "heun": the line integrated exactly; 1/2 + H/12 + ...

Order 1 with eta = 0 is DDIM, with eta = 1 ancestral sampling; order 2 with eta = 0 is DPM-Solver++ (2M). With noise
the order is weak: it is the law of the samples that converges, on Gaussian data at this order for every eta. The first
step and one from pure noise have no line and take D = x0; the last returns the denoiser's output and draws nothing.

References:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022 (the SDE solvers
        are those of its second version: SDE-DPM-Solver++1 and SDE-DPM-Solver++(2M), eta = 1).
    Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", 2023 (the family; tau^2 is
        our eta).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import combine, is_infinite, scaled_add
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DPMSolverPPSDE(Stepper):
    """Multistep DPM-Solver++ for the reverse SDE. One call of the denoiser a step.

    Args:
        order: 1, or 2 to extrapolate x0 from the previous step.
        eta: Noise; 0 is deterministic, 1 the usual SDE.
        solver_type: The weight of the line, "midpoint" or "heun"; of no effect with order 1.

    Raises:
        ValueError: If `order` is not 1 or 2, `eta` is negative or not finite, or `solver_type` is another word.
    """

    order: int = 2
    eta: float = 1.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"DPMSolverPPSDE needs order 1 or 2, got {self.order}")
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"DPMSolverPPSDE needs a finite eta >= 0, got {self.eta}")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type is 'midpoint' or 'heun', got {self.solver_type!r}")

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
        """See `Stepper.step`; the state is `(x0, h)` of the previous step."""
        x0 = denoiser(x, logsnr)
        if is_infinite(logsnr_next, 1):
            return x0, None
        _, sigma = denoiser.interpolant(logsnr)
        alpha_next, sigma_next = denoiser.interpolant(logsnr_next)
        h = 0.5 * (logsnr_next - logsnr)
        H = (1 + self.eta) * h
        D = x0
        if self.order == 2 and state is not None:
            x0_previous, h_previous = state
            w = 0.5 if self.solver_type == "midpoint" else -1 / torch.expm1(-H) - 1 / H
            # a previous step out of pure noise has infinite h and drops out
            D = scaled_add(x0, w * h / h_previous, x0 - x0_previous)
        # without noise the factor is 1 even for infinite h, where eta h would be 0 times infinity
        decay = torch.exp(-self.eta * h) if self.eta else torch.ones_like(h)
        x_next = combine(sigma_next / sigma * decay, x, -alpha_next * torch.expm1(-H), D)
        if self.eta:
            assert rng is not None
            n = sigma_next * torch.sqrt(-torch.expm1(-2 * self.eta * h))
            x_next = scaled_add(x_next, n, rng.randn_like(x))
        return x_next, (x0, h)
