r"""What EM distillation and distribution matching share: a generator, a second network that follows it, and a push.

    x_1 = sigma_1 z_1,   x_(i+1) = alpha_(i+1) G(x_i) + sigma_(i+1) z_(i+1)      at the student's own levels, z normal
    x0  = G(x_i)                                                                 its answer at one of them, i at random
    x   = alpha x0 + sigma eps                                                   at a level of the schedule
    x0_q, x0_p                                                                   what teacher and student score answer

The student score is a copy of the teacher that goes on learning to denoise, on what the generator makes: x0_p is to
the student's distribution what x0_q is to the data's. Their difference is that of the scores,

    sigma (s_q - s_p) = eps_p - eps_q = (alpha / sigma) (x0_q - x0_p),

the direction that noisy samples should go to be the teacher's. A push along d with weight f has the loss, and gradient,

    ½ f mean |x0 - sg(x0 + d)|^2,      -f d / dimensions.

A student of one level is sampled by one step of DDIM from there: x = sigma_1 z is where samplers start. One of several
is sampled by `samplers/renoise.py`, whose steps the second line has.

References:
    Luo et al., "Diff-Instruct", 2023; Wang et al., "ProlificDreamer", 2023 (variational score distillation).
    Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", 2024, section 4.4 (several
    levels, reached by the student's own steps).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.noise_levels import U_MARGIN
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.gaussian import marginal
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


class GeneratorLoss(DistillationLoss):
    """Losses of a generator and of the network that follows it.

    Args:
        schedule: Its density draws the levels at which the two distributions are compared.
        weighting: Of the push, in eps units.
        score: Loss of the student score.
        logsnrs: The student's own levels, increasing from noise.
        u_min: Part of the schedule that is left out at its clean end, in [0, 1).
        u_max: Where the noisy end is left out, in (`u_min`, 1].
        label_dropout: See `DistillationLoss`; teacher, student and student score hear the same.

    Raises:
        ValueError: As `DistillationLoss`, or if the levels do not increase or the part of the schedule is empty.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        score: DenoisingLoss,
        logsnrs: Sequence[float],
        u_min: float = 0.0,
        u_max: float = 1.0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        self.logsnrs = [float(level) for level in logsnrs]
        rises = all(low < high for low, high in pairwise(self.logsnrs))
        if not self.logsnrs or not rises or not all(map(math.isfinite, self.logsnrs)):
            raise ValueError(f"logsnrs must be finite levels that increase, got {self.logsnrs}")
        if not 0.0 <= u_min < u_max <= 1.0:
            raise ValueError(f"needs 0 <= u_min < u_max <= 1, got u_min={u_min}, u_max={u_max}")
        self.score, self.u_min, self.u_max = score, u_min, u_max

    # ---- the generator -----------------------------------------------------------------------------------------------

    def start(self, student: DenoiserFn, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_1 `(B, *D)` for standard normal numbers `z` `(B, *D)`, and its level `(B,)`."""
        logsnr = torch.full((len(z),), self.logsnrs[0], dtype=torch.float64, device=z.device)
        return marginal(student.interpolant, torch.zeros_like(z), z, level_for(z, logsnr)), logsnr

    def generate(self, student: DenoiserFn, z: Tensor, cond: Cond | None) -> Tensor:
        """Return the x0 `(B, *D)` that the student makes of standard normal numbers `z` in its first step."""
        x, logsnr = self.start(student, z)
        return student(x, level_for(x, logsnr), cond)

    @torch.no_grad()
    def inputs(
        self, student: DenoiserFn, like: Tensor, cond: Cond | None, rng: StepRNG
    ) -> tuple[Tensor, Tensor]:
        """Return x_i `(B, *D)` and its level `(B,)`, each row at one of the levels at random.

        Args:
            student: Asked once for each level but the last, without gradient.
            like: Of the shape and dtype of the data.
            cond: Conditions.
            rng: Random numbers of this step.
        """
        x, logsnr = self.start(student, rng.randn("generator", like.shape[1:], dtype=like.dtype))
        place = (rng.rand("generator_step") * len(self.logsnrs)).long()
        found, at = x, logsnr
        for i, level in enumerate(self.logsnrs[1:], start=1):
            x0 = student(x, level_for(x, logsnr), cond)
            logsnr = torch.full_like(logsnr, level)
            z = rng.randn(f"generator_{i}", like.shape[1:], dtype=like.dtype)
            x = marginal(student.interpolant, x0, z, level_for(x, logsnr))
            at = torch.where(place >= i, logsnr, at)
            found = torch.where((place >= i).view(-1, *[1] * (x.ndim - 1)), x, found)
        # autocast may keep its copies of the weights, made here without gradient, for the call with gradient
        torch.clear_autocast_cache()
        return found, at

    def levels(self, rng: StepRNG) -> Tensor:
        """Return the levels at which the distributions are compared, `(B,)` float64."""
        u = self.u_min + (self.u_max - self.u_min) * rng.stratified("noise_level")
        return self.schedule(u.clamp(U_MARGIN, 1.0 - U_MARGIN))

    # ---- who learns what ---------------------------------------------------------------------------------------------

    def follow(
        self, score: DenoiserFn, student: DenoiserFn, like: Tensor, cond: Cond | None, rng: StepRNG
    ) -> LossTerms:
        """Return the losses of the student score, on samples of the student.

        Args:
            score: Learns.
            student: Asked without gradient.
            like: Of the shape and dtype of the data, whose labels are those of the samples.
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
        """
        cond = drop_labels(cond, self.label_dropout, rng)
        with torch.no_grad():
            x, logsnr = self.inputs(student, like, cond, rng)
            x0 = student(x, level_for(x, logsnr), cond)
        terms: LossTerms = self.score(score, x0, cond, rng)
        return terms

    @abstractmethod
    def forward(
        self,
        student: DenoiserFn,
        teacher: DenoiserFn,
        score: DenoiserFn,
        like: Tensor,
        cond: Cond | None,
        rng: StepRNG,
    ) -> LossTerms:
        """Return the losses of the student.

        Args:
            student: Learns.
            teacher: Never given a gradient.
            score: The student score; never given a gradient.
            like: Of the shape and dtype of the data, whose labels are those of the samples.
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
        """

    def pushed(self, x0: Tensor, direction: Tensor, factor: Tensor) -> Tensor:
        """Return the losses `(B,)` that push `x0` along `direction`.

        Args:
            x0: The student's answer, `(B, *D)`.
            direction: d, `(B, *D)`, without gradient.
            factor: f, `(B,)`.
        """
        # x0 less itself is exactly zero: no digit of the direction is lost, and where it is zero so is the gradient
        error = direction + (x0.detach() - x0)
        return 0.5 * factor.to(x0.dtype) * error.square().flatten(1).mean(1)

    def x0_factor(self, logsnr: Tensor) -> Tensor:
        """Return SNR w / p: the weight of a push in x0, `(B,)`."""
        return 2.0 * self.factor(logsnr) * torch.exp(logsnr)
