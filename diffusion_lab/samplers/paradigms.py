r"""ParaDiGMS: a DDIM trajectory solved for many steps at once, by Picard iteration in a sliding window.

In variance-preserving units, z = x / sqrt(alpha^2 + sigma^2) in any interpolant, DDIM's step is

    z_(i+1) = z_i + f_i(z_i),
    f_i(z) = (q - 1) z + (alpha_(i+1) - q alpha_i) x0(z, logsnr_i),      q = sigma_(i+1) / sigma_i.

Let z_t be final and z_(t+1), ..., z_(t+W) be guesses. One round asks the denoiser for all W steps in a single call,

    z_(j+1) <- z_t + sum_(i = t..j) f_i(z_i),      j = t .. t + W - 1,

after which z_(t+1) is final, since it depends on z_t alone; so is each following point as long as the points before it
have changed by no more than `tolerance` (root mean square over the coordinates of z). The window moves on to the last
final point, and its new points start from its last. The clean level forgets where it came from, z_N = x0(z_(N-1)), and
is taken so.

With tolerance 0 the result is DDIM's to rounding, after at most N rounds. Each sample has its own window, so that it
does not depend on the batch; samples that arrive leave the call. A round costs up to W calls of one sample: the method
spends evaluations to save waiting.

The authors measure the change against the noise that DDPM's step would add. DDIM adds none, and z has the scale of the
data at every level, so here it is absolute.

References:
    Shih et al., "Parallel Sampling of Diffusion Models", 2023, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.process.interpolants import VariancePreserving
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import check_grid
from diffusion_lab.typing import Cond, DenoiserFn, OnStep


class ParallelTrajectory(NamedTuple):
    """What `ParaDiGMS.solve` finds.

    Attributes:
        x: Samples at every level of the grid, `(N + 1, B, *D)`; `x[-1]` are clean.
        x0: Last output of the denoiser at every level but the clean one, `(N, B, *D)`.
        rounds: Rounds of each sample, `(B,)` int64 on the CPU. Sequential calls of the denoiser: their maximum.
    """

    x: Tensor
    x0: Tensor
    rounds: Tensor


@dataclass(frozen=True, kw_only=True)
class ParaDiGMS:
    """DDIM in parallel over steps. As many calls of the denoiser as the slowest sample has rounds; order 1.

    It is no `Stepper`, since it has no steps. It holds the whole trajectory, `2 N + 1` times the batch.

    Attributes:
        window: W, steps solved at once; a call has up to W times the batch.
        tolerance: Largest change of a final point between rounds, root mean square per coordinate of z.

    Raises:
        ValueError: If `window` is not positive or `tolerance` is negative.
    """

    window: int
    tolerance: float

    stochastic = False
    adaptive = True

    def __post_init__(self) -> None:
        if not (self.window >= 1 and self.tolerance >= 0.0):
            raise ValueError(f"ParaDiGMS needs window >= 1 and tolerance >= 0, got {self}")

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

        `on_step` sees every level of the grid in order, each as soon as all samples are final there.
        """
        return self.solve(denoiser, x, grid, cond=cond, on_step=on_step).x[-1]

    @torch.no_grad()
    def solve(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        grid: Tensor,
        *,
        cond: Cond | None = None,
        on_step: OnStep | None = None,
    ) -> ParallelTrajectory:
        """Return the whole trajectory, and how many rounds it took.

        Args:
            denoiser: See `Stepper.__call__`; it is called with levels `(rows,)` that differ within a batch.
            x: Samples at `grid[0]`, `(B, *D)`.
            grid: Increasing log-SNRs that end at +inf.
            cond: Conditions of the batch; every tensor has the batch as its first axis.
            on_step: See `__call__`.

        Raises:
            ValueError: If the grid is malformed.
        """
        grid = check_grid(grid)
        N, B, W = grid.shape[0] - 1, x.shape[0], self.window
        (alpha, sigma), (a, s) = VariancePreserving()(grid), denoiser.interpolant(grid)
        q = sigma[1:] / sigma[:-1]
        kept, gained, scale = (
            c.to(device=x.device, dtype=x.dtype)
            for c in (q - 1, alpha[1:] - q * alpha[:-1], torch.sqrt(a**2 + s**2))
        )
        # the first guess of every point is the start
        z = (x / scale[0]).expand(N + 1, *x.shape).clone()
        x0, reported = torch.empty_like(z[1:]), 0
        # indices stay on the CPU: t of each sample, and its rounds
        t, rounds = torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.long)
        while reported < N:
            active = (t < N).nonzero()[:, 0]
            steps = t[active, None] + torch.arange(W)
            inside = steps < N
            # the rows of this round: step i of sample b
            i, b = steps[inside], active[:, None].expand_as(steps)[inside]
            now = z[i, b]
            rows = None if cond is None else {name: values[b] for name, values in cond.items()}
            x0[i, b] = clean = denoiser(broadcast_right(scale[i], now) * now, expand_logsnr(grid[i], x), rows)
            f = x.new_zeros((*steps.shape, *x.shape[1:]))
            f[inside] = broadcast_right(kept[i], now) * now + broadcast_right(gained[i], now) * clean
            new = (z[t[active], active][:, None] + f.cumsum(1))[inside]
            new[i == N - 1] = clean[i == N - 1]
            change = x.new_full(steps.shape, torch.inf)
            change[inside] = (new - z[i + 1, b]).flatten(1).square().mean(1).sqrt()
            z[i + 1, b] = new
            # the points after the window, which the next one may reach, start from its last
            after = steps + W + 1
            ahead = after <= N
            b = active[:, None].expand_as(steps)[ahead]
            z[after[ahead], b] = z[t[b] + W, b]
            # the first point is final, and one more after each that has kept still
            still = (change <= self.tolerance).long().cumprod(1).sum(1).cpu()
            t[active] += torch.minimum(1 + still, inside.sum(1))
            rounds[active] += 1
            while reported < int(t.min()):
                if on_step is not None:
                    on_step(reported, grid[reported + 1], scale[reported + 1] * z[reported + 1], x0[reported])
                reported += 1
        return ParallelTrajectory(broadcast_right(scale, z) * z, x0, rounds)
