r"""DPM-Solver++ (2M): second order from one call a step, by remembering the last output.

With half log-SNRs, h = (logsnr_next - logsnr) / 2 and r = h_previous / h, the exact solution with x0 extrapolated
linearly is

    x_next = (sigma_next / sigma) x + alpha_next (1 - exp(-h)) D,      D = x0 + (x0 - x0_previous) / (2 r).

The first step has no memory and takes D = x0 (order 1, which is DDIM); so does the last, where h is infinite and the
result is the denoiser's output.

References:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.process.broadcast import is_infinite, scaled_add
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Stepper):
    """Multistep DPM-Solver++ in data prediction. One call of the denoiser a step; order 2."""

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
        h = 0.5 * (logsnr_next - logsnr)
        D = x0
        if state is not None and not is_infinite(h, 1):
            x0_previous, h_previous = state
            # 1 / (2 r); a previous step out of pure noise has infinite h and drops out of the extrapolation
            D = scaled_add(x0, h / (2 * h_previous), x0 - x0_previous)
        # (sigma_next / sigma) x + alpha_next (1 - exp(-h)) D is DDIM's map with x0 replaced by D
        return ddim_step(denoiser.interpolant, x, D, logsnr, logsnr_next), (x0, h)
