r"""Reflow: a student on the straight lines between noise and what its teacher's ODE makes of that noise.

    x1   = the teacher's ODE, from sigma eps at the start of a grid to the data          a pair (eps, x1)
    x    = alpha x1 + sigma eps,   logsnr = schedule(u),  u ~ U[0, 1]
           sigma eps at u = 1 for a student of one step, whose sampler starts there
    loss = ½ w / p |eps - eps_hat(x)|^2                                                  (`base.py`; x0~ = x1)

It is ordinary training in which data and noise belong together. Under rectified flow x runs on a straight line, whose
velocity eps - x1 is what weighting=velocity_mse measures. The paths of the teacher cross nowhere, so those of the
student bend less, and where they do not bend one step is all of them: if x1 is an increasing function of eps the loss
at the optimum is zero. Other interpolants have the same lines, up to the length of x, and DDIM's steps are Euler's.

What error the teacher's solver makes is learnt with the rest.

References:
    Liu, Gong & Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2022, section
    2.2 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@torch.no_grad()
def carried(
    teacher: DenoiserFn, sampler: Callable[..., Tensor], grid: Tensor, eps: Tensor, cond: Cond | None = None
) -> Tensor:
    """Return x1 `(B, *D)`, where a teacher's ODE carries noise.

    Args:
        teacher: Never given a gradient.
        sampler: A deterministic `Sampler`.
        grid: Its log-SNRs, the first with a finite sigma.
        eps: `(B, *D)`.
        cond: Conditions.
    """
    _, sigma = teacher.interpolant(grid[0])
    return sampler(teacher, float(sigma) * eps, grid, cond=cond)


class ReflowLoss(DistillationLoss):
    """Loss on pairs of noise and sample. The arguments are those of `DistillationLoss`."""

    def forward(
        self,
        student: DenoiserFn,
        ends: Tensor,
        eps: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        one_step: bool = False,
    ) -> LossTerms:
        """Return the losses of pairs.

        Args:
            student: Learns to go along the lines.
            ends: x1, `(B, *D)`.
            eps: `(B, *D)`.
            cond: Conditions that the pairs were made with, or None.
            rng: Random numbers of this step for these rows.
            one_step: Whether the student is asked at the noise end alone.
        """
        u = rng.stratified("noise_level")
        logsnr, _ = NoiseLevels(schedule=self.schedule).at(torch.ones_like(u) if one_step else u)
        cond = drop_labels(cond, self.label_dropout, rng)
        at = level_for(ends, logsnr)
        # what little of the answer is left at the noise end is not there when it is sampled
        start = torch.zeros_like(ends) if one_step else ends
        x = marginal(student.interpolant, start, eps, at)
        per_example = self.against(student, x, ends, logsnr, cond)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
