r"""The probability-flow ODE by a Runge-Kutta method that chooses its own steps, for each sample.

With the angle phi = atan(sigma / alpha) and z = x / sqrt(alpha^2 + sigma^2), which no interpolant changes,

    z = cos(phi) x0 + sin(phi) eps,      dz / dphi = cos(phi) eps - sin(phi) x0 = (cos(phi) z - x0) / sin(phi).

Every level has a finite angle, pure noise pi / 2, and z has the scale of the data throughout, so that one absolute
tolerance serves all levels. The slope is minus the velocity that v-prediction learns. The ODE is solved from the first
to the last finite level of the grid, whose other levels play no part; the denoiser's output there is the sample.

A step is accepted where the root mean square of error / (atol + rtol |z|) over one sample's coordinates is below 1.

torchode solves the ODE because it gives every sample of a batch its own step size and its own decisions, while the
denoiser is still called on the whole batch. So a sample does not depend on its neighbours, which it would under
torchdiffeq (one error norm and one step size a batch); that library or SciPy would have to be run on one sample after
the other, at the cost of the batch. Independence holds to rounding, not to the bit: torchode adds up the stages by a
matrix product, whose last bit may depend on the size of the batch. Time is float64, the state has the dtype of x.

References:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, section 4.3 and
    appendix D.4 (adaptive solution; rtol = atol = 1e-5).
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, appendix D (the angle).
    Lienen & Günnemann, "torchode: A Parallel ODE Solver for PyTorch", 2022.
    Dormand & Prince, "A family of embedded Runge-Kutta formulae", 1980; Tsitouras, "Runge-Kutta pairs of order 5(4)
    satisfying only the first column simplifying assumption", 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, check_grid
from diffusion_lab.typing import Cond, DenoiserFn, OnStep

METHODS = {"dopri5": "Dopri5", "tsit5": "Tsit5", "heun": "Heun"}


def solve(
    slope: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    method: str,
    rtol: float,
    atol: float,
    max_steps: int,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve an ODE, each sample by steps of its own.

    Args:
        slope: Times `(B,)` and states `(B, n)` to slopes `(B, n)`.
        state: At the start, `(B, n)`.
        start: Times of the start, `(B,)`.
        end: Times of the end, `(B,)`.
        method: One of `METHODS`.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        max_steps: Attempted steps of a sample after which to give up.
        norm: Scaled errors `(B, n)` to one number a sample, `(B,)`; None for the root mean square.

    Returns:
        The states at the end `(B, n)`, and the attempted steps of each sample `(B,)`.

    Raises:
        RuntimeError: If the solver gives up, after `max_steps` or because a value is not finite.
    """
    # importing it takes a second: only for those who use it
    import torchode

    term = torchode.ODETerm(slope, with_stats=False)
    tolerances = {"atol": atol, "rtol": rtol, **({} if norm is None else {"norm": norm})}
    solver = torchode.AutoDiffAdjoint(
        getattr(torchode, METHODS[method])(term=term),
        torchode.IntegralController(term=term, **tolerances),
        max_steps=max_steps,
    ).to(state.device)
    # an evaluation point, not a bare end: a sample's result is then taken when it arrives, not when all have
    problem = torchode.InitialValueProblem(y0=state, t_start=start, t_end=end, t_eval=end[:, None])
    solution = solver.solve(problem)
    failed = solution.status.nonzero()[:, 0]
    if len(failed):
        reason = torchode.Status(int(solution.status[failed[0]])).name
        raise RuntimeError(
            f"the ODE solver gave up on sample {int(failed[0])} of the batch: {reason}; max_steps is {max_steps}, "
            "and a looser tolerance needs fewer"
        )
    return solution.ys[:, 0], solution.stats["n_steps"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveRK:
    """Adaptive Runge-Kutta solution of the probability-flow ODE. The tolerance decides how many calls it takes.

    It is no `Stepper`: its steps are not the grid's. The batch is called until its slowest sample has arrived.

    Attributes:
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, in units of z.
        method: "dopri5" or "tsit5", both of order 5 with 6 calls a step, or "heun", of order 2 with 2 calls.
        max_steps: Attempted steps of a sample after which to give up.

    Raises:
        ValueError: If a tolerance is negative, both are zero, or the method is unknown.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    max_steps: int = 10_000

    stochastic = False
    adaptive = True

    def __post_init__(self) -> None:
        if not (self.rtol >= 0.0 and self.atol >= 0.0 and self.rtol + self.atol > 0.0 and self.max_steps > 0):
            raise ValueError(f"AdaptiveRK needs positive tolerances and max_steps, got {self}")
        if self.method not in METHODS:
            raise ValueError(f"AdaptiveRK has the methods {', '.join(METHODS)}, not {self.method!r}")

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
        """Return samples `(B, *D)`. See `Stepper.__call__`.

        `on_step` sees the last two levels of the grid only, under their own indices: the end of the ODE, and the
        sample. A grid of one step has no ODE to solve, and only the latter.

        Raises:
            ValueError: If the grid is malformed.
            RuntimeError: If the solver gives up, after `max_steps` or because a value is not finite.
        """
        grid = check_grid(grid)
        bound, last = BoundDenoiser(denoiser, cond), grid.shape[0] - 2
        if last > 0:
            x = self._solve(bound, x, grid[0], grid[last])
            if on_step is not None:
                assert bound.last is not None
                on_step(last - 1, grid[last], x, bound.last)
        x0 = bound(x, grid[last])
        if on_step is not None:
            on_step(last, grid[-1], x0, x0)
        return x0

    def _solve(self, bound: BoundDenoiser, x: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
        """Return `x` moved from one level to a cleaner one along the ODE."""

        def scale(level: Tensor) -> Tensor:
            alpha, sigma = bound.interpolant(level)
            return torch.sqrt(alpha**2 + sigma**2)

        def slope(phi: Tensor, z: Tensor) -> Tensor:
            """Return dz / dphi at angles `(B,)` and states `(B, n)`."""
            cos, sin = torch.cos(phi), torch.sin(phi)
            level = 2 * torch.log(cos / sin)
            at = z.reshape(x.shape)
            x0 = bound(broadcast_right(scale(level), at) * at, level)
            return ((broadcast_right(cos, at) * at - x0) / broadcast_right(sin, at)).flatten(1)

        # in float64 atan(inf) lies just below pi / 2, where the log-SNR is -74
        start, end = (
            torch.atan(torch.exp(-0.5 * level)).to(x.device).expand(len(x)) for level in (logsnr, logsnr_next)
        )
        state, _ = solve(
            slope,
            (x / scale(logsnr)).flatten(1),
            start,
            end,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )
        return scale(logsnr_next) * state.reshape(x.shape)
