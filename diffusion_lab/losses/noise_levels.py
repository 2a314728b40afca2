"""Noise levels of a training batch: spread evenly over the schedule, over all processes together.

u is stratified across the global batch (`StepRNG.stratified`), so each level is drawn with the schedule's density and a
batch covers the whole range; a process's slice of it depends on its rows only.

References:
    Kingma et al., "Variational Diffusion Models", 2021, appendix I.1.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        u = rng.stratified("noise_level").clamp(U_MARGIN, 1.0 - U_MARGIN)
        logsnr = self.schedule(u)
        return logsnr, self.schedule.log_density(logsnr)
