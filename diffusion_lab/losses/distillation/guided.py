r"""Distillation of guided models, first stage: one network answers what two calls of its teacher do, at every scale.

    u ~ U[0, 1],  logsnr = schedule(u),  x = alpha x0 + sigma eps
    s ~ U[s_min, s_max]                                          the guidance scale, one an example; 1 + w in the paper
    x0~  = x0_uncond + s (x0_cond - x0_uncond)                   of the teacher
    loss = ½ w / p |eps~ - eps_hat(x, s)|^2                      (`base.py`)

The target is a function of what the student is shown and told, so nothing but the student's own limits keeps the loss
from zero, for all scales at once. Guiding x0 guides eps and v: they are affine in each other with coefficients that
both branches share.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.1 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.denoisers.guided import GUIDANCE_SCALE
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import FOR_WRAPPERS, Cond, DenoiserFn


def with_scales(cond: Cond | None, scales: Sequence[float], rng: StepRNG) -> Cond:
    """Return `cond` with a guidance scale for each example, drawn evenly from `(lowest, highest)`."""
    low, high = scales
    return {**(cond or {}), GUIDANCE_SCALE: low + (high - low) * rng.rand(GUIDANCE_SCALE)}


class GuidedLoss(DistillationLoss):
    """Loss of the first stage. The arguments are those of `DistillationLoss`."""

    @torch.no_grad()
    def target(self, teacher: DenoiserFn, x: Tensor, logsnr: Tensor, cond: Cond) -> Tensor:
        """Return x0~ `(B, *D)`.

        Args:
            teacher: Asked twice: with its conditions, and without.
            x: Noisy data `(B, *D)`.
            logsnr: `(B,)`.
            cond: Conditions, and the guidance scale `(B,)`, of which the teacher is told nothing.
        """
        plain = {name: value for name, value in cond.items() if name != GUIDANCE_SCALE}
        nothing = {name: value for name, value in plain.items() if name in FOR_WRAPPERS} or None
        given, without = teacher(x, logsnr, plain), teacher(x, logsnr, nothing)
        return torch.lerp(without, given, broadcast_right(cond[GUIDANCE_SCALE].to(x.dtype), x))

    def forward(
        self,
        student: DenoiserFn,
        teacher: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        scales: Sequence[float],
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Args:
            student: Told the scale as cond["guidance_scale"].
            teacher: Never given a gradient.
            x0: Clean data, images in [-1, 1].
            cond: Conditions.
            rng: Random numbers of this step for these rows.
            scales: `(lowest, highest)` guidance scale.

        Raises:
            ValueError: If there are no conditions, towards which the teacher would be guided.
        """
        if not any(name not in FOR_WRAPPERS for name in cond or {}):
            raise ValueError("method=guided needs conditions to guide by, and the data have none: no labels")
        logsnr, _ = NoiseLevels(schedule=self.schedule)(rng)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        told = with_scales(drop_labels(cond, self.label_dropout, rng), scales, rng)
        x = marginal(student.interpolant, x0, eps, level_for(x0, logsnr))
        target = self.target(teacher, x, logsnr, told)
        per_example = self.against(student, x, target, logsnr, told)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
