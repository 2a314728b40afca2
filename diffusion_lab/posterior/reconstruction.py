r"""Reconstruction guidance: follow the gradient of how well the estimate explains y.

    x0 <- x0 - (w alpha / 2) grad_x |y - A(x0(x))|^2

It is E[x0 | x, y] under p(y | x) ~ N(A x0, (sigma^2 / alpha^2) I) times w, for the score of that is -(alpha^2 / (2
sigma^2)) grad_x |y - A x0|^2, and the edit sigma^2 / alpha times it. `noise` adds the variance of y,

    alpha / 2    becomes    (alpha / 2) / (1 + noise^2 alpha^2 / sigma^2),

which the paper does not have. With `replace` the known pixels of a mask are put in as in `replacement.py`, and the
gradient moves the unknown ones only: the paper's way to extend a video.

NOT calibrated: sigma^2 / alpha^2 is the variance of x0 given x only for data without structure, or in the limit of
little noise, where the edit over the exact one tends to w. On N(0, 1) with y = x0 + 0.3 n = 1 it returns y itself, with
no variance; with `noise`, mean 0.83 and variance 0.096 (truth 0.917 and 0.083). On two Gaussians with correlation 0.9
given a = 1.5, with `replace`, b has mean 1.14 and variance 0.23 (truth 1.35 and 0.19). Larger w overshoots: where A
sees a number directly the edit tends to w (y - A x0), so w > 2 makes that residual larger than it was, unless
`replace` puts such numbers in. w depends on the size of y, for the norm is a sum: the paper's 9 and 50 belong to their
videos.

A need not be linear.

References:
    Ho et al., "Video Diffusion Models", 2022, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.guidance import unguided
from diffusion_lab.measurements import Masking, Operator
from diffusion_lab.posterior.common import answer, measurement, require_mask
from diffusion_lab.posterior.replacement import shown
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, conditional_of


class ReconstructionGuidance:
    """A denoiser guided by the gradient of |y - A x0|^2. One call an evaluation, with its backward pass.

    Not calibrated: see the module.

    Args:
        denoiser: Unconditional denoiser, or one under its own conditions.
        operator: A, differentiable.
        weight: w, at least 0; 1 is the derivation's.
        noise: Standard deviation of the noise in y that is accounted for; 0 is the paper.
        replace: Whether known pixels are put in; for masks.
        inner: Guidance below this one.

    Raises:
        ValueError: If `weight` or `noise` is negative, or `replace` is asked of an operator that is no mask, or (at
            call) the measurement is missing or does not fit, and with `replace` the seeds likewise.
    """

    draws = True

    def __init__(
        self,
        denoiser: DenoiserFn,
        operator: Operator,
        weight: float = 1.0,
        noise: float = 0.0,
        replace: bool = False,
        inner: GuidanceFactory = unguided,
    ) -> None:
        if not (weight >= 0.0 and noise >= 0.0):
            raise ValueError(
                f"ReconstructionGuidance needs weight >= 0 and noise >= 0, got {weight} and {noise}"
            )
        self.mask: Masking | None = (
            require_mask(operator, "ReconstructionGuidance with replace") if replace else None
        )
        self.denoiser, self.operator = inner(denoiser), operator
        self.interpolant: Interpolant = denoiser.interpolant
        self.conditional = conditional_of(denoiser)
        self.weight, self.noise = weight, noise

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the guided x0, of the shape of `x`."""
        if self.mask is None:
            return self._guided(x, logsnr, cond)
        y = measurement(cond, x, self.mask)
        known = self.mask.known(x) > 0
        return torch.where(
            known, y, self._guided(shown(self.interpolant, x, y, known, logsnr, cond), logsnr, cond)
        )

    def _guided(self, x: Tensor, logsnr: Tensor, cond: Cond | None) -> Tensor:
        at = answer(self.denoiser, self.operator, x, logsnr, cond)
        residual = measurement(cond, at.predicted, self.operator) - at.predicted
        alpha, sigma = self.interpolant(logsnr)
        # alpha / (1 + noise^2 alpha^2 / sigma^2), finite at both ends; without noise it is alpha
        scale = alpha * sigma**2 / (sigma**2 + (self.noise * alpha) ** 2) if self.noise else alpha
        # grad |y - A x0|^2 = -2 J^T (y - A x0)
        return at.x0 + broadcast_right(self.weight * scale, x) * at.pull(residual)
