"""Noise levels of a training batch: spread evenly over the schedule, over all processes together.

u is stratified across the global batch (`StepRNG.stratified`), so each level is drawn with the schedule's density and a
batch covers the whole range; a process's slice of it depends on its rows only.

References:
    Kingma et al., "Variational Diffusion Models", 2021, appendix I.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG

# a schedule with infinite ends must not be asked for them; so small a margin moves no estimate
U_MARGIN = 1e-12


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Draws log-SNRs with the density of `schedule`."""

    schedule: Schedule

    def __call__(self, rng: StepRNG) -> tuple[Tensor, Tensor]:
        """Return `(logsnr, log_density)`, each `(n,)` float64, for the rows of this process."""
        return self.at(rng.stratified("noise_level"))

    def at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(logsnr, log_density)` of the draws `u` in [0, 1], of its shape."""
        logsnr = self.schedule(u.clamp(U_MARGIN, 1.0 - U_MARGIN))
        return logsnr, self.schedule.log_density(logsnr)


@dataclass(frozen=True, kw_only=True)
class DiscreteNoiseLevels(NoiseLevels):
    """Draws one of the levels t_i = i / T, i = 1 .. T, of `schedule`, each as often.

    The log-density is the schedule's at the level, so that a loss means the same as with levels drawn in between.

    Args:
        steps: T.

    Raises:
        ValueError: If there are no steps.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"DiscreteNoiseLevels needs steps >= 1, got {self.steps}")

    def at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `NoiseLevels.at`: u in (t_(i-1), t_i] gives the level of t_i."""
        return super().at(torch.ceil(u * self.steps).clamp(min=1.0) / self.steps)
