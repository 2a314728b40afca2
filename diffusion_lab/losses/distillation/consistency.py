r"""Multistep consistency: on each of N segments of time, one step of the student is the teacher's whole path.

    T = N round(N_teacher / N),  i ~ U{1 .. T}                 (`TeacherSteps` grows N_teacher with the clock)
    t = i / T,  s = t - 1 / T,  t0 = the start of the segment that t lies in      on the u-axis of the schedule
    x    = alpha x0 + sigma eps                                at t
    x_T  = the teacher's answer (distillation), or x0 (training)
    x_s  = the step from t to s with x_T, by aDDIM with
           x_var = fraction |x_T' - x0|^2 / d, x_T' without guidance; for x_T = x0 it is zero, DDIM
    x_r  = the student's own answer at s, held fixed
    x0~  = the x0 of the one DDIM step from t to where x_r leads from s, which is t0
    loss = (SNR + 1) rho(x0~ - x0_hat)                         for weighting=snr_plus_one, any other in its place

Where s is t0 the segment is done: x0~ is that of the step from t to s, and the student is not heard. N = 1 is an
ordinary consistency model, x0~ = x_r; T = N with x0 is ordinary diffusion, x0~ = x0.

    rho = ½ mean D^2                                           squared
    rho = sqrt(mean D^2 + e^2) - e                             Huber, means are over the data's dimensions

Inverting a DDIM step divides by nearly nothing where t is close to t0, so x0~ is made of both answers instead
(`teacher_steps.joined`). As everywhere, a step to t = 0 ends at the answer itself, and nothing is clipped.

References:
    Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024, algorithms 1 and 3.
    Song, Dhariwal, Chen & Sutskever, "Consistency Models", 2023 (N = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, eps_residual, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.teacher_steps import adjusted, joined
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import ddim_step, eps_from_x0, marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class TeacherSteps:
    """How many steps the teacher takes, a function of the clock: evenly in the logarithm from `first` to `last`.

    Args:
        first: At the start.
        last: When `part` of the run is done, and from then on.
        max_images: Length of the run.
        part: In [0, 1]; 0 begins with `last`.

    Raises:
        ValueError: If a number of steps or `max_images` is below 1, or `part` outside [0, 1].
    """

    first: int = 64
    last: int = 1280
    max_images: int
    part: float = 0.5

    def __post_init__(self) -> None:
        if min(self.first, self.last, self.max_images) < 1 or not 0.0 <= self.part <= 1.0:
            raise ValueError(
                f"TeacherSteps needs first, last, max_images >= 1 and part in [0, 1], got {self}"
            )

    def __call__(self, images_seen: int, segments: int) -> int:
        """Return T, the multiple of `segments` next to N_teacher, at least one step a segment."""
        length = self.part * self.max_images
        done = min(1.0, images_seen / length) if length else 1.0
        steps = math.exp((1.0 - done) * math.log(self.first) + done * math.log(self.last))
        return segments * max(1, round(steps / segments))


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Log-SNRs of a batch, `(B,)` each.

    Attributes:
        start: At t.
        middle: At s; +inf is clean.
        end: At t0; +inf is clean.
        done: Whether s is t0.
        asked: `middle`, but where the student is not heard a level that it may be asked at.
    """

    start: Tensor
    middle: Tensor
    end: Tensor
    done: Tensor
    asked: Tensor


class ConsistencyLoss(DistillationLoss):
    """Loss of multistep consistency.

    Args:
        schedule: See `DistillationLoss`.
        weighting: See `DistillationLoss`; the paper's is `SNRPlusOne`.
        label_dropout: See `DistillationLoss`.
        huber: e, in units of the data, above 0; None for the squared loss, which e = 1 nearly is.
        x_var_fraction: Share of the teacher's square error by which its noise is lengthened; 0 steps by DDIM.

    Raises:
        ValueError: As `DistillationLoss`, or if `huber` or `x_var_fraction` is out of range.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        label_dropout: float = 0.0,
        huber: float | None = 1e-4,
        x_var_fraction: float = 0.75,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if huber is not None and not 0.0 < huber < math.inf:
            raise ValueError(f"huber must be positive, or null for the squared loss, got {huber}")
        if not 0.0 <= x_var_fraction <= 1.0:
            raise ValueError(f"x_var_fraction must be in [0, 1], got {x_var_fraction}")
        self.huber, self.x_var_fraction = huber, x_var_fraction

    def levels(self, u: Tensor, segments: int, steps: int) -> Levels:
        """Return the levels for draws `u` `(B,)` in [0, 1], T = `steps`.

        Raises:
            ValueError: If the segments do not have equally many steps.
        """
        if segments < 1 or steps < 1 or steps % segments:
            raise ValueError(f"{steps} teacher steps do not share out among {segments} segments")
        length = steps // segments
        i = torch.ceil(u * steps).clamp(1.0, steps)
        first = torch.floor((i - 1.0) / length) * length
        # a schedule with an infinite end is not asked for it, but just before
        start = self.schedule((i / steps).clamp(max=1.0 - U_MARGIN))
        middle, end = (
            torch.where(at == 0.0, torch.inf, self.schedule(torch.where(at == 0.0, 0.5, at / steps)))
            for at in (i - 1.0, first)
        )
        done = i - 1.0 == first
        return Levels(start=start, middle=middle, end=end, done=done, asked=torch.where(done, start, middle))

    @torch.no_grad()
    def target(
        self,
        reference: DenoiserFn,
        x: Tensor,
        x_teacher: Tensor,
        levels: Levels,
        cond: Cond | None = None,
        x_var: Tensor | None = None,
    ) -> Tensor:
        """Return x0~ `(B, *D)`.

        Args:
            reference: The student as it is.
            x: Noisy data at t, `(B, *D)`.
            x_teacher: x_T `(B, *D)`.
            levels: As `levels` returns them.
            cond: Conditions.
            x_var: Of aDDIM, `(B,)`; None steps by DDIM.
        """
        process, start, middle, first = reference.interpolant, levels.start, levels.middle, x_teacher
        if x_var is not None:
            first = adjusted(process, x, first, start, middle, lambda _: x_var)
        between = ddim_step(process, x, first, start, middle)
        second = reference(between, levels.asked, cond)
        # where the segment is done no step is left to join: what `joined` says there may be nan, and is not taken
        done = levels.done.view(-1, *[1] * (x.ndim - 1))
        return torch.where(done, first, joined(first, second, start, middle, levels.end))

    def rho(
        self, student: DenoiserFn, x: Tensor, target: Tensor, logsnr: Tensor, cond: Cond | None
    ) -> Tensor:
        """Return the weighted loss of each example, `(B,)`; the arguments are those of `against`."""
        if self.huber is None:
            return self.against(student, x, target, logsnr, cond)
        eps = eps_from_x0(student.interpolant, x, target, level_for(x, logsnr))
        error, scale = eps_residual(student, x, target, eps, logsnr, cond)
        # of D, by |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2, in float64: at either end one of the two is tiny
        snr = torch.exp(logsnr.double())
        square = (scale.double() / snr) * error.double().square().flatten(1).mean(1)
        rho = square / (torch.sqrt(square + self.huber**2) + self.huber)
        return (2.0 * self.factor(logsnr.double()) * snr * rho).to(x.dtype)

    def forward(
        self,
        student: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        segments: int,
        steps: int,
        teacher: DenoiserFn | None = None,
        plain: DenoiserFn | None = None,
        reference: DenoiserFn | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Args:
            student: Learns to go to the start of its segment in one step.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            segments: N, steps of the student.
            steps: T, steps of the teacher over all segments.
            teacher: Never given a gradient; None takes x0 in place of its answer, consistency training.
            plain: The teacher without guidance, for x_var; None where `teacher` has none.
            reference: The student where it makes the target, with the dropout that `student` is going to have; None
                asks `student`.
        """
        levels = self.levels(rng.stratified("noise_level"), segments, steps)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        x = marginal(student.interpolant, x0, eps, level_for(x0, levels.start))
        x_teacher, x_var = x0, None
        if teacher is not None:
            with torch.no_grad():
                x_teacher = teacher(x, levels.start, cond)
                if self.x_var_fraction > 0.0:
                    answer = x_teacher if plain is None else plain(x, levels.start, cond)
                    x_var = self.x_var_fraction * (answer - x0).double().square().flatten(1).mean(1)
        target = self.target(student if reference is None else reference, x, x_teacher, levels, cond, x_var)
        per_example = self.rho(student, x, target, levels.start, cond)
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=levels.start)
