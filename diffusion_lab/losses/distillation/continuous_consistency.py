r"""Continuous-time consistency (sCM): the student's answer must not change along the path of the probability flow.

With d = sigma_data, in TrigFlow's coordinates, which no interpolant changes,

    t = atan(sigma / (alpha d)),     y = x / sqrt(alpha^2 d^2 + sigma^2) = cos(t) x0 / d + sin(t) eps,
    F = cos(t) eps_hat - sin(t) x0_hat / d,      x0_hat / d = cos(t) y - sin(t) F,

y is what a network with this sigma_data is shown. F is its own answer: v-prediction with d = 1, and less EDM's
residual; of any other prediction it is an affine function. Along a path of slope y' = dy/dt the answer changes by

    d/dt (x0_hat / d) = - cos(t) (F - y') - sin(t) (y + dF/dt),

the tangent, zero everywhere for the true consistency function and no other. Multiplied by cos(t),

    g     = - cos(t)^2 (F - y') - r (sin(t) cos(t) y + J)
    J     = sin(t) cos(t) dF/dt = dF/dy (sin(t) cos(t) y') - 2 dF/dlogsnr       by one forward-mode product
    g     <- g / (|g| + c),  |g| the root of the sum of squares over an example's dimensions, times sqrt(dimensions)
    loss  = ½ w / p cos(t)^2 mean |F - F_fixed - g|^2                           (`base.py`; w / p is 1 / cos(t)^2 for
                                                                                 weighting=snr_plus_one with d = 1)

so that its gradient is that of -F . g. The paper's loss is twice that, and its g d times ours, hence its c. The slope
y' is the teacher's F (distillation), or cos(t) eps - sin(t) x0 / d (training). r grows from 0, where F learns the slope
itself, to 1. Log-SNR is the time that the network is told, and sin(t) cos(t) dlogsnr/dt is the constant -2: nothing
divides by sin or cos, but for F of a guided teacher (by sin) and of an eps-prediction (by cos). Neither is dF/dlogsnr
damped at the ends, as the paper's dF/dt is by an embedding of t that is slow there.

With `uncertainty` the levels are balanced by a learned u(logsnr), loss e^-u + ½ u (`losses/uncertainty.py`), half of
the paper's adaptive weighting with w_phi = -u. `per_example` is ½ w / p cos(t)^2 mean g^2 before g is brought to one
length, at r = 1: the loss itself says nothing, being nearly the same number always.

References:
    Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024, sections 3 and 4 and
    algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoisers.network import NetworkDenoiser
from diffusion_lab.forward_mode import jvp
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms, level_for
from diffusion_lab.losses.distillation.base import DistillationLoss
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.losses.uncertainty import LogUncertainty
from diffusion_lab.losses.weightings import Weighting
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


def angle(interpolant: Interpolant, logsnr: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(cos t, sin t, n)`, `(B,)` each, with x = n y."""
    alpha, sigma = interpolant(logsnr)
    alpha = alpha * sigma_data
    n = torch.sqrt(alpha**2 + sigma**2)
    return alpha / n, sigma / n, n


def trig_velocity(
    denoiser: DenoiserFn, y: Tensor, logsnr: Tensor, cond: Cond | None = None, sigma_data: float = 1.0
) -> Tensor:
    """Return F of a denoiser, `(B, *D)`; of a network by its own output, without loss of digits.

    Args:
        denoiser: The denoiser.
        y: Noisy data in TrigFlow's coordinates, `(B, *D)`.
        logsnr: `(B,)`, finite.
        cond: Conditions.
        sigma_data: d.
    """
    cos, sin, n = angle(denoiser.interpolant, logsnr, sigma_data)
    x = broadcast_right(n, y) * y
    if not isinstance(denoiser, NetworkDenoiser):
        x0 = denoiser(x, logsnr, cond) / sigma_data
        return (broadcast_right(cos, y) * y - x0) / broadcast_right(sin, y)
    # raw = a x0 + b eps with x0 / d = cos y - sin F and eps = sin y + cos F
    a, b = denoiser.prediction.coefficients(*denoiser.interpolant(logsnr))
    a = a * sigma_data
    raw = denoiser.predict(x, logsnr, cond).raw
    return (raw - broadcast_right(a * cos + b * sin, y) * y) / broadcast_right(b * cos - a * sin, y)


class ContinuousConsistencyLoss(DistillationLoss):
    """Loss of continuous-time consistency.

    Args:
        schedule: See `DistillationLoss`; the paper draws ln(sigma / alpha) from a normal law, `LogNormal`.
        weighting: See `DistillationLoss`; the paper's is `SNRPlusOne`.
        label_dropout: See `DistillationLoss`.
        normalise: c, positive; None leaves the tangent as it is.
        uncertainty: Features of the learned balance of the levels, even; None for none.

    Raises:
        ValueError: As `DistillationLoss`, or if `normalise` is not positive.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        weighting: Weighting,
        label_dropout: float = 0.0,
        normalise: float | None = 0.1,
        uncertainty: int | None = None,
    ) -> None:
        super().__init__(schedule=schedule, weighting=weighting, label_dropout=label_dropout)
        if normalise is not None and not 0.0 < normalise < math.inf:
            raise ValueError(
                f"normalise must be positive, or null for tangents of any length, got {normalise}"
            )
        self.normalise = normalise
        self.uncertainty = None if uncertainty is None else LogUncertainty(features=uncertainty)

    @torch.no_grad()
    def tangent(
        self,
        student: DenoiserFn,
        y: Tensor,
        slope: Tensor,
        logsnr: Tensor,
        cond: Cond | None = None,
        sigma_data: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the two parts of g, `(B, *D)` each: that of the slope, and that which the ramp multiplies.

        Args:
            student: Asked once, forwards.
            y: Noisy data in TrigFlow's coordinates, `(B, *D)`.
            slope: y', `(B, *D)`.
            logsnr: `(B,)`.
            cond: Conditions.
            sigma_data: d.
        """
        cos, sin, _ = (broadcast_right(part, y) for part in angle(student.interpolant, logsnr, sigma_data))

        def answer(at: Tensor, level: Tensor) -> Tensor:
            return trig_velocity(student, at, level, cond, sigma_data)

        f, change = jvp(answer, (y, logsnr), (sin * cos * slope, torch.full_like(logsnr, -2.0)))
        return -(cos**2) * (f - slope), -(sin * cos * y + change)

    def forward(
        self,
        student: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        teacher: DenoiserFn | None = None,
        ramp: float = 1.0,
        again: Callable[[], None] | None = None,
    ) -> LossTerms:
        """Return the losses of clean examples `x0` `(B, *D)`.

        `total` is what is differentiated; `per_example` is what is left of the tangent, see the module.

        Args:
            student: Learns to answer alike along each path.
            x0: Clean data, images in [-1, 1].
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            teacher: Never given a gradient; None takes the slope from the data, consistency training.
            ramp: r, in [0, 1].
            again: Called between the student's two calls, to give the second the dropout of the first.
        """
        drawn, _ = NoiseLevels(schedule=self.schedule)(rng)
        logsnr = level_for(x0, drawn)
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        d = float(getattr(student, "sigma_data", 1.0))
        cos, sin, _ = (broadcast_right(part, x0) for part in angle(student.interpolant, logsnr, d))
        y = cos * x0 / d + sin * eps
        if teacher is None:
            slope = cos * eps - sin * x0 / d
        else:
            with torch.no_grad():
                slope = trig_velocity(teacher, y, logsnr, cond, d)
        f = trig_velocity(student, y, logsnr, cond, d)
        if again is not None:
            again()
        first, second = self.tangent(student, y, slope, logsnr, cond, d)
        factor = self.factor(drawn) * angle(student.interpolant, drawn, d)[0] ** 2
        factor = factor.to(x0.dtype)
        square = (f - f.detach() - self.brought_to_length(first + ramp * second)).square().flatten(1).mean(1)
        losses = factor * square
        if self.uncertainty is not None:
            u = self.uncertainty(drawn)
            losses = losses * torch.exp(-u) + 0.5 * u
        left = factor * (first + second).square().flatten(1).mean(1)
        return LossTerms(total=losses.mean(), per_example=left, logsnr=drawn)

    def brought_to_length(self, g: Tensor) -> Tensor:
        """Return the tangent `g` `(B, *D)` with a root mean square below one, or `g` itself."""
        if self.normalise is None:
            return g
        root = math.sqrt(g[0].numel())
        length = g.flatten(1).norm(dim=1)
        return g * broadcast_right(root / (length + self.normalise), g)
