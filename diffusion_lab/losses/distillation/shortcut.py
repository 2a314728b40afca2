r"""Shortcut models: one student for 1, 2, 4 .. M steps, told how many; it teaches itself to take two of them at once.

    x = alpha x0 + sigma eps at t = i / n,  i ~ U{1 .. n}           on the u-axis of the schedule
    most examples        n = M, the shortest of steps               x0~ = x0, or the teacher's answer: flow matching
    the rest             n ~ U{1, 2, 4 .. M/2}
        x_1  = the student's answer at t, told 2 n
        x'   = the DDIM step with x_1 from t to t - 1 / (2 n)
        x_2  = its answer at x', told 2 n
        x0~  = the x0 of the one DDIM step from t to where x_2 leads from there, t - 1 / n
    loss = ½ w / p |eps~ - eps_hat(x, n)|^2                         (`base.py`)

x_1 and x_2 are held fixed and joined as those of progressive distillation (`teacher_steps.joined`), which this is in
one network and all at once. In the time of rectified flow a DDIM step is one of Euler, and x0~ says
s(x, t, 2 d) = ½ s(x, t, d) + ½ s(x', t - d, d), the paper's. As everywhere a step to t = 0 ends at the answer itself.
The paper counts d = 1 / M as d = 0, and so does this: at M steps the student is an ordinary denoiser.

References:
    Frans, Hafner, Levine & Abbeel, "One Step Diffusion via Shortcut Models", 2024, section 3 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.teacher_steps import joined
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import ddim_step, marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import STEPS, Cond, DenoiserFn


class ShortcutLoss(DistillationLoss):
    """Loss of shortcut models.

    Args:
        schedule: See `DistillationLoss`.
        weighting: See `DistillationLoss`; the paper's is `VelocityMSE`.
        label_dropout: See `DistillationLoss`.
        share: Of the examples by which the student teaches itself, in [0, 1]; the paper's is a quarter.

    Raises:
        ValueError: As `DistillationLoss`, or if `share` is out of range.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        label_dropout: float = 0.0,
        share: float = 0.25,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.share = share

    def levels(self, u: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-SNRs at the start, the middle and the end of a step, `(B,)` each; +inf is clean.

        Args:
            u: Draws in [0, 1], `(B,)`.
            steps: n, `(B,)`.
        """
        i = torch.ceil(u * steps).clamp(min=1.0).minimum(steps)
        # a schedule with an infinite end is not asked for it, but just before
        start = self.schedule((i / steps).clamp(max=1.0 - U_MARGIN))
        middle = self.schedule((i - 0.5) / steps)
        end = torch.where(i == 1.0, torch.inf, self.schedule((i - 1.0).clamp(min=0.5) / steps))
        return start, middle, end

    @torch.no_grad()
    def target(
        self,
        reference: DenoiserFn,
        x: Tensor,
        levels: tuple[Tensor, Tensor, Tensor],
        steps: Tensor,
        cond: Cond | None = None,
    ) -> Tensor:
        """Return x0~ of examples by which the student teaches itself, `(B, *D)`.

        Args:
            reference: The student as it is, or its average.
            x: Noisy data at the start, `(B, *D)`.
            levels: As `levels` returns them.
            steps: n, `(B,)`.
            cond: Conditions.
        """
        start, middle, end = levels
        told = {**(cond or {}), STEPS: 2.0 * steps}
        first = reference(x, start, told)
        second = reference(ddim_step(reference.interpolant, x, first, start, middle), middle, told)
        # as in `modules/distillation/consistency.py`: autocast's copies of the weights, made without gradient
        torch.clear_autocast_cache()
        return joined(first, second, start, middle, end)

    def forward(
        self,
        student: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        finest: int | None = None,
        teacher: DenoiserFn | None = None,
        reference: DenoiserFn | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Args:
            student: Told the number of steps as cond["steps"].
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            finest: M, a power of two above 1; None asks the student, a `ShortcutDenoiser`.
            teacher: What the student answers at M steps; None takes the data's x0. Never given a gradient.
            reference: The student where it makes targets; None asks `student`.
        """
        m = int(getattr(student, "finest", 0)) if finest is None else finest
        u = rng.stratified("noise_level")
        own = rng.bernoulli("self_consistency", self.share)
        drawn = torch.exp2(torch.floor(rng.rand("steps") * (m.bit_length() - 1)))
        steps = torch.where(own, drawn, float(m))
        levels = self.levels(u, steps)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        x = marginal(student.interpolant, x0, eps, level_for(x0, levels[0]))
        target, rows = x0, own.nonzero()[:, 0]
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x, levels[0], cond)
        if len(rows):
            some = None if cond is None else {name: value[rows] for name, value in cond.items()}
            start, middle, end = (level[rows] for level in levels)
            asked = student if reference is None else reference
            taught = self.target(asked, x[rows], (start, middle, end), steps[rows], some)
            target = target.index_copy(0, rows, taught)
        told = {**(cond or {}), STEPS: steps}
        per_example = self.against(student, x, target, levels[0], told)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=levels[0])
