r"""Adams steps: polynomials through outputs of the denoiser, integrated along a step. Shared by several samplers.

With lam half the log-SNR, h the step in it, u = (lam - lam_now) / h and c = (1 + tau^2) h, the reverse SDE with noise
tau (tau = 0: the probability-flow ODE) has the solution

    x_next = (sigma_next / sigma) e^{-tau^2 h} x + alpha_next int_0^1 c e^{-c (1 - u)} x0(u) du
             + sigma_next sqrt(1 - e^{-2 tau^2 h}) z.

Replacing x0 by the polynomial through outputs at u_0, u_1, ... makes the integral a weighted sum of the outputs, by
the moments

    M_k = int_0^1 c e^{-c (1 - u)} u^k du = 1 - (k / c) M_{k-1},      M_0 = 1 - e^{-c}.

Outputs at u <= 0 make a predictor (Adams-Bashforth), one at u = 1 besides makes a corrector (Adams-Moulton).

UniPC writes the sum as M_0 x0(0) + B sum_m rho_m (x0(u_m) - x0(0)) / u_m and solves for rho, whereby B drops out:
these are the weights above. Only with two outputs does it put rho = 1/2, true to leading order, and there B matters:

    variant "bh1"  B = c,      "bh2"  B = 1 - e^{-c},      "exact"  B rho = M_1.

References:
    Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023,
        section 3.
    Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", 2023, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.polynomial.polynomial import polyfromroots
from torch import Tensor

from diffusion_lab.process.interpolants import Interpolant

Variant = Literal["exact", "bh1", "bh2"]
Outputs = Sequence[tuple[Tensor, Tensor]]
"""Outputs of the denoiser and where they were made: `[(logsnr, x0), ...]`, the present level's first."""


def lagrange(points: Sequence[float]) -> np.ndarray:
    """Return row by row the coefficients, lowest power first, of the polynomials that are 1 at one of `points`."""
    rows = []
    for j, point in enumerate(points):
        others = [*points[:j], *points[j + 1 :]]
        rows.append(polyfromroots(others) / math.prod(point - other for other in others))
    return np.array(rows)


def moments(c: float, n: int) -> np.ndarray:
    """Return M_0 to M_{n-1}; `c` may be infinite, where all the weight is at u = 1."""
    if c < 1.0:
        # the recursion cancels for small c: M_k = c sum_j (-c)^j k! / (j + k + 1)!
        terms = [
            [(-c) ** j * math.factorial(k) / math.factorial(j + k + 1) for j in range(20)] for k in range(n)
        ]
        return c * np.array(terms).sum(1)
    M = [-math.expm1(-c)]
    for k in range(1, n):
        M.append(1 - k / c * M[-1])
    return np.array(M)


def adams_weights(points: Sequence[float], c: float, variant: Variant = "exact") -> list[float]:
    """Return the weight of the output at each of `points` (in u, the first 0 unless it is alone); they sum to M_0."""
    M = moments(c, len(points))
    if len(points) == 2 and variant != "exact":
        B = c if variant == "bh1" else float(M[0])
        other = 0.5 * B / points[1]
        return [float(M[0]) - other, other]
    return [float(w) for w in lagrange(points) @ M]


def adams_step(
    interpolant: Interpolant,
    x: Tensor,
    logsnr: Tensor,
    logsnr_next: Tensor,
    outputs: Outputs,
    *,
    tau: float = 0.0,
    z: Tensor | None = None,
    variant: Variant = "exact",
) -> Tensor:
    """Return x at `logsnr_next`, from `x` at `logsnr` and `outputs`.

    Args:
        interpolant: The process.
        x: Noisy samples `(B, *D)`.
        logsnr: Present level, 0-d; may be -inf with a single output.
        logsnr_next: Next level, 0-d, finite.
        outputs: `[(level, x0), ...]`; with more than one, that of the present level first.
        tau: Noise.
        z: Standard normal, like `x`; None without noise.
        variant: The weights with two outputs.
    """
    _, sigma = interpolant(logsnr)
    alpha_next, sigma_next = interpolant(logsnr_next)
    h = 0.5 * (float(logsnr_next) - float(logsnr))
    first = outputs[0][1]
    # the level of a single output is of no consequence, and 0 / 0 if the step is infinite
    points = [0.0] if len(outputs) == 1 else [0.5 * float(level - logsnr) / h for level, _ in outputs]
    weights = adams_weights(points, (1 + tau**2) * h, variant)
    # the weights sum to 1 - e^{-c}; differences of outputs keep the digits that float32 has
    total = sum(weights) * first
    for weight, (_, x0) in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * (x0 - first)
    if not tau:
        return sigma_next / sigma * x + alpha_next * total
    decay, n = math.exp(-(tau**2) * h), sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h))
    assert z is not None
    return sigma_next / sigma * decay * x + alpha_next * total + n * z
