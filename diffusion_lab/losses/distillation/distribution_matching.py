r"""Distribution matching: samples of the student are pushed from their own distribution towards the teacher's.

    x0 = G(x_i),   x = alpha x0 + sigma eps                   (`student_score.py`)
    d  = (x0_q - x0_p) / mean |x0 - x0_q|                     each sample by its own mean over the data's dimensions
    loss = ½ mean |x0 - sg(x0 + d)|^2

That is the gradient of the reverse Kullback-Leibler divergence between the two noised distributions, in a weighting
that makes it about as long at every level. Without the normalisation d = x0_q - x0_p, and the push is weighted by
SNR w / p, as any objective is: variational score distillation, or Diff-Instruct.

Eq. 7 of the first paper has one more alpha before d. It is 1 at the variance-exploding levels of its ImageNet runs, and
neither its second paper's code (tianweiy/DMD2, main/sd_guidance.py) nor this has it elsewhere.

There is no regression loss and no discriminator: the second paper does without the one, and its GAN is not there.

References:
    Yin et al., "One-step Diffusion with Distribution Matching Distillation", 2024, eqs. 7 and 8.
    Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", 2024, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms, level_for
from diffusion_lab.losses.distillation.student_score import GeneratorLoss
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class DistributionMatchingLoss(GeneratorLoss):
    """Loss of distribution matching.

    Args:
        schedule: See `GeneratorLoss`.
        weighting: See `GeneratorLoss`; asked only where `normalise` is false.
        score: See `GeneratorLoss`.
        logsnrs: See `GeneratorLoss`.
        normalise: Whether each sample's push is divided by its distance from what the teacher makes of it.
        u_min: See `GeneratorLoss`; the paper leaves out the first and the last fiftieth.
        u_max: See `GeneratorLoss`.
        label_dropout: See `GeneratorLoss`.

    Raises:
        ValueError: As `GeneratorLoss`.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        score: DenoisingLoss,
        logsnrs: Sequence[float],
        normalise: bool = True,
        u_min: float = 0.02,
        u_max: float = 0.98,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            schedule=schedule,
            weighting=weighting,
            score=score,
            logsnrs=logsnrs,
            u_min=u_min,
            u_max=u_max,
            label_dropout=label_dropout,
        )
        self.normalise = normalise

    def forward(
        self,
        student: DenoiserFn,
        teacher: DenoiserFn,
        score: DenoiserFn,
        like: Tensor,
        cond: Cond | None,
        rng: StepRNG,
    ) -> LossTerms:
        """See `GeneratorLoss.forward`."""
        cond = drop_labels(cond, self.label_dropout, rng)
        at, level = self.inputs(student, like, cond, rng)
        x0 = student(at, level_for(at, level), cond)
        logsnr = self.levels(rng)
        with torch.no_grad():
            eps = rng.randn("noise", like.shape[1:], dtype=like.dtype)
            x = marginal(student.interpolant, x0, eps, level_for(x0, logsnr))
            x0_q, x0_p = (who(x, level_for(x0, logsnr), cond) for who in (teacher, score))
            direction, factor = x0_q - x0_p, self.x0_factor(logsnr)
            if self.normalise:
                distance = (x0 - x0_q).abs().flatten(1).mean(1)
                # a sample that the teacher leaves where it is has nowhere to go
                direction = direction / broadcast_right(torch.where(distance > 0, distance, torch.inf), x0)
                factor = torch.ones_like(factor)
        per_example = self.pushed(x0, direction, factor)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
