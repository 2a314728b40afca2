r"""DPM-Solver++ (3M): third order from one call a step, by remembering two outputs.

With half log-SNRs lam and h = (logsnr_next - logsnr) / 2, the step is exact if x0 is a polynomial in s = (lam' - lam)
/ h, here Newton's through the last outputs, x0_k being that at lam_k and r_k = (lam - lam_k) / h, so s = -r_k:

    x0(s) = x0 + d1 s + d2 s^2,
    e1 = (x0 - x0_1) / r_1,    e2 = (x0_1 - x0_2) / (r_2 - r_1),    d2 = (e1 - e2) / r_2,    d1 = e1 + r_1 d2,
    x_next = (sigma_next / sigma) x + alpha_next (1 - e^{-h}) D,    D = x0 + w1 d1 + w2 d2,
    w1 = 1 / (1 - e^{-h}) - 1 / h,    w2 = 1 / (1 - e^{-h}) - 2 w1 / h,

since alpha_next int_0^h e^{-(h - t)} (t / h)^k dt = alpha_next (1 - e^{-h}) w_k. With one output remembered d2 = 0
(order 2), with none D = x0 (order 1).

Public implementations (the authors', diffusers, k-diffusion's 3m_sde) subtract alpha_next phi_3 d2 with phi_3 = w1 (1 -
e^{-h}) / h - 1/2, the weight that belongs to x0(s) = ... + d2 s^2 / 2: they take d2, half the second derivative, for
the whole of it. That leaves an error of d2 h / 6 in a step, and as d2 is of order h^2 their third order is
asymptotically second, if with a small constant: with few steps either may be the closer. `half_curvature` does as
they do.

The state has no memory at the first step. Climbing 1, 2, 3 ("ladder") starts with one step of local error h^2, which
also limits the global order to two, again with a small constant; `start="midpoint"` takes the first step with
DPM-Solver++ (2S), whose second call serves the polynomial too.

References:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022, section 4 (the
        expansion; of the multistep solvers it writes out the second order); algorithm 1 for the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import Sampler, State, Stepper, check_grid
from diffusion_lab.typing import Cond, DenoiserFn, OnStep

FEW = 15
"""With fewer steps than this, the last but one is taken with second order: diffusers' number."""


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP3M(Stepper):
    """Multistep DPM-Solver++ of third order in data prediction. One call of the denoiser a step.

    Args:
        lower_order_final: Whether the step before the last is of second order when there are fewer than 15 steps. The
            last is of first order in any case: it returns the denoiser's output.
        start: "ladder" climbs through first and second order; "midpoint" spends a second call on the first step of
            finite length, so that order 3 is reached.
        half_curvature: Whether to halve the quadratic term, as public implementations do; order 2.

    Raises:
        ValueError: If `start` is another word.
    """

    lower_order_final: bool = True
    start: Literal["ladder", "midpoint"] = "ladder"
    half_curvature: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("ladder", "midpoint"):
            raise ValueError(f"start is 'ladder' or 'midpoint', got {self.start!r}")

    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        rng: SampleRNG | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """See `Stepper.__call__`."""
        run: Sampler = super().__call__
        if self.lower_order_final and 2 < len(grid) <= FEW:
            # a step does not see the grid, so the level that the last but one leads to is told to another object
            last = check_grid(grid)[-2]
            run = _LowerOrderFinal(last=last, start=self.start, half_curvature=self.half_curvature)
        return run(denoiser, x, grid, cond=cond, rng=rng, on_step=on_step)

    def _remembered(self, logsnr_next: Tensor) -> int:
        """How many earlier outputs the step to `logsnr_next` may use."""
        return 2

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `[(x0, lam), ...]` of at most two earlier calls, newest first."""
        interpolant, x0 = denoiser.interpolant, denoiser(x, logsnr)
        earlier = [] if state is None else state
        if bool((torch.isposinf(logsnr_next) | torch.isneginf(logsnr)).all()):
            # an output at pure noise lies infinitely far back and is not kept
            return ddim_step(interpolant, x, x0, logsnr, logsnr_next), None
        lam, lam_next = 0.5 * logsnr, 0.5 * logsnr_next
        if not earlier and self.start == "midpoint":
            middle = lam + lam_next
            x0_middle = denoiser(ddim_step(interpolant, x, x0, logsnr, middle), middle)
            x_next = ddim_step(interpolant, x, x0_middle, logsnr, logsnr_next)
            return x_next, [(x0_middle, 0.5 * middle), (x0, lam)]
        h = lam_next - lam
        D = self._averaged(x0, lam, h, earlier[: self._remembered(logsnr_next)])
        return ddim_step(interpolant, x, D, logsnr, logsnr_next), [(x0, lam), *earlier][:2]

    def _averaged(self, x0: Tensor, lam: Tensor, h: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return D, the average of x0's polynomial over the step."""
        if not earlier:
            return x0
        full = -1 / torch.expm1(-h)
        w1 = full - 1 / h
        x0_1, lam_1 = earlier[0]
        r_1 = (lam - lam_1) / h
        e1 = broadcast_right(1 / r_1, x0) * (x0 - x0_1)
        if len(earlier) == 1:
            return x0 + broadcast_right(w1, x0) * e1
        w2 = full - 2 * w1 / h
        if self.half_curvature:
            w2 = 0.5 * w2
        x0_2, lam_2 = earlier[1]
        r_2 = (lam - lam_2) / h
        e2 = broadcast_right(1 / (r_2 - r_1), x0) * (x0_1 - x0_2)
        d2 = broadcast_right(1 / r_2, x0) * (e1 - e2)
        d1 = e1 + broadcast_right(r_1, x0) * d2
        return x0 + broadcast_right(w1, x0) * d1 + broadcast_right(w2, x0) * d2


@dataclass(frozen=True, kw_only=True)
class _LowerOrderFinal(DPMSolverPP3M):
    """The same, with second order on the step to the log-SNR `last`."""

    last: Tensor
    lower_order_final: bool = False

    def _remembered(self, logsnr_next: Tensor) -> int:
        return 1 if bool((logsnr_next >= self.last).all()) else 2
