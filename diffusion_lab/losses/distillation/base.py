r"""What losses of distillation share: a student judged against any x0, in any weighting.

    loss_i = ½ w(logsnr) / p(logsnr) · mean over the data's dimensions of |eps~ - eps_hat|^2,
    eps~ = (x - alpha x0~) / sigma,

with x0~ the teacher's target. That is the denoising loss with x0~ in the place of x0, so every weighting means what it
means there; levels are drawn evenly in the schedule's u unless a method says otherwise.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion_lab.losses.denoising import eps_residual, level_for
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import eps_from_x0
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.process.schedules.adaptive import AdaptiveSchedule
from diffusion_lab.process.schedules.learned import LearnedCurve
from diffusion_lab.typing import Cond, DenoiserFn


class DistillationLoss(nn.Module):
    """Schedule, weighting and label dropout of a method; `forward` is the method's own.

    Args:
        schedule: Where the student's steps lie, and the density of the noise levels.
        weighting: The objective, in eps units.
        label_dropout: Probability of hiding an example's label from student and teacher.

    Raises:
        ValueError: If `label_dropout` is outside [0, 1], or the schedule, or that of the weighting, learns or adapts.
    """

    makes_images: ClassVar[bool] = True
    """Whether its student can be sampled."""

    def __init__(self, *, schedule: Schedule, weighting: Weighting, label_dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}")
        for given in (schedule, getattr(weighting, "schedule", None)):
            if isinstance(given, LearnedCurve | AdaptiveSchedule):
                raise ValueError(
                    f"{type(given).__name__} changes as it is trained, a student's steps must not: "
                    "choose another schedule, e.g. schedule=cosine"
                )
        self.schedule, self.weighting, self.label_dropout = schedule, weighting, label_dropout

    def factor(self, logsnr: Tensor) -> Tensor:
        """Return ½ w / p for levels drawn evenly in u, of the shape and dtype of `logsnr`."""
        return 0.5 * self.weighting(logsnr) * torch.exp(-self.schedule.log_density(logsnr))

    def against(
        self, student: DenoiserFn, x: Tensor, target: Tensor, logsnr: Tensor, cond: Cond | None = None
    ) -> Tensor:
        """Return the weighted loss of each example, `(B,)`.

        Args:
            student: What is judged; a network by its own output.
            x: What it is shown, `(B, *D)`.
            target: The x0 it should answer, `(B, *D)`, without gradient.
            logsnr: `(B,)`.
            cond: Conditions.
        """
        eps = eps_from_x0(student.interpolant, x, target, level_for(x, logsnr))
        error, scale = eps_residual(student, x, target, eps, logsnr, cond)
        # the levels of a wide schedule ask for more digits than float32 has room for exponents: together they are tame
        factor = (self.factor(logsnr.double()) * scale.double()).to(x.dtype)
        return factor * error.square().flatten(1).mean(1)
