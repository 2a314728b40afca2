r"""Progressive distillation's two further walks: steps for a sampler that draws noise, and steps from data to noise.

Both are the loss of `progressive.py` on other levels; i ~ U{1 .. N} on the u-axis of the schedule.

    from, over, to
    plain         i / N,         (i - ½) / N,     (i - 1) / N        t'' = 0 is clean
    double        i / N,         (i - 1) / N,     (i - 2) / N        two steps of 1 / N in one of 2 / N
                  1 / N,         1 / N,           0                  for i = 1: the teacher's one step of 1 / N
    encoder       (i - 1) / N,   (i - ½) / N,     i / N              towards noise

Double steps are what `samplers/double_step.py` takes, which returns half of each by fresh noise. There is no room for
one below 2 / N: from 1 / N the student learns the single step that ends the walk. A teacher step of no length at all
says so, since the second answer then is the target.

The student of the encoder takes data to noise as a DDIM walked backwards would. It begins at the schedule's own clean
end, which must be finite: at logsnr = +inf there is no noise to keep, and so none to find.

References:
    Meng et al., "On Distillation of Guided Diffusion Models", 2023, section 3.2 and appendix, algorithms 2 to 4
    (deterministic, stochastic, encoder).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_lab.losses.distillation.progressive import ProgressiveLoss
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.schedules import Schedule


class DoubleStepLoss(ProgressiveLoss):
    """Loss of one halving, for students that are sampled by `DoubleStep`. See `ProgressiveLoss`."""

    def levels(self, u: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ProgressiveLoss`."""
        i = torch.ceil(u * steps).clamp(min=1.0)
        start = self.schedule((i / steps).clamp(max=1.0 - U_MARGIN))
        middle, end = (self.schedule((i - back).clamp(min=1.0) / steps) for back in (1.0, 2.0))
        return start, torch.where(i == 1.0, start, middle), torch.where(i <= 2.0, torch.inf, end)


class EncoderLoss(ProgressiveLoss):
    """Loss of one halving of an encoder, from data to noise. The arguments are those of `DistillationLoss`.

    Raises:
        ValueError: As `DistillationLoss`; if the schedule has no finite clean end.
    """

    makes_images = False

    def __init__(self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if not math.isfinite(float(schedule(torch.zeros((), dtype=torch.float64, device="cpu")))):
            raise ValueError(
                "an encoder begins at the schedule's clean end, which must be finite: logsnr_max"
            )

    def levels(self, u: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ProgressiveLoss`; these grow noisier."""
        i = torch.ceil(u * steps).clamp(min=1.0)
        start, middle, end = ((i - back) / steps for back in (1.0, 0.5, 0.0))
        return self.schedule(start), self.schedule(middle), self.schedule(end.clamp(max=1.0 - U_MARGIN))
