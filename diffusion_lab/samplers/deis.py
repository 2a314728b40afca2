r"""DEIS: extrapolate the noise from earlier steps, in a time of one's choice, and integrate it exactly.

With y = x / alpha and rho = sigma / alpha the probability-flow ODE is dy / drho = eps(y; rho), eps = (x - alpha x0) /
sigma. Replacing eps by the polynomial through its last `order` values, L_j being 1 at the j-th of them,

    y_next = y + sum_j C_j eps_j,        C_j = int_rho^rho_next L_j(t(rho)) drho.

The polynomial's variable t is free:

    rhoab   t = rho, and C_j in closed form
    tab     t = the time of a schedule, u(logsnr); C_j by quadrature over lam, where rho = e^{-lam}

In x, with the sum of the C_j being rho_next - rho, the step is DDIM's map and what the earlier values add:

    x_next = DDIM(x, x0) + alpha_next sum_{j >= 1} C_j (eps_j - eps).

The first step is DDIM's, the next ones have the order that the values at hand allow. A step out of pure noise (rho
infinite) is DDIM's and leaves no value behind; the last, to rho = 0, returns the denoiser's output.

References:
    Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2022, section 3
    (tAB-DEIS and rhoAB-DEIS). Their tAB3 is `order` 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.process import LinearBeta, Schedule
from diffusion_lab.process.gaussian import ddim_step, eps_from_x0
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.adams import lagrange
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn

# quadrature points in each unit of lam or less; softplus in LinearBeta's time is singular pi / 2 off the real axis
POINTS = 20


def rho_weights(levels: tuple[float, ...], end: float) -> list[float]:
    """Return the C_j of rhoab for values at log-SNRs `levels`, the step going from the first of them to `end`."""
    rho, rho_next = (math.exp(-0.5 * level) for level in (levels[0], end))
    gap = rho_next - rho
    # in units of the step the integral of rho^k is 1 / (k + 1)
    polynomials = lagrange([(math.exp(-0.5 * level) - rho) / gap for level in levels])
    return [float(gap * C) for C in polynomials @ (1 / np.arange(1, len(levels) + 1))]


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    return 0.5 * (nodes + 1), 0.5 * weights


def time_weights(schedule: Schedule, levels: tuple[float, ...], end: float) -> list[float]:
    """Return the C_j of tab; as `rho_weights`, with the polynomial in the time of `schedule`."""
    h = 0.5 * (end - levels[0])
    # Gauss-Legendre in panels no longer than one
    panels = math.ceil(h)
    nodes, weights = _quadrature()
    nodes = (np.arange(panels)[:, None] + nodes).ravel() / panels
    weights = np.tile(weights, panels) / panels
    lam = 0.5 * levels[0] + h * nodes
    t = schedule.inverse(torch.tensor([*levels, end, *(2 * lam)], dtype=torch.float64)).numpy()
    t = (t - t[0]) / (t[len(levels)] - t[0])
    polynomials = lagrange(t[: len(levels)].tolist())
    powers = t[len(levels) + 1 :] ** np.arange(len(levels))[:, None]
    # drho = -e^{-lam} dlam
    return [float(C) for C in polynomials @ powers @ (-h * weights * np.exp(-lam))]


@dataclass(frozen=True, kw_only=True)
class DEIS(Stepper):
    """DEIS, an exponential Adams-Bashforth method on the noise. One call of the denoiser a step; order `order`.

    Args:
        order: Values of the noise that the polynomial goes through, 1 to 4. The paper's q is one less.
        variant: "rhoab", or "tab" as the paper advises.
        schedule: Whose time "tab" takes; None for `LinearBeta()`, the paper's variance-preserving one. Of no effect on
            "rhoab".

    Raises:
        ValueError: If `order` is not 1, 2, 3 or 4, or `variant` is another word.
    """

    order: int = 4
    variant: Literal["rhoab", "tab"] = "tab"
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"DEIS needs order 1, 2, 3 or 4, got {self.order}")
        if self.variant not in ("rhoab", "tab"):
            raise ValueError(f"DEIS's variant is 'rhoab' or 'tab', got {self.variant!r}")

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `[(logsnr, eps), ...]`, newest first."""
        interpolant, x0 = denoiser.interpolant, denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next)):
            return x0, None
        x_next = ddim_step(interpolant, x, x0, logsnr, logsnr_next)
        if bool(torch.isneginf(logsnr)):
            return x_next, None
        eps = eps_from_x0(interpolant, x, x0, logsnr)
        values = [(float(logsnr), eps), *(state or [])][: self.order]
        levels, end = tuple(level for level, _ in values), float(logsnr_next)
        if self.variant == "rhoab":
            C = rho_weights(levels, end)
        else:
            C = time_weights(self.schedule or LinearBeta(), levels, end)
        alpha_next, _ = interpolant(logsnr_next)
        for C_j, (_, eps_j) in zip(C[1:], values[1:], strict=True):
            x_next = x_next + alpha_next * C_j * (eps_j - eps)
        return x_next, values
