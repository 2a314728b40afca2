r"""DPM-Solver-v3: a multistep solver whose linear part is fitted to the model.

Noise prediction and data prediction split the ODE into a part that is solved exactly and a part that is extrapolated,
each in its own way. Here the split is the model's own: with y = x / alpha, lam half the log-SNR and the statistics
l, s, b (`dpm_solver_v3_statistics.py`), f = (sigma eps - l x) / alpha follows f' = s f + b nearly, so

    g(lam) = e^{-S(lam)} f(lam) - B(lam),      S = int_t^lam s,      B = int_t^lam e^{-S} b

is nearly constant, and the step from t to u, exact if g is a polynomial, is

    y_u = A [ y_t - int_t^u E B dlam - sum_k g^(k) / k! int_t^u E (lam - t)^k dlam ],
    A = e^{-int_t^u l},      E(lam) = e^{int_t^lam (l + s)}.

The derivatives of g come from earlier outputs, by the polynomial through them. The corrector repeats the step with the
output at its end as one more point, at no further call, and the next step starts from there. (l, s, b) = (0, -1, 0) is
noise and (1, 0, 0) data prediction; on Gaussian data f = 0 and one step is exact.

The integrals are taken with 16 Gauss-Legendre points in each step, the inner ones with the integration matrix of these
points, so constant statistics are integrated to rounding error.

References:
    Zheng, Lu, Chen & Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", 2023, eqs. 6
    to 14, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import State, Stepper
from diffusion_lab.samplers.dpm_solver_v3_statistics import Statistics, estimate
from diffusion_lab.typing import Cond, DenoiserFn

POINTS = 16


@cache
def _quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Legendre points and weights on [0, 1], and the matrix that integrates from 0 to each point."""
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    nodes, weights = (nodes + 1) / 2, weights / 2
    # column j: the integral of the Lagrange polynomial of point j, through Legendre polynomials on [0, 1]
    basis = np.stack([np.polynomial.Legendre.basis(k, domain=[0, 1])(nodes) for k in range(POINTS)], 1)
    integrals = np.stack(
        [np.polynomial.Legendre.basis(k, domain=[0, 1]).integ(lbnd=0)(nodes) for k in range(POINTS)], 1
    )
    return torch.tensor(nodes), torch.tensor(weights), torch.tensor(integrals @ np.linalg.inv(basis))


@dataclass(frozen=True, kw_only=True)
class DPMSolverV3(Stepper):
    """DPM-Solver-v3. One call of the denoiser a step; order `order`, and one more with the corrector.

    Args:
        order: Points that g is extrapolated from: 1, 2 or 3.
        corrector: Whether to correct each step with the output at its end.
        statistics: Those of the model; a `.safetensors` file of them; or None, for a sampler yet to be fitted.
        levels: How many levels `fit` estimates them at.
        logsnr_min: The first of these levels.
        logsnr_max: The last.

    Raises:
        ValueError: If `order` is not 1, 2 or 3, or it is used before it is fitted.
    """

    order: int = 3
    corrector: bool = True
    statistics: Statistics | str | None = None
    levels: int = 60
    logsnr_min: float = -12.0
    logsnr_max: float = 12.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPMSolverV3 needs order 1, 2 or 3, got {self.order}")

    @property
    def fitted(self) -> bool:
        """Whether it has statistics."""
        return self.statistics is not None

    @cached_property
    def _statistics(self) -> Statistics:
        if self.statistics is None:
            raise ValueError("DPMSolverV3 has no statistics of the model: fit it first")
        if isinstance(self.statistics, str):
            from safetensors.torch import load_file

            return Statistics.of(load_file(self.statistics))
        return self.statistics

    def fit(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: SampleRNG,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Estimate the statistics of `denoiser` on clean data `x0` `(n, *D)`; see `estimate`.

        Returns:
            Tensors for a file that `statistics` may name.
        """
        grid = torch.linspace(self.logsnr_min, self.logsnr_max, self.levels, dtype=torch.float64)
        return estimate(denoiser, x0, grid, cond=cond, rng=rng, progress=progress).tensors()

    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """See `Stepper.step`; the state is `(history, y, lam)`: `[(lam, f), ...]`, newest first, and the last start."""
        x0 = denoiser(x, logsnr)
        if bool(torch.isposinf(logsnr_next)):
            return x0, None
        if bool(torch.isneginf(logsnr)):
            # y has no scale there; one step of data prediction is exact for pure noise
            return ddim_step(denoiser.interpolant, x, x0, logsnr, logsnr_next), None
        alpha, _ = denoiser.interpolant(logsnr)
        alpha_next, _ = denoiser.interpolant(logsnr_next)
        lam, y = logsnr / 2, x / alpha
        l = self._statistics(logsnr.reshape(1))[0][0].to(x)
        # sigma eps = x - alpha x0, so f = y - x0 - l y
        newest = (lam, (1 - l) * y - x0)
        history = [] if state is None else state[0]
        if self.corrector and state is not None:
            _, y_before, lam_before = state
            y = self._solve(y_before, lam_before, lam, [newest, *history][: self.order + 1])
        history = [newest, *history][: self.order]
        y_next = self._solve(y, lam, logsnr_next / 2, history)
        return alpha_next * y_next, (history, y, lam)

    def _solve(self, y: Tensor, start: Tensor, end: Tensor, points: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Solve from `start` to `end` with g the polynomial through `points`, in any order."""
        L, S, B, nodes, weights, h = self._integrals(start, end)
        E = torch.exp(L + S)
        A = torch.exp(-(h * torch.tensordot(weights, self._at(start, nodes * h)[0], 1)))
        # the Lagrange polynomials of the points, integrated against E
        lams = torch.stack([lam for lam, _ in points])
        total = h * torch.tensordot(weights, E * B, 1).to(y)
        for k, (lam, f) in enumerate(points):
            others = torch.cat([lams[:k], lams[k + 1 :]])
            lagrange = ((start + nodes * h)[:, None] - others) / (lam - others)
            weight = h * torch.tensordot(weights * lagrange.prod(1), E, 1)
            growth, drift = self._shift(start, lam)
            total = total + weight.to(y) * (growth.to(y) * f - drift.to(y))
        return A.to(y) * (y - total)

    def _at(self, start: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._statistics(2 * (start + ahead))

    def _integrals(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return int l, S and B at the quadrature points, the points in [0, 1], their weights, and h."""
        nodes, weights, inner = _quadrature()
        h = end - start
        l, s, b = self._at(start, nodes * h)
        L, S = (h * torch.tensordot(inner, of, 1) for of in (l, s))
        return L, S, h * torch.tensordot(inner, torch.exp(-S) * b, 1), nodes, weights, h

    def _shift(self, start: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Return e^{-S} and B at `lam`, which turn f there into g."""
        _, S, _, nodes, weights, h = self._integrals(start, lam)
        _, s, b = self._at(start, nodes * h)
        return (
            torch.exp(-h * torch.tensordot(weights, s, 1)),
            h * torch.tensordot(weights, torch.exp(-S) * b, 1),
        )
