r"""Restart: solve the ODE, then several times add much noise at once and solve the same stretch again.

With rho = sigma / alpha, a segment (N, K, rho_min, rho_max) acts at the level of the main grid nearest to rho_min, say
rho_m. On reaching it, K times,

    x_max = (alpha_max / alpha_m) x + alpha_max sqrt(rho_max^2 - rho_m^2) noise_scale z,
    x     = ODE solver from rho_max back to rho_m on the N levels  rho_j^(1/e) linear in j,   e = `exponent`.

Were the score exact, the marginal at rho_m would stay what it is; the error x has gathered until then shrinks, because
the noise hides it. For Gaussian data of variance c an error of the mean is multiplied by sqrt(q) each time and one of
the variance by q = (c + rho_m^2) / (c + rho_max^2).

N counts levels, so a return is N - 1 steps. That is how the authors' code reads its settings, and how their counts of
calls come out: with Heun's method 2 M - 1 on a main grid of M steps and 2 K (N - 1) for each segment, 43 for CIFAR-10
(M = 18, N = 3, K = 2) and 203 for ImageNet 64x64.

References:
    Xu et al., "Restart Sampling for Improving Generative Processes", 2023; settings and their
    meaning from the authors' repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lab.process.gaussian import add_noise
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, State, Stepper, check_grid, check_rng
from diffusion_lab.typing import Cond, DenoiserFn, OnStep

Segment = tuple[int, int, float, float]
"""(N, K, rho_min, rho_max): levels of a return, number of returns, and the two noise levels sigma / alpha."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """An ODE solver with restarts. It costs the inner stepper's calls on the main grid and K (N - 1) steps a segment.

    It is no `Stepper`: a return is several steps between two levels of the main grid. A multistep inner stepper
    begins each return without memory, and goes on from the last one with that return's.

    Attributes:
        inner: The solver, normally `Heun`.
        segments: `(N, K, rho_min, rho_max)` each; segments at the same level act in this order.
        exponent: e of a return's spacing, EDM's 7.
        noise_scale: Standard deviation of z.

    Raises:
        ValueError: If a segment is not 2 <= N, 0 <= K, 0 < rho_min < rho_max, or a number is not positive.
    """

    inner: Stepper
    segments: Sequence[Segment]
    exponent: float = 7.0
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        for N, K, rho_min, rho_max in self.segments:
            if not (N >= 2 and K >= 0 and 0.0 < rho_min < rho_max):
                raise ValueError(
                    "a restart segment (N, K, rho_min, rho_max) needs N >= 2, K >= 0 and 0 < rho_min < rho_max, got "
                    f"({N}, {K}, {rho_min}, {rho_max})"
                )
        if not (self.exponent > 0.0 and self.noise_scale >= 0.0):
            raise ValueError("Restart needs exponent > 0 and noise_scale >= 0")

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.inner.stochastic or any(K > 0 for _, K, _, _ in self.segments)

    def _returns(self, grid: Tensor) -> dict[int, list[list[Tensor]]]:
        """Return, by the index of a level of `grid`, the returns that end there, each a list of levels."""
        # neither the start nor the clean end can be restarted from
        rho = torch.exp(-0.5 * grid[1:-1])
        returns: dict[int, list[list[Tensor]]] = {}
        for N, K, rho_min, rho_max in self.segments if len(rho) else ():
            m = int((rho - rho_min).abs().argmin())
            if float(rho[m]) >= rho_max:
                raise ValueError(
                    f"the grid is too coarse for a restart from rho_min = {rho_min} to rho_max = {rho_max}: its "
                    f"nearest inner level is {float(rho[m]):.4g}; take more steps or wider restarts"
                )
            ends = (rho_max ** (1 / self.exponent), float(rho[m]) ** (1 / self.exponent))
            levels = -2 * self.exponent * torch.log(torch.linspace(*ends, N, dtype=torch.float64))
            # the very level of the main grid, not its rounded power
            levels[-1] = grid[m + 1]
            returns.setdefault(m + 1, []).extend([list(levels.unbind(0))] * K)
        return returns

    @torch.no_grad()
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
        """Follow the grid from noise to samples `(B, *D)`, with restarts. See `Stepper.__call__`.

        `on_step` sees the steps of the main grid, each after the restarts at its level. A grid of one step has no
        level to restart from, and is solved plainly.

        Raises:
            ValueError: If the grid is malformed, too coarse for a segment, or noise is needed and `rng` is missing.
        """
        if self.stochastic:
            check_rng(self, rng)
        bound, state = BoundDenoiser(denoiser, cond), None
        grid = check_grid(grid)
        returns = self._returns(grid)
        for index, (logsnr, logsnr_next) in enumerate(pairwise(grid.unbind(0))):
            x, state = self.inner.step(bound, x, logsnr, logsnr_next, state, rng)
            for levels in returns.get(index + 1, ()):
                x, state = self._return(bound, x, levels, rng)
            if on_step is not None:
                assert bound.last is not None
                on_step(index, logsnr_next, x, bound.last)
        return x

    def _return(
        self, bound: BoundDenoiser, x: Tensor, levels: Sequence[Tensor], rng: SampleRNG | None
    ) -> tuple[Tensor, State]:
        """Move `x` from the last of `levels` up to the first by noise, and back down by the solver."""
        assert rng is not None
        state = None
        x = add_noise(bound.interpolant, x, self.noise_scale * rng.randn_like(x), levels[-1], levels[0])
        for logsnr, logsnr_next in pairwise(levels):
            x, state = self.inner.step(bound, x, logsnr, logsnr_next, state, rng)
        return x, state
