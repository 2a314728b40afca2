r"""DPM-Solver++ (2S): second order in data prediction, from a call between the two levels of each step.

With half log-SNRs and h = (logsnr_next - logsnr) / 2, u lies at logsnr + r (logsnr_next - logsnr), and

    x_u = (sigma_u / sigma) x + alpha_u (1 - e^{-r h}) x0,
    D = x0 + (x0_u - x0) / (2 r),
    x_next = (sigma_next / sigma) x + alpha_next (1 - e^{-h}) D.

With r = 1/2 D is x0_u. The last step and one from pure noise, whose u lies at infinity, take D = x0 (order 1).

References:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import is_infinite
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2S(Stepper):
    """Single-step DPM-Solver++. Two calls of the denoiser a step, one at the last, so 2 N - 1 for N steps; order 2.

    Args:
        r: Where the second call lies between the levels, in (0, 1].

    Raises:
        ValueError: If `r` is outside (0, 1].
    """

    r: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.r <= 1.0:
            raise ValueError(f"DPMSolverPP2S needs r in (0, 1], got {self.r}")

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
        if is_infinite(logsnr_next, 1) or is_infinite(logsnr, -1):
            return ddim_step(interpolant, x, x0, logsnr, logsnr_next), None
        u = logsnr + self.r * (logsnr_next - logsnr)
        x0_u = denoiser(ddim_step(interpolant, x, x0, logsnr, u), u)
        D = torch.lerp(x0, x0_u, 1 / (2 * self.r))
        # (sigma_next / sigma) x + alpha_next (1 - exp(-h)) D is DDIM's map with x0 replaced by D
        return ddim_step(interpolant, x, D, logsnr, logsnr_next), None
