r"""Progressive distillation: one step of the student is two of the teacher.

    i ~ U{1 .. N},   t = i / N,   t' = t - ½ / N,   t'' = t - 1 / N       on the u-axis of the schedule
    x     = alpha x0 + sigma eps                                            at t
    x'    = the teacher's step from t to t',   x'' = its step from t' to t''
    x0~   = the x0 of the one DDIM step from x to x''                       (`teacher_steps.joined`)
    loss  = ½ w / p |eps~ - eps_hat|^2                                      (`base.py`)

The levels are those of an N-step sampler on `grid=uniform_u`, t'' = 0 being clean: there x0~ is the teacher's second
answer. In the paper's words its weightings are `truncated_snr`, max(SNR, 1) |x0~ - x0_hat|^2, and `snr_plus_one`.
Nothing is clipped.

References:
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.teacher_steps import Variance, joined, one_step
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class ProgressiveLoss(DistillationLoss):
    """Loss of one halving. The arguments are those of `DistillationLoss`."""

    def levels(self, u: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-SNRs at t, t' and t'', each of the shape of `u`, for draws `u` in [0, 1]."""
        i = torch.ceil(u * steps).clamp(min=1.0)
        # a schedule with an infinite end is not asked for it, but just before
        start, middle, end = ((i - back) / steps for back in (0.0, 0.5, 1.0))
        logsnr, between = (
            self.schedule(start.clamp(max=1.0 - U_MARGIN)),
            self.schedule(middle),
        )
        clean = end == 0.0
        after = self.schedule(torch.where(clean, middle, end))
        return logsnr, between, torch.where(clean, torch.full_like(after, torch.inf), after)

    @torch.no_grad()
    def target(
        self,
        teacher: DenoiserFn,
        x: Tensor,
        levels: tuple[Tensor, Tensor, Tensor],
        cond: Cond | None = None,
        x_var: Variance | None = None,
    ) -> Tensor:
        """Return x0~ `(B, *D)`.

        Args:
            teacher: Asked twice.
            x: Noisy data at t, `(B, *D)`.
            levels: As `levels` returns them.
            cond: Conditions.
            x_var: None for a teacher that steps by DDIM, its variance for aDDIM.
        """
        logsnr, middle, end = levels
        first, between = one_step(teacher, x, logsnr, middle, cond, x_var)
        second, _ = one_step(teacher, between, middle, end, cond, x_var)
        return joined(first, second, logsnr, middle, end)

    def forward(
        self,
        student: DenoiserFn,
        teacher: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        steps: int,
        x_var: Variance | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Args:
            student: Learns to make the teacher's two steps in one.
            teacher: Its steps are half as long; never given a gradient.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            steps: N, the student's.
            x_var: See `target`.
        """
        levels = self.levels(rng.stratified("noise_level"), steps)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        x = marginal(student.interpolant, x0, eps, level_for(x0, levels[0]))
        target = self.target(teacher, x, levels, cond, x_var)
        per_example = self.against(student, x, target, levels[0], cond)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=levels[0])
