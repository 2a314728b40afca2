r"""Pseudoinverse guidance (PiGDM): the likelihood of y if x0 given x were a round Gaussian.

    x0 <- x0 + (sigma^2 / alpha) J^T V^-1 (y - A x0),        J = d(A x0) / dx,
    V = r^2 A A^T + noise^2 I,        r^2 = s^2 sigma^2 / (s^2 alpha^2 + sigma^2)

r^2 is the variance of x0 given x when data are N(m, s^2 I), s^2 = `data_variance`; the paper has s = 1. V^-1 is applied
by conjugate gradients, which only ask for A and its adjoint, not for the network.

Exact for such data, and biased for others: y is trusted too little where the data vary less than s, too much where
they vary more. With s = 1, noise 0.3 and y = 1, data N(0, 1/4) give mean 0.65 (truth 0.735), N(0, 4) give mean 0.99 and
variance 0.075 (truth 0.978 and 0.088); measure s^2 of the data and say so. Structure within an image (correlated
pixels) is not seen by r^2. s = 0 trusts x0 entirely: V = noise^2 I, which collapses to y.

At pure noise the edit is 0 / 0 and left out. Just above, sigma^2 / alpha enlarges what is wrong with a network's J,
which does not quite vanish: in the variance-preserving process 150-fold at logsnr -10, 2e4-fold at -20. Nothing here
guards against that: take a grid that starts at about -10.

The weight of the edit is the derivation's, 1; the paper also has weights that change with the noise level.

References:
    Song et al., "Pseudoinverse-Guided Diffusion Models for Inverse Problems", 2023, section 3 and algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_lab.guidance import unguided
from diffusion_lab.measurements import Operator, adjoint
from diffusion_lab.posterior.common import (
    answer,
    check_solver,
    conjugate_gradients,
    measurement,
    require_linear,
    tweedie_scale,
)
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, conditional_of


class PiGDM:
    """A denoiser guided by y as if x0 given x were N(x0, r^2 I). One call an evaluation, with its backward pass.

    Args:
        denoiser: Unconditional denoiser, or one under its own conditions.
        operator: A, linear.
        noise: Standard deviation of the noise in y, at least 0.
        data_variance: s^2, at least 0.
        iterations: Most conjugate gradients; masks and super-resolution need one.
        tolerance: Of their residual, relative to that of the measurement.
        inner: Guidance below this one.

    Raises:
        ValueError: If the operator is not linear, a number is out of range or V is zero, or (at call) the measurement
            is missing or does not fit.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        operator: Operator,
        noise: float,
        data_variance: float = 1.0,
        iterations: int = 50,
        tolerance: float = 1e-5,
        inner: GuidanceFactory = unguided,
    ) -> None:
        require_linear(operator, "PiGDM")
        check_solver("PiGDM", noise, iterations, tolerance)
        if not data_variance >= 0.0 or (data_variance == 0.0 and noise == 0.0):
            raise ValueError(
                f"PiGDM needs data_variance >= 0, and above 0 if there is no noise, got {data_variance}"
            )
        self.denoiser, self.operator = inner(denoiser), operator
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.noise, self.data_variance = noise, data_variance
        self.iterations, self.tolerance = iterations, tolerance

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0, of the shape of `x`."""
        at = answer(self.denoiser, self.operator, x, logsnr, cond)
        residual = measurement(cond, at.predicted, self.operator) - at.predicted
        alpha, sigma = self.interpolant(logsnr)
        s2 = self.data_variance
        r2 = broadcast_right(s2 * sigma**2 / (s2 * alpha**2 + sigma**2), x)

        def V(u: Tensor) -> Tensor:
            return self.operator(r2 * adjoint(self.operator, u, x.shape)) + self.noise**2 * u

        u = conjugate_gradients(V, residual, iterations=self.iterations, tolerance=self.tolerance)
        return at.x0 + tweedie_scale(self.interpolant, logsnr, x) * at.pull(u)
