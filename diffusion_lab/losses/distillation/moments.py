r"""Moment matching: wherever a step of the student leads, it looks like clean data to whoever denoises it.

    s ~ U[0, 1],  delta ~ U[0, 1 / k],  t = min(s + delta, 1)         on the u-axis of the schedule, k steps
    z_t = alpha x0 + sigma eps                                        at t
    x~  = the student's answer at t                                   g_eta(z_t, t)
    z_s ~ q(z_s | z_t, x~), the posterior, without gradient

What is to hold is E[x~ | z_s] = E[x0 | z_s] at every s. The right side is the teacher's answer g_theta(z_s, s); the
left one is learnt by a second denoiser, the auxiliary g_phi. The two learn in turn (`AlternatingLoss`):

    auxiliary   L = w(s) ( |x~ - g_phi|^2 + r |g_theta - g_phi|^2 )         r = `regulariser`, the paper's is 1
    student     L = w(s) x~ . (g_phi - g_theta)                             a gradient through x~ alone

The second term keeps the auxiliary near the teacher. Its minimum is g_phi = (E[x~ | z_s] + r g_theta) / (1 + r), so it
divides the student's gradient by 1 + r and does not turn it. L of the student is no distance: its gradient pushes x~ by
w (g_theta - g_phi), its value may be negative.

w(s) is the weight of the squared x0 error that `weighting` stands for at evenly drawn s: SNR + 1 for
`weighting=snr_plus_one`. The scalar product and the squares are means over the data's dimensions, not sums.

References:
    Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment Matching", 2024,
    algorithms 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.distillation.rewarded import Rewarded
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.broadcast import scaled_add
from diffusion_lab.process.gaussian import marginal, posterior
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn

Learner = Literal["student", "auxiliary"]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that the student took.

    Attributes:
        start: Log-SNR of t, `(B,)`.
        end: Log-SNR of s, `(B,)`, not below `start`.
        x: z_t, `(B, *D)`.
        x0: x~, `(B, *D)`, with the gradient that the caller allows.
        x_next: z_s, `(B, *D)`, without.
        cond: Conditions.
    """

    start: Tensor
    end: Tensor
    x: Tensor
    x0: Tensor
    x_next: Tensor
    cond: Cond | None


class MomentLoss(DistillationLoss):
    """What both algorithms share: the student's step, the weight, and how the student is pushed.

    Args:
        schedule: See `DistillationLoss`.
        weighting: See `DistillationLoss`; the teacher's own is the natural one.
        label_dropout: See `DistillationLoss`.

    Raises:
        ValueError: As `DistillationLoss`.
    """

    def levels(self, u: Tensor, delta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return the log-SNRs of t and s, `(B,)` each.

        Args:
            u: s, `(B,)` in [0, 1].
            delta: k delta, `(B,)` in [0, 1].
            steps: k.
        """
        t = (u + delta / steps).clamp(U_MARGIN, 1.0 - U_MARGIN)
        return self.schedule(t), self.schedule(u.clamp(U_MARGIN, 1.0 - U_MARGIN))

    def step(
        self,
        student: DenoiserFn,
        x: Tensor,
        z: Tensor,
        start: Tensor,
        end: Tensor,
        cond: Cond | None = None,
    ) -> Taken:
        """Let the student step.

        Args:
            student: Asked once.
            x: z_t, `(B, *D)`.
            z: Standard normal numbers, `(B, *D)`.
            start: `(B,)`.
            end: `(B,)`.
            cond: Conditions.
        """
        x0 = student(x, start, cond)
        mean, variance, _ = posterior(student.interpolant, x, x0.detach(), start, end)
        x_next = scaled_add(mean, variance.sqrt(), z)
        return Taken(start=start, end=end, x=x, x0=x0, x_next=x_next, cond=cond)

    def draw(self, student: DenoiserFn, x0: Tensor, cond: Cond | None, rng: StepRNG, steps: int) -> Taken:
        """Draw noise levels and noise for clean examples `x0` `(B, *D)`, and let the student step."""
        start, end = self.levels(rng.stratified("noise_level"), rng.rand("length"), steps)
        eps, z = (rng.randn(tag, x0.shape[1:], dtype=x0.dtype) for tag in ("noise", "step"))
        cond = drop_labels(cond, self.label_dropout, rng)
        x = marginal(student.interpolant, x0, eps, level_for(x0, start))
        return self.step(student, x, z, start, end, cond)

    def weight(self, logsnr: Tensor) -> Tensor:
        """Return w `(B,)` in float64: what |x0 error|^2 counts at `logsnr`."""
        logsnr = logsnr.double()
        return 2.0 * self.factor(logsnr) * torch.exp(logsnr)

    def push(self, taken: Taken, difference: Tensor) -> Tensor:
        """Return the student's loss of each example, `(B,)`.

        Args:
            taken: Its step, with gradient.
            difference: What it must move against, g_phi - g_theta, `(B, *D)`.
        """
        along = (taken.x0 * difference.detach()).flatten(1).mean(1)
        return self.weight(taken.end).to(along.dtype) * along

    def apart(self, taken: Taken, difference: Tensor) -> Tensor:
        """Return w |difference|^2, `(B,)`: a distance, to compare and to plot."""
        square = difference.detach().square().flatten(1).mean(1)
        return self.weight(taken.end).to(square.dtype) * square


class AlternatingLoss(MomentLoss):
    """Loss of the auxiliary, or of the student.

    Args:
        schedule: See `MomentLoss`.
        weighting: See `MomentLoss`.
        label_dropout: See `MomentLoss`.
        regulariser: r, how strongly the auxiliary is drawn to the teacher; 0 not at all.

    Raises:
        ValueError: As `MomentLoss`, or if `regulariser` is negative.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        label_dropout: float = 0.0,
        regulariser: float = 1.0,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if not 0.0 <= regulariser < float("inf"):
            raise ValueError(f"regulariser must be 0 or more, got {regulariser}")
        self.regulariser = regulariser

    def fit(self, auxiliary: DenoiserFn, taken: Taken, answer: Tensor) -> Tensor:
        """Return the auxiliary's loss of each example, `(B,)`.

        Args:
            auxiliary: A network is judged by its own output.
            taken: The student's step.
            answer: The teacher's at its end, `(B, *D)`.
        """
        r, x0, answer = self.regulariser, taken.x0.detach(), answer.detach()
        # both squares at once: they are that of the distance to the weighted mean, and a constant
        middle = (x0 + r * answer) / (1.0 + r)
        judged = self.against(auxiliary, taken.x_next, middle, taken.end, taken.cond)
        apart = (x0 - answer).square().flatten(1).mean(1)
        return 2.0 * (1.0 + r) * judged + self.weight(taken.end).to(apart.dtype) * (r / (1.0 + r)) * apart

    def forward(
        self,
        student: DenoiserFn,
        auxiliary: DenoiserFn,
        teacher: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        steps: int,
        learner: Learner,
        rewarded: Rewarded | None = None,
        reference: DenoiserFn | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        Of the student's turn `total` is the mean of what pushes it, and `per_example` how far apart the two moments
        are, w(s) |g_phi - g_theta|^2.

        Args:
            student: The few-step denoiser.
            auxiliary: Asked right after the teacher.
            teacher: Never given a gradient.
            x0: Clean data, images in [-1, 1]; the student's own samples where it is rewarded.
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            steps: k.
            learner: Whose loss it is; nobody else gets a gradient.
            rewarded: What else the student is pushed by.
            reference: The student before it was rewarded.
        """
        with torch.set_grad_enabled(learner == "student" and torch.is_grad_enabled()):
            taken = self.draw(student, x0, cond, rng, steps)
        with torch.no_grad():
            answer = teacher(taken.x_next, taken.end, taken.cond)
        if learner == "auxiliary":
            per_example = self.fit(auxiliary, taken, answer)
            return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=taken.end)
        with torch.no_grad():
            difference = auxiliary(taken.x_next, taken.end, taken.cond) - answer
        pushed = self.push(taken, difference)
        if rewarded is not None:
            assert reference is not None, "a reward needs the student as it was"
            with torch.no_grad():
                before = reference(taken.x, taken.start, taken.cond)
            pushed = pushed + rewarded(taken.x0, before, taken.cond)
        return LossTerms(total=pushed.mean(), per_example=self.apart(taken, difference), logsnr=taken.end)
