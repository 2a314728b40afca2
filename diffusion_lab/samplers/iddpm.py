r"""Ancestral sampling with a learned variance.

    x_next = mean(x, x0) + sqrt(var) z,      var = var_lower^(1 - c) var_upper^c,      c = c(x) in [0, 1], learned

as in `ddpm.py`, where c is one number for all. The best c follows from the posterior variance of x0: on Gaussian data
with that c every step of every grid is exact.

References:
    Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, eq. 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, is_infinite
from diffusion_lab.process.gaussian import posterior
from diffusion_lab.process.interpolants import Interpolant, VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, State, Stepper
from diffusion_lab.typing import Cond, DenoiserFn


@runtime_checkable
class LearnedVariance(Protocol):
    """A denoiser that also says how wide the reverse step is."""

    interpolant: Interpolant

    def with_variance(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x] and c, both `(B, *D)` (c may be broadcastable to it), from one call."""
        ...


@dataclass(frozen=True, kw_only=True)
class IDDPM(Stepper):
    """Ancestral sampler for denoisers with a learned variance. One call of the denoiser a step."""

    stochastic = True

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`.

        Raises:
            ValueError: If the denoiser has learned no variance.
        """
        assert rng is not None
        x0, c = denoiser.with_variance(x, logsnr) if isinstance(denoiser, BoundDenoiser) else (None, None)
        if x0 is None or c is None:
            raise ValueError(
                "IDDPM needs a denoiser that has learned a variance (with_variance): a run of method=iddpm, and no "
                "guidance or modifier around it, which would hide it; or take sampler=ddpm"
            )
        mean, lower, _ = posterior(denoiser.interpolant, x, x0, logsnr, logsnr_next)
        if is_infinite(logsnr_next, 1):
            return mean, None
        vp = VariancePreserving()
        # ln var_upper / var_lower = 2 ln (sigma / sigma_next) of the variance-preserving process
        widening = torch.log(vp(logsnr)[1] / vp(logsnr_next)[1])
        std = torch.sqrt(lower) * torch.exp(c * broadcast_right(widening, x))
        return mean + std * rng.randn_like(x), None
