r"""The variational bound on -log p(x0) as a loss, and VDM's way of training a schedule with it.

    loss_i = prior + reconstruction + diffusion,      in nats per dimension (`vlb_terms.py`)

`VariationalBound` takes any schedule with finite ends. `VDMLoss` takes one that learns, logsnr(u) = logsnr_max +
(logsnr_min - logsnr_max) m(u). In continuous time the bound depends on the end points alone; the curve m decides only
how much its estimate L = L(u, eps) varies. So, in one backward pass,

    the network, the end points    get  grad E[L]          the gradient of the bound
    the parameters of m            get  grad E[L²]         that of the variance, for E[L] does not depend on them:
                                        2 L (dL/dm grad m + dL/dm' grad m')

where L is the diffusion term of one example. dL/dm and dL/dm' pass through hooks that multiply them by 2 L, example by
example; nothing else is touched. With finitely many steps the bound does depend on m, which then learns from it.

References:
    Kingma, Salimans, Poole & Ho, "Variational Diffusion Models", 2021, section 5.1 (invariance), section 6 and
    appendix I.2 (variance minimisation), appendix I.1 (low-discrepancy times).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.losses.vlb_terms import (
    Levels,
    bits,
    continuous_diffusion,
    discrete_diffusion,
    prior_kl,
    reconstruction,
)
from diffusion_lab.process.schedules import Schedule
from diffusion_lab.process.schedules.learned import LearnedCurve
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class BoundTerms(LossTerms):
    """A bound and its parts; `per_example` is their sum.

    Attributes:
        diffusion: `(B,)`, nats per dimension, an unbiased estimate.
        prior: `(B,)`, nats per dimension, exact.
        reconstruction: `(B,)`, nats per dimension, an unbiased estimate.
    """

    diffusion: Tensor
    prior: Tensor
    reconstruction: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound, `(B,)`, in bits per dimension."""
        return bits(self.per_example)


class VariationalBound(nn.Module):
    """The bound of a batch, in nats per dimension.

    Args:
        schedule: Its end points are part of the model; its density draws the noise levels.
        levels: The values that the data can take.
        steps: T of the discrete bound; None: the continuous one.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: If `steps` is not positive, `label_dropout` outside [0, 1] or an end of the schedule infinite.
    """

    def __init__(
        self, *, schedule: Schedule, levels: Levels, steps: int | None = None, label_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise ValueError(f"{type(self).__name__} needs steps >= 1, or None, got {steps}")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}")
        self.schedule, self.levels, self.steps, self.label_dropout = schedule, levels, steps, label_dropout
        # one that is a module has seen to it itself, and may be on a device that cannot be asked
        if not isinstance(schedule, nn.Module) and not bool(
            torch.isfinite(torch.stack(self.ends("cpu"))).all()
        ):
            raise ValueError("a variational bound needs a schedule with finite ends")

    def ends(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return the highest and the lowest log-SNR, 0-d float64."""
        high, low = self.schedule(torch.arange(2, dtype=torch.float64, device=device))
        return high, low

    def step(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends s < t of the step of the discrete bound that `u` in [0, 1] lies in; they include t.

        Raises:
            TypeError: If the bound is the continuous one.
        """
        if self.steps is None:
            raise TypeError("the continuous bound has no steps")
        i = torch.floor(u * self.steps).clamp(max=self.steps - 1)
        return i / self.steps, (i + 1) / self.steps

    def diffusion(
        self, denoiser: DenoiserFn, x0: Tensor, eps: Tensor, cond: Cond | None, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the diffusion term of each example, nats per dimension, and its log-SNR, each `(B,)`.

        Args:
            denoiser: What is judged.
            x0: Data, `(B, *D)`.
            eps: Standard normal noise like `x0`.
            cond: Conditions, or None.
            u: Places on the schedule, `(B,)` float64, uniform on [0, 1].
        """
        if self.steps is None:
            logsnr = self.schedule(u)
            slope = -torch.exp(-self.schedule.log_density(logsnr))
            return continuous_diffusion(denoiser, x0, eps, logsnr, slope, cond), logsnr
        s, t = self.step(u)
        logsnr, logsnr_next = self.schedule(t), self.schedule(s)
        return discrete_diffusion(denoiser, x0, eps, logsnr, logsnr_next, self.steps, cond), logsnr

    def forward(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        logsnr: Tensor | None = None,
    ) -> BoundTerms:
        """Return the bounds of clean examples `x0` `(B, *D)`.

        Args:
            denoiser: What is judged.
            x0: Clean data, on the levels.
            cond: Conditions, or None.
            rng: Random numbers of this step for these rows.
            logsnr: `(B,)` levels for the diffusion term instead of drawn ones; the discrete bound takes the noisier
                end of the step that each lies in.

        Raises:
            ValueError: If (on the CPU) the data are not on the levels.
        """
        u = rng.stratified("noise_level") if logsnr is None else self.schedule.inverse(logsnr.double())
        eps = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        cond = drop_labels(cond, self.label_dropout, rng)
        diffusion, logsnr = self.diffusion(denoiser, x0, eps, cond, u)
        logsnr_max, logsnr_min = (end.to(x0.dtype) for end in self.ends(x0.device))
        prior = prior_kl(x0, logsnr_min)
        eps = rng.randn("reconstruction", x0.shape[1:], dtype=x0.dtype)
        rebuilt = reconstruction(x0, eps, logsnr_max, self.levels)
        per_example = prior + rebuilt + diffusion
        return BoundTerms(
            total=per_example.mean(),
            per_example=per_example,
            logsnr=logsnr.detach(),
            diffusion=diffusion,
            prior=prior,
            reconstruction=rebuilt,
        )


class VDMLoss(VariationalBound):
    """The bound with a schedule that learns: its end points from the bound, its curve from the variance.

    Args:
        schedule: The schedule that learns.
        levels: The values that the data can take.
        steps: T of the discrete bound, from which the curve learns like all else; None: the continuous one.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: See `VariationalBound`.
        TypeError: If the schedule does not learn.
    """

    schedule: LearnedCurve

    def __init__(
        self, *, schedule: LearnedCurve, levels: Levels, steps: int | None = None, label_dropout: float = 0.0
    ) -> None:
        if not isinstance(schedule, LearnedCurve):
            raise TypeError(
                f"VDMLoss needs a schedule that learns (learned, learned_linear), not {type(schedule).__name__}"
            )
        super().__init__(schedule=schedule, levels=levels, steps=steps, label_dropout=label_dropout)

    def diffusion(
        self, denoiser: DenoiserFn, x0: Tensor, eps: Tensor, cond: Cond | None, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `VariationalBound.diffusion`."""
        if self.steps is not None:
            return super().diffusion(denoiser, x0, eps, cond, u)
        m, m_slope = self.schedule.curve(u)
        squared = SquareGradient()
        m, m_slope = squared.on(m), squared.on(m_slope)
        logsnr = self.schedule.between(m)
        fall = self.schedule.logsnr_min.double() - self.schedule.logsnr_max.double()
        loss = continuous_diffusion(denoiser, x0, eps, logsnr, fall * m_slope, cond)
        squared.loss = loss.detach()
        return loss, logsnr


class SquareGradient:
    """Turns the gradient of a sum of losses L_i into that of the sum of L_i², for those tensors that it is put on.

    Attributes:
        loss: The losses L, `(B,)`, known only after the tensors were used.
    """

    loss: Tensor

    def on(self, values: Tensor) -> Tensor:
        """Return `values` `(B,)`, one an example, whose gradient will be multiplied by 2 L."""
        if not values.requires_grad:
            return values
        values = values.view_as(values)
        hook: Callable[[Tensor], Tensor] = lambda grad: grad * (2.0 * self.loss.to(grad))  # noqa: E731
        values.register_hook(hook)
        return values
