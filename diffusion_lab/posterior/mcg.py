r"""Manifold-constrained gradient (MCG): DPS's gradient, and then a projection onto the measurement.

    x0 <- x0 - (zeta / c) grad_z |y - A(x0(z))|^2                 (see `dps.py`)
    x0 <- x0 + A^+ (y - A x0),        A^+ = A^T (A A^T)^-1

The paper projects the noisy z_s onto a noisy version of y. With ancestral steps an x0 that is consistent with y leads
the measured part of z through just that, q(A z_s | A z_t, y), so projecting x0 is the same method, and it works with
every sampler and ends with A x0 = y. For masks A^+ is the mask, and y is put in bit for bit; otherwise conjugate
gradients make it, and few of them where A hardly sees a direction (blur), since y's error there is divided by a small
number.

NOT calibrated, and meant for measurements without noise: A x0 = y holds whatever noise y has, which the DPS paper names
as its failure. The unmeasured part has the bias of DPS's gradient.

References:
    Chung et al., "Improving Diffusion Models for Inverse Problems using Manifold Constraints", 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.guidance import unguided
from diffusion_lab.measurements import Masking, Operator, adjoint
from diffusion_lab.posterior.common import check_solver, conjugate_gradients, measurement, require_linear
from diffusion_lab.posterior.dps import DPS
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, conditional_of


class MCG:
    """DPS whose answer is projected onto the measurement. One call an evaluation, with its backward pass.

    Not calibrated, and for measurements without noise: see the module.

    Args:
        denoiser: Unconditional denoiser, or one under its own conditions.
        operator: A, linear.
        step: Length of a step of the gradient, as in `DPS`; 0 leaves the projection alone.
        grid: The sampler's grid: increasing log-SNRs that end at +inf.
        iterations: Most conjugate gradients of A^+.
        tolerance: Of their residual, relative.
        inner: Guidance below this one.

    Raises:
        ValueError: If the operator is not linear, a number is out of range or the grid malformed, or (at call) the
            measurement is missing or does not fit.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        operator: Operator,
        step: float,
        grid: Tensor,
        iterations: int = 20,
        tolerance: float = 1e-4,
        inner: GuidanceFactory = unguided,
    ) -> None:
        require_linear(operator, "MCG")
        check_solver("MCG", 0.0, iterations, tolerance)
        self.gradient = DPS(denoiser, operator, step, grid, inner)
        self.operator = operator
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.iterations, self.tolerance = iterations, tolerance

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return x0 with A x0 = y, of the shape of `x`."""
        x0 = self.gradient(x, logsnr, cond)
        predicted = self.operator(x0)
        y = measurement(cond, predicted, self.operator)
        if isinstance(self.operator, Masking):
            return torch.where(self.operator.known(x0) > 0, y, x0)
        u = conjugate_gradients(
            lambda u: self.operator(adjoint(self.operator, u, x.shape)),
            y - predicted,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        return x0 + adjoint(self.operator, u, x.shape)
