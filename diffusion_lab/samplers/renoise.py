r"""Answer, put fresh noise on it, answer again: the sampler of students that were taught to go all the way in a step.

    x_next = alpha_next x0 + sigma_next z,      x0 the denoiser's answer at x

The last step, to logsnr = +inf, returns the answer; a single step is one of DDIM and draws no noise. Of x nothing is
kept but what x0 says of it. So for a denoiser, which answers with the mean of all that x may come from, this is no
sampler: at every step it loses the variance that is left, and many steps do not mend that. A student that answers with
samples loses nothing.

References:
    Song, Dhariwal, Chen & Sutskever, "Consistency Models", 2023, algorithm 1.
    Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", 2024, section 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.typing import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class Renoise(Stepper):
    """All noise anew at each step. One call of the denoiser a step."""

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether steps draw noise."""
        return True

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
        x0 = denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next).all()):
            return x0, None
        assert rng is not None
        return marginal(denoiser.interpolant, x0, rng.randn_like(x), logsnr_next), None
