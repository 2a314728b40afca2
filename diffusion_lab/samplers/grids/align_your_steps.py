r"""Align Your Steps: grids from an upper bound on the Kullback-Leibler divergence of the sampled paths.

With y = x / alpha and rho = sigma / alpha, noising is a Brownian motion in rho^2, and its exact reversal has the drift
2 (y - D(y, rho)) / rho per d rho, D being the denoiser. A first-order stochastic sampler (ancestral sampling, which is
DDIM with eta = 1) holds D at its value at the last grid level. By Girsanov's theorem the divergence between the two
laws of the whole path, which bounds that of the samples, is

    KLUB = sum_i int_(rho_(i+1))^(rho_i) rho^-3 K(rho, rho_i) d rho,
    K(rho, rho_i) = E |D(y_rho, rho) - D(y_i, rho_i)|^2.

The expectation runs over the paths of the exact process, so **the coupling** is that of one Brownian path, y_i being
y_rho noised further:

    y_rho = x0 + rho z,      y_i = y_rho + sqrt(rho_i^2 - rho^2) z',      z, z' independent.

(One noise for both levels, y_i = x0 + rho_i z, gives another, smaller K, and no bound.) In log-SNR, which is
-2 log rho, the weight rho^-3 d rho is ½ exp(logsnr) d logsnr.

For an exact denoiser D is a martingale along the path, so K = mmse(rho_i) - mmse(rho), and the KLUB is what the
discrete-time likelihood bound on this grid loses against the continuous-time one. For Gaussian data of variance c^2,
mmse = c^2 / (1 + c^2 / rho^2). Setting the derivative with respect to every level to zero gives the exact minimum,

    log(1 + c^2 / rho_i^2) in equal steps, for any number of levels between fixed ends.

This is *not* the grid uniform in atan(rho / c) of the paper's introductory example: that one minimises the final error
of Euler's method on the probability-flow ODE (for c = 1 it is `uniform_u` of a cosine schedule). The KLUB weighs clean
levels more, and diverges as the last level goes to rho = 0; hence the fixed `logsnr_max`.

How it is found
    1. K for all pairs of `levels` fine levels at once, by Monte Carlo: one Brownian path an example visits all levels,
       so B examples cost B x levels calls. The average over the paths is unbiased for each pair.
    2. cost(a, b) = ½ int_a^b exp(logsnr) K(logsnr, a) d logsnr by cubic splines. On the other side of the diagonal K
       is continued as -K, which is smooth, being mmse(a) - mmse(logsnr) for an exact denoiser.
    3. The cheapest path of `steps` - 1 edges through the fine levels by dynamic programming, which is global; then all
       levels move continuously (BFGS on the spline) to the minimum nearby.

The minimum overshoots: the KLUB bounds the divergence of whole paths, and pressing it down crowds the clean levels at
the cost of the samples. On N(0, 0.25) with 20 steps in [-10, 7] the divergence of the samples, for ancestral sampling
and for DDIM, is 0.020 and 0.034 at the minimum, 0.037 and 0.011 on `uniform_logsnr`, and 0.011 and 0.005 after 5 sweeps
towards the minimum. The paper stops early too (appendix A.3). So by default, instead of step 3,

    3'. `sweeps` passes of coordinate descent from levels uniform in log-SNR: each inner level in turn, from noise to
        data, goes to the best place between its neighbours. First with 10 levels or fewer, then doubled by linear
        interpolation in log-SNR until there are `steps`, with as many passes each time.

For the minimum itself (`sweeps=None`) doubling would be idle: it makes up for far levels talking slowly and for new
Monte Carlo runs at every trial, while step 3 solves any number of steps outright from one table.

References:
    Sabour, Fidler & Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models", 2024, section 3 and
        appendix A.
    Watson et al., "Learning to Efficiently Sample from Diffusion Probabilistic Models", 2021 (dynamic programming over
        the likelihood bound).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, RectBivariateSpline
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.grids.common import closed
from diffusion_lab.samplers.grids.fitted import Progress, batches, cheapest_path, check_range
from diffusion_lab.typing import Cond, DenoiserFn

Array = NDArray[np.float64]

# levels of the first grid that sweeps work on
COARSE = 10


@dataclass(frozen=True, kw_only=True)
class AlignYourSteps:
    """The grid of least KLUB with `steps` levels from `logsnr_min` to `logsnr_max` inclusive, then +inf.

    Attributes:
        steps: Number of steps, the last to +inf included; 2 .. `levels`.
        logsnr_min: Noisiest level.
        logsnr_max: Cleanest level before +inf.
        levels: Number of fine levels at which the denoiser is tabulated, at least 8; a fit calls it so often a batch.
        sweeps: Passes of coordinate descent before stopping; None for the global minimum.
        batch_size: Examples a call of the denoiser; `levels` outputs of each are held in memory.

    Raises:
        ValueError: If a setting is out of its range.
    """

    steps: int
    logsnr_min: float
    logsnr_max: float
    levels: int = 128
    sweeps: int | None = 5
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_range("AlignYourSteps", self.steps, self.levels, self.logsnr_min, self.logsnr_max)
        if self.levels < 8 or self.batch_size < 1 or (self.sweeps is not None and self.sweeps < 0):
            raise ValueError("AlignYourSteps needs levels >= 8, batch_size >= 1 and sweeps >= 0 or None")

    def fit(
        self,
        denoiser: DenoiserFn,
        x0: Tensor,
        cond: Cond | None,
        rng: SampleRNG,
        progress: Progress | None = None,
    ) -> Tensor:
        """See `FittedGrid.fit`."""
        levels = torch.linspace(self.logsnr_min, self.logsnr_max, self.levels, dtype=torch.float64)
        K = differences(denoiser, x0, cond, rng, levels, self.batch_size, progress)
        return closed(least_klub(levels, K, self.steps, self.sweeps))


@torch.no_grad()
def differences(
    denoiser: DenoiserFn,
    x0: Tensor,
    cond: Cond | None,
    rng: SampleRNG,
    levels: Tensor,
    batch_size: int,
    progress: Progress | None = None,
) -> Tensor:
    """Return the Monte Carlo table K `(L, L)`, symmetric, float64: E |D(y_a) - D(y_b)|^2 on one Brownian path.

    Args:
        denoiser: The denoiser.
        x0: Examples `(B, *D)`.
        cond: Their conditions, or None.
        rng: Their seeds.
        levels: Increasing finite log-SNRs `(L,)`.
        batch_size: Examples a call.
        progress: See `FittedGrid.fit`.
    """
    L, done = len(levels), 0
    total = L * math.ceil(x0.shape[0] / batch_size)
    # variance that the path gains on the way to each level from the cleaner one before it, rho^2 at the cleanest
    variance = torch.exp(-levels)
    gained = variance - torch.cat([variance[1:], variance.new_zeros(1)])
    K = torch.zeros(L, L, dtype=torch.float64)
    for y, part, streams in batches(x0, cond, rng, batch_size):
        D = y.new_empty((L, y.shape[0], y[0].numel()))
        for level in reversed(range(L)):
            y = y + torch.sqrt(gained[level]) * streams.randn_like(y)
            alpha, _ = denoiser.interpolant(levels[level])
            x = alpha * y
            D[level] = denoiser(x, expand_logsnr(levels[level], x), part).flatten(1)
            done += 1
            if progress is not None:
                progress(done, total)
        for a in range(L - 1):
            K[a, a + 1 :] += (D[a + 1 :] - D[a]).square().flatten(1).sum(1, dtype=torch.float64).cpu()
    return (K + K.T) / x0.shape[0]


def klub(levels: Tensor, K: Tensor, nodes: Tensor) -> float:
    """Return the KLUB of the grid `nodes` (without its +inf), in nats, from a table K over `levels`."""
    cost, places = _cost(levels, K), nodes.numpy()
    return float(cost.ev(places[:-1], places[1:]).sum())


def least_klub(levels: Tensor, K: Tensor, steps: int, sweeps: int | None = None) -> Tensor:
    """Return the `steps` log-SNRs of least KLUB, first and last of `levels` included; `(steps,)`, float64.

    Args:
        levels: Increasing log-SNRs `(L,)`, at least 8.
        K: Table `(L, L)` of expected squared differences of the denoiser; zero on the diagonal.
        steps: Number of levels wanted, 2 .. L.
        sweeps: See `AlignYourSteps`.
    """
    cost, fine = _cost(levels, K), levels.numpy()
    if sweeps is None:
        path = cheapest_path(cost(fine, fine), steps - 1)
        return torch.from_numpy(_polish(cost, fine[path]))
    sizes = [steps]
    while sizes[0] > COARSE:
        sizes.insert(0, (sizes[0] + 1) // 2)
    nodes = np.linspace(fine[0], fine[-1], sizes[0])
    for size in sizes:
        nodes = np.interp(np.linspace(0, len(nodes) - 1, size), np.arange(len(nodes)), nodes)
        nodes = _sweep(cost, nodes, sweeps)
    return torch.from_numpy(nodes)


def _cost(levels: Tensor, K: Tensor) -> RectBivariateSpline:
    """Return cost(a, b) of one step from log-SNR a to b as a smooth function of both."""
    fine, table = levels.numpy(), K.numpy()
    order = np.arange(len(fine))
    signed = np.sign(order[:, None] - order[None, :]) * table
    weighted = 0.5 * np.exp(fine)[:, None] * signed
    integral = CubicSpline(fine, weighted, axis=0).antiderivative()(fine)
    return RectBivariateSpline(fine, fine, (integral - np.diag(integral)[None, :]).T)


def _polish(cost: RectBivariateSpline, nodes: Array) -> Array:
    """Move the inner nodes to the minimum nearby; gaps = range softmax(v) keeps them in order between the ends."""
    low, width = nodes[0], nodes[-1] - nodes[0]
    scale = max(float(cost.ev(nodes[:-1], nodes[1:]).sum()), np.finfo(np.float64).tiny)

    def places(v: Array) -> tuple[Array, Array]:
        shares = np.exp(v - v.max())
        shares /= shares.sum()
        x = np.concatenate([[low], low + width * np.cumsum(shares)])
        x[-1] = nodes[-1]
        return x, shares

    def objective(v: Array) -> tuple[float, Array]:
        x, shares = places(v)
        slope = np.zeros_like(x)
        slope[:-1] += cost.ev(x[:-1], x[1:], dx=1)
        slope[1:] += cost.ev(x[:-1], x[1:], dy=1)
        slope[-1] = 0.0
        # a gap moves every node to its right
        by_share = width * np.cumsum(slope[:0:-1])[::-1]
        gradient = shares * (by_share - shares @ by_share)
        return float(cost.ev(x[:-1], x[1:]).sum()) / scale, gradient / scale

    start = np.log(np.diff(nodes))
    found = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    return places(found.x)[0] if found.fun < objective(start)[0] else nodes


def _sweep(cost: RectBivariateSpline, nodes: Array, sweeps: int) -> Array:
    """Move each inner node in turn, from noise to data, to the best place between its neighbours, `sweeps` times."""
    for _ in range(sweeps):
        for i in range(1, len(nodes) - 1):
            before, after = nodes[i - 1], nodes[i + 1]
            found = minimize_scalar(
                lambda x, before=before, after=after: float(cost.ev(before, x) + cost.ev(x, after)),
                bounds=(before, after),
                method="bounded",
                options={"xatol": 1e-8},
            )
            nodes[i] = found.x
    return nodes
