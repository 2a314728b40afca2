r"""EM distillation: the one-step student is fitted, by maximum likelihood, to noisy data of the teacher.

At each level the student says x = alpha g(z) + sigma eps, a model with the latent z. Its likelihood rises with

    E[ grad log p(x | z) ],     x of the teacher,   z ~ p(z | x) of the student,

and (x, z), or (eps, z), has the density (q / p)(x) N(eps) N(z): for which Langevin's steps are taken from fresh
samples of the student. With r = alpha / sigma and the gap D = x0_q - x0_p of `student_score.py`,

    eps <- (1 - a) eps + a r D + sqrt(2 a) n            a = gamma_eps
    z   <- (1 - b) z + b r^2 J^T D + sqrt(2 b) m        b = gamma_z,   J of g at z           E-step, K times
    e   <- (1 - a) e + a r D                            from 0: what eps has beyond noise
    loss = ½ (w / p) mean |e + r (sg g(z) - g(z))|^2    at the last z, which is held fixed   M-step

The linear part of the noise in eps, its start included, goes through the same recursion without D; taking it off leaves
e, so that where both scores agree the gradient is zero, not only its mean. The noise in z stays. K = 1 with b = 0 is
variational score distillation, the gradient times a.

References:
    Xie et al., "EM Distillation for One-step Diffusion Models", 2024, algorithms 1 and 2, section 3.3 (cancellation).
"""

from __future__ import annotations

import math
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


class EMLoss(GeneratorLoss):
    """Loss of EM distillation.

    Args:
        schedule: See `GeneratorLoss`.
        weighting: See `GeneratorLoss`; the paper's, sigma^2 / alpha^2, is the plain squared error in x0.
        score: See `GeneratorLoss`.
        logsnrs: See `GeneratorLoss`; one level.
        langevin_steps: K.
        gamma_eps: Length of Langevin's steps in eps, in (0, 1].
        gamma_z: In z, in [0, 1]; 0 leaves z alone, and asks for no Jacobian.
        cancel_noise: Whether the noise in eps is taken off.
        u_min: See `GeneratorLoss`.
        u_max: See `GeneratorLoss`.
        label_dropout: See `GeneratorLoss`.

    Raises:
        ValueError: As `GeneratorLoss`, or if there is more than one level, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        score: DenoisingLoss,
        logsnrs: Sequence[float],
        langevin_steps: int = 16,
        gamma_eps: float = 0.16,
        gamma_z: float = 1.6e-5,
        cancel_noise: bool = True,
        u_min: float = 0.0,
        u_max: float = 1.0,
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
        if len(self.logsnrs) != 1:
            raise ValueError(
                f"EM distillation is for one step: logsnrs must be one level, got {self.logsnrs}"
            )
        if langevin_steps < 1:
            raise ValueError(f"langevin_steps must be at least 1, got {langevin_steps}")
        if not 0.0 < gamma_eps <= 1.0 or not 0.0 <= gamma_z <= 1.0:
            raise ValueError(
                f"needs gamma_eps in (0, 1] and gamma_z in [0, 1], got {gamma_eps} and {gamma_z}"
            )
        self.langevin_steps, self.gamma_eps, self.gamma_z = langevin_steps, gamma_eps, gamma_z
        self.cancel_noise = cancel_noise

    @torch.no_grad()
    def langevin(
        self,
        student: DenoiserFn,
        teacher: DenoiserFn,
        score: DenoiserFn,
        z: Tensor,
        eps: Tensor,
        logsnr: Tensor,
        cond: Cond | None,
        rng: StepRNG,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(z, eps, e)`, each `(B, *D)`, after K steps.

        Args:
            student: The generator.
            teacher: Says x0_q.
            score: Says x0_p.
            z: Where the latents start, standard normal, `(B, *D)`.
            eps: Where the noise starts, standard normal, `(B, *D)`.
            logsnr: `(B,)`, the same in all steps.
            cond: Conditions.
            rng: Random numbers of this step.
        """
        a, b = self.gamma_eps, self.gamma_z
        level = level_for(z, logsnr)
        r = broadcast_right(torch.exp(0.5 * level), z)
        drifted, x0 = torch.zeros_like(eps), torch.empty(0)
        for i in range(self.langevin_steps):
            if i == 0 or b > 0.0:
                with torch.set_grad_enabled(b > 0.0):
                    x0 = self.generate(student, z.requires_grad_(b > 0.0), cond)
            x = marginal(student.interpolant, x0.detach(), eps, level)
            gap = teacher(x, level, cond) - score(x, level, cond)
            drifted = (1.0 - a) * drifted + a * r * gap
            noise = rng.randn(f"langevin_eps_{i}", z.shape[1:], dtype=z.dtype)
            eps = (1.0 - a) * eps + a * r * gap + math.sqrt(2.0 * a) * noise
            if b > 0.0:
                (pull,) = torch.autograd.grad(x0, z, r**2 * gap)
                noise = rng.randn(f"langevin_z_{i}", z.shape[1:], dtype=z.dtype)
                z = (1.0 - b) * z.detach() + b * pull + math.sqrt(2.0 * b) * noise
        # see `GeneratorLoss.inputs`
        torch.clear_autocast_cache()
        return z.detach(), eps, drifted

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
        logsnr = self.levels(rng)
        z, eps = (rng.randn(tag, like.shape[1:], dtype=like.dtype) for tag in ("generator", "noise"))
        z, eps, drifted = self.langevin(student, teacher, score, z, eps, logsnr, cond, rng)
        residual = drifted if self.cancel_noise else eps
        x0 = self.generate(student, z, cond)
        direction = residual * broadcast_right(torch.exp(-0.5 * level_for(x0, logsnr)), x0)
        per_example = self.pushed(x0, direction, self.x0_factor(logsnr))
        return LossTerms(total=per_example.mean(), per_example=per_example, logsnr=logsnr)
