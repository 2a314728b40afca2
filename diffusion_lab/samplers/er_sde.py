r"""ER-SDE-Solver: the reverse SDE with noise that follows a function of the noise level.

With y = x / alpha and l = sigma / alpha, which falls from l to l_next, every function phi whose phi(l) / l does not
fall with growing l gives an SDE that shares the process's marginals. Its solution is

    y_next = r y + phi(l_next) int_{l_next}^l phi'(m) / phi(m)^2 x0(m) dm + sqrt(l_next^2 - r^2 l^2) z,
    r = phi(l_next) / phi(l).

Write g = phi(l) / l, k = g_next / g <= 1 and u = (m - l) / (l_next - l), which is 0 at the present level and 1 at the
next. Then, replacing x0 by a polynomial through earlier outputs,

    x_next = (sigma_next / sigma) k x + alpha_next (M_0 x0 + M_1 x0' + M_2 x0'' / 2) + sigma_next sqrt(1 - k^2) z,

derivatives in u, and by parts M_0 = 1 - r, M_j = 1 - j int_0^1 u^{j-1} phi_next / phi du, by quadrature over log m.
So phi(l) = l is the probability-flow ODE (order 1: DDIM), phi(l) = l^2 the reverse of the forward process (order 1:
ancestral sampling), and the authors' fifth,

    phi(l) = l (exp(l^0.3) + 10),

has hardly any noise at small l, and about that of phi(l) = l^2 at l = 100.

The derivatives come from differences of outputs. D1 and D2 being the divided differences of the last two and three,

    newton   x0' = D1 - u_1 D2,   x0'' = 2 D2:   the parabola through three outputs, of order 3
    taylor   x0' = D1,            x0'' = 2 D2:   the authors'. D1 is the derivative half a step back, so the order is 2

The start uses what outputs there are. An output at pure noise is infinitely far away and drops out of the differences;
the last step returns the denoiser's output and draws nothing.

References:
    Cui et al., "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models", 2023, section 3 and
    appendix A.8 (the functions phi).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn

# log g(l) = log(phi(l) / l), of numbers and arrays; er_sde_5's exp(l^0.3) overflows before l does
LOG_G: dict[str, Callable[[Any], Any]] = {
    "ode": np.zeros_like,
    "sde": np.log,
    "er_sde_5": lambda l: np.logaddexp(l**0.3, math.log(10.0)),
}
# ample for steps from 1e5 to 1e-5
POINTS = 40


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    return 0.5 * (nodes + 1), 0.5 * weights


def moments(scale: str, l: float, l_next: float, n: int) -> list[float]:
    """Return M_0 to M_{n-1} of the function `scale` for a step from `l` to `l_next`; `l` may be infinite if n is 1."""
    log_g, next_g = LOG_G[scale], LOG_G[scale](l_next)
    M = [float(1 - l_next / l * np.exp(next_g - log_g(l)))]
    if n > 1:
        # Gauss-Legendre over log m; phi_next / phi dm = l_next g_next / g dlog m
        h = math.log(l / l_next)
        nodes, weights = _quadrature()
        m = l_next * np.exp(h * nodes)
        measure = weights * h * l_next / (l - l_next) * np.exp(next_g - log_g(m))
        u = (l - m) / (l - l_next)
        M += [float(1 - j * np.sum(u ** (j - 1) * measure)) for j in range(1, n)]
    return M


@dataclass(frozen=True, kw_only=True)
class ERSDE(Stepper):
    """ER-SDE-Solver. One call of the denoiser a step.

    Args:
        order: Outputs used: 1, 2 or 3.
        scale: The function phi: "ode", "sde" or "er_sde_5", the authors' choice.
        variant: The derivatives at order 3: "newton", or the authors' "taylor".

    Raises:
        ValueError: If `order` is not 1, 2 or 3, or `scale` or `variant` is another word.
    """

    order: int = 3
    scale: Literal["ode", "sde", "er_sde_5"] = "er_sde_5"
    variant: Literal["newton", "taylor"] = "newton"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"ERSDE needs order 1, 2 or 3, got {self.order}")
        if self.scale not in LOG_G:
            raise ValueError(f"ERSDE's scale is one of {', '.join(LOG_G)}, got {self.scale!r}")
        if self.variant not in ("newton", "taylor"):
            raise ValueError(f"ERSDE's variant is 'newton' or 'taylor', got {self.variant!r}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return self.scale != "ode"

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `[(l, x0), ...]`, newest first."""
        x0 = denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next)):
            return x0, None
        _, sigma = denoiser.interpolant(logsnr)
        alpha_next, sigma_next = denoiser.interpolant(logsnr_next)
        l, l_next = math.exp(-0.5 * float(logsnr)), math.exp(-0.5 * float(logsnr_next))
        outputs = [(l, x0), *(state or [])][: self.order]
        M = moments(self.scale, l, l_next, len(outputs))
        total = M[0] * x0
        if len(outputs) > 1:
            u = [(at - l) / (l_next - l) for at, _ in outputs]
            D1 = (x0 - outputs[1][1]) / -u[1]
            total = total + M[1] * D1
            if len(outputs) > 2:
                D2 = (D1 - (outputs[1][1] - outputs[2][1]) / (u[1] - u[2])) / -u[2]
                total = total + (M[2] - (u[1] * M[1] if self.variant == "newton" else 0.0)) * D2
        log_k = float(LOG_G[self.scale](l_next) - LOG_G[self.scale](l))
        x_next = sigma_next / sigma * math.exp(log_k) * x + alpha_next * total
        if self.stochastic:
            assert rng is not None
            x_next = x_next + sigma_next * math.sqrt(-math.expm1(2 * log_k)) * rng.randn_like(x)
        return x_next, outputs
