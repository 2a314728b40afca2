r"""GITS: the cheapest way in N steps along a fine trajectory of the probability-flow ODE.

Trajectories of the ODE bend alike whatever the sample, so a grid can be read off a few of them. From noise, Euler's
method (DDIM) goes through fine levels 0 .. L - 1 and the end L, which is rho = 0. In EDM's coordinates y = x / alpha,
rho = sigma / alpha, one step of Euler's method from fine level i straight to j errs by

    c(i, j) = E | y_i + (rho_j - rho_i) eps_i - y_j |,      eps_i = (y_i - D_i) / rho_i,   D_i the denoiser's output,

and the grid of N steps is the path 0 = i_0 < ... < i_N = L that minimises

    sum_k growth^k c(i_k, i_(k+1)),

found by dynamic programming. `growth` above 1 makes later errors dearer: what is lost near the data is not made good,
while early errors shrink on the way. The last step, to rho = 0, returns D of the last level, and is one of the N.

The error is computed without the difference of large numbers. Fine steps are y_(j+1) = r y_j + (1 - r) D_j with
r = rho_(j+1) / rho_j, hence the error e_(i,j) = y_j - (Euler's step from i to j) obeys

    e_(i,j+1) = r e_(i,j) + (1 - r) (D_j - D_i),      e_(i,i) = 0,

for all i at once, in any interpolant.

The authors' code walks the fine trajectory with a multistep solver, ends it at rho_min, and by default compares not
positions but distances from the chord of the trajectory; here is the plain local error.

References:
    Chen et al., "On the Trajectory Regularity of ODE-based Diffusion Sampling", 2024 (dynamic programming; its code:
        61 levels of EDM's grid, 256 trajectories, coefficient 1.15).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.process.gaussian import ddim_step
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.grids.basic import karras
from diffusion_lab.samplers.grids.common import closed
from diffusion_lab.samplers.grids.fitted import Progress, batches, cheapest_path, check_range
from diffusion_lab.typing import Cond, DenoiserFn


@dataclass(frozen=True, kw_only=True)
class GITS:
    """`steps` of the `fine_steps` levels of EDM's grid, the first always among them, then +inf.

    Attributes:
        steps: Number of steps, the last to +inf included; 2 .. `fine_steps`.
        logsnr_min: Noisiest level, where trajectories start.
        logsnr_max: Cleanest fine level; the grid need not contain it.
        fine_steps: Steps of the trajectory; a fit calls the denoiser so often a batch.
        rho: EDM's spacing of the fine levels.
        growth: Factor by which the errors of each further step weigh more.
        batch_size: Trajectories a call of the denoiser; 2 `fine_steps` outputs of each are held in memory.

    Raises:
        ValueError: If a setting is out of its range.
    """

    steps: int
    logsnr_min: float
    logsnr_max: float
    fine_steps: int = 60
    rho: float = 7.0
    growth: float = 1.15
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_range("GITS", self.steps, self.fine_steps, self.logsnr_min, self.logsnr_max)
        if not (self.rho > 0.0 and self.growth > 0.0 and self.batch_size >= 1):
            raise ValueError("GITS needs rho > 0, growth > 0 and batch_size >= 1")

    @property
    def fine(self) -> Tensor:
        """The fine grid, `(fine_steps + 1,)`."""
        ends = (math.exp(-self.logsnr_max / 2), math.exp(-self.logsnr_min / 2))
        return karras(*ends, self.rho, self.fine_steps)

    def fit(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: SampleRNG,
        progress: Progress | None = None,
    ) -> Tensor:
        """See `FittedGrid.fit`; of the examples only number, shape, dtype and device are used."""
        fine = self.fine
        cost = local_errors(denoiser, x0, cond, rng, fine, self.batch_size, progress)
        path = cheapest_path(cost.numpy(), self.steps, self.growth)
        return closed(fine[path[:-1]])


@torch.no_grad()
def local_errors(
    denoiser: DenoiserFn,
    x0: Tensor,
    cond: Cond | None,
    rng: SampleRNG,
    fine: Tensor,
    batch_size: int,
    progress: Progress | None = None,
) -> Tensor:
    """Return c `(L + 1, L + 1)`, float64, upper triangular: mean norm of the error of one step between fine levels.

    Args:
        denoiser: The denoiser.
        x0: What the samples are like, `(B, *D)`; the values are not used.
        cond: Conditions of the samples, or None.
        rng: Seeds of the start noise.
        fine: A sampling grid `(L + 1,)` that starts at a finite level.
        batch_size: Trajectories a call.
        progress: See `FittedGrid.fit`.
    """
    L, done = len(fine) - 1, 0
    total = L * math.ceil(x0.shape[0] / batch_size)
    cost = torch.zeros(L + 1, L + 1, dtype=torch.float64)
    for like, part, streams in batches(x0, cond, rng, batch_size):
        _, sigma = denoiser.interpolant(fine[0])
        x = sigma * streams.randn_like(like)
        D = like.new_empty((L, like.shape[0], like[0].numel()))
        e = torch.zeros_like(D)
        for j in range(L):
            output = denoiser(x, expand_logsnr(fine[j], x), part)
            x = ddim_step(denoiser.interpolant, x, output, fine[j], fine[j + 1])
            D[j] = output.flatten(1)
            r = torch.exp(0.5 * (fine[j] - fine[j + 1]))
            e[: j + 1] = r * e[: j + 1] + (1 - r) * (D[j] - D[: j + 1])
            norms = torch.linalg.vector_norm(e[: j + 1], dim=2, dtype=torch.float64)
            cost[: j + 1, j + 1] += norms.sum(1).cpu()
            done += 1
            if progress is not None:
                progress(done, total)
    return cost / x0.shape[0]
