r"""The variational bound of a data set, image by image, in its three terms.

    -log p(x0)  <=  prior + diffusion + reconstruction          (`losses/vlb_terms.py`, nats per dimension)

The terms are those of the loss; here every image has K noise levels of its own, one in each K-th of the range,

    u_k = (k + U_k) / K,  U_k uniform,      logsnr_k = schedule(u_k),      diffusion = (1/K) sum_k L(logsnr_k),

so an image's estimate varies less than with K levels drawn freely, and images stay independent: the interval of
`bits.py` holds. With T steps and K = T every step is looked at once. The reconstruction of a value depends on its
level alone, so that its expectation over the noise is a table of numbers, one a level, by quadrature.

In continuous time the density of the levels, the `proposal`, does not change what is estimated, only how well; T steps
are those of the schedule. The ends are part of the model and must be finite: `Cut` takes the part of a schedule
between two levels.

Data without levels (points, latents, images that were dequantised) have a density instead. Its reconstruction is the
Gaussian one, p(x0 | x_0) = N(x0; x_0 / alpha_0, s²) with s = exp(-logsnr_max / 2): ½ log(2 pi e) - ½ logsnr_max.

How much a density of levels p matters is told from draws of another one, r: an estimate from one level drawn from p,
L_p = e / (2 p) for the error e, has

    mean      E_r [ e / (2 r) ]             whatever p
    square    E_p [ (e / 2p)² ] = E_r [ (e / 2)² / (p r) ].

References:
    Kingma, Salimans, Poole & Ho, "Variational Diffusion Models", 2021, section 4 (terms), 5.1 (invariance), table 4
        (variances).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.losses.vlb import VariationalBound
from diffusion_lab.losses.vlb_terms import Levels, prior_kl, reconstruction
from diffusion_lab.process.schedules import AdaptiveSchedule, LinearLogSNR, Schedule
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond, DenoiserFn

BINS = 20
NODES = 129


class Cut:
    """The part of a schedule between two log-SNRs, run through by u in [0, 1]; a `Schedule`, computed on the CPU.

    Args:
        schedule: The schedule; ends of its own that lie inside the range stay.
        logsnr_min: Lowest level.
        logsnr_max: Highest level.

    Attributes:
        logsnr_min: The end at u = 1.
        logsnr_max: The end at u = 0.

    Raises:
        ValueError: If nothing of the schedule lies in the range, or what is left is infinite.
    """

    def __init__(self, schedule: Schedule, *, logsnr_min: float, logsnr_max: float) -> None:
        with torch.no_grad():
            high, low = (float(end) for end in schedule(torch.arange(2, dtype=torch.float64)))
            self.logsnr_max, self.logsnr_min = min(high, logsnr_max), max(low, logsnr_min)
            if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
                raise ValueError(
                    f"of a schedule from {high:g} to {low:g} the range {logsnr_max:g} to {logsnr_min:g} leaves "
                    f"{self.logsnr_max:g} to {self.logsnr_min:g}; a bound needs finite ends, the higher one first"
                )
            ends = torch.tensor([self.logsnr_max, self.logsnr_min], dtype=torch.float64)
            # its own ends are exact
            first, last = (float(u) for u in schedule.inverse(ends))
        self._first = 0.0 if self.logsnr_max == high else first
        self._last = 1.0 if self.logsnr_min == low else last
        self._schedule = schedule

    def __call__(self, u: Tensor) -> Tensor:
        """See `Schedule`."""
        logsnr = self._schedule((self._first + u * (self._last - self._first)).cpu())
        return logsnr.clamp(self.logsnr_min, self.logsnr_max).to(u.device)

    def inverse(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        u = (self._schedule.inverse(logsnr.cpu()) - self._first) / (self._last - self._first)
        return u.to(logsnr.device)

    def log_density(self, logsnr: Tensor) -> Tensor:
        """See `Schedule`."""
        return self._schedule.log_density(logsnr.cpu()).to(logsnr.device) - math.log(self._last - self._first)


def density_reconstruction(logsnr_max: float) -> float:
    """Return E[-log p(x0 | x_0)] of the Gaussian decoder, nats per dimension: the entropy of the noise that is left."""
    return 0.5 * (1.0 + math.log(2.0 * math.pi) - logsnr_max)


def reconstruction_table(levels: Levels, logsnr_max: float) -> Tensor:
    """Return E[-log p(x0 | x_0)] over the noise for each level, `(levels.count,)` float64, in nats.

    By the trapezoid rule, which for a normal density converges faster than any power of the step.
    """
    nodes = torch.linspace(-8.5, 8.5, NODES, dtype=torch.float64)
    mass = torch.softmax(-0.5 * nodes.square(), dim=0)
    x0 = levels.positions(nodes).repeat_interleave(NODES)[:, None]
    values = reconstruction(
        x0, nodes.repeat(levels.count)[:, None], torch.tensor(logsnr_max, dtype=nodes.dtype), levels
    )
    return (values.view(levels.count, NODES) * mass).sum(1)


@dataclass(frozen=True, kw_only=True)
class BoundEstimate:
    """The bound of each image, in nats per dimension.

    Attributes:
        prior: `(B,)`, exact.
        reconstruction: `(B,)`, exact.
        diffusion: `(B,)`, the mean of `draws`.
        logsnr: `(B, K)`, the levels looked at.
        draws: `(B, K)`, what each says of the diffusion term.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    logsnr: Tensor
    draws: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, `(B,)`."""
        return self.prior + self.reconstruction + self.diffusion


class BoundEvaluation:
    """Evaluates the bound; see the module.

    Args:
        schedule: Ends and, for T steps, where they lie. Finite ends.
        levels: The values that the data can take; None: the data have a density.
        steps: T; None: continuous time.
        draws: K, noise levels an image.
        proposal: Density that levels are drawn from in continuous time, of the same ends; None: the schedule's.

    Raises:
        ValueError: If `draws` or `steps` is not positive, the ends are infinite or not those of the proposal, or there
            are both steps and a proposal.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        levels: Levels | None,
        steps: int | None = None,
        draws: int = 16,
        proposal: Schedule | None = None,
    ) -> None:
        if draws < 1:
            raise ValueError(f"a bound needs draws >= 1, got {draws}")
        if steps is not None and proposal is not None:
            raise ValueError("the steps of a discrete bound are those of its schedule: it takes no proposal")
        self.levels, self.steps, self.draws = levels, steps, draws
        self._rebuilt: Tensor | None = None
        # the terms of the loss, on levels that it does not look at where the data have none
        self._bound = VariationalBound(schedule=proposal or schedule, levels=levels or Levels(), steps=steps)
        with torch.no_grad():
            self.logsnr_max, self.logsnr_min = (float(end) for end in self._bound.ends("cpu"))
            own = [float(end) for end in schedule(torch.arange(2, dtype=torch.float64))]
        if not all(map(math.isfinite, own)):
            raise ValueError("a variational bound needs a schedule with finite ends")
        if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(own, self._ends, strict=True)):
            raise ValueError(f"the proposal ends at {self._ends}, the schedule at {tuple(own)}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.logsnr_max, self.logsnr_min

    def _table(self, like: Tensor) -> Tensor:
        if self._rebuilt is None:
            assert self.levels is not None
            self._rebuilt = reconstruction_table(self.levels, self.logsnr_max)
        return self._rebuilt.to(like.device)

    def places(self, uniform: Tensor) -> Tensor:
        """Return u_k, of the shape of `uniform` `(B, K)` in [0, 1)."""
        return (torch.arange(self.draws, dtype=uniform.dtype, device=uniform.device) + uniform) / self.draws

    def __call__(
        self, denoiser: DenoiserFn, x0: Tensor, *, cond: Cond | None = None, rng: SampleRNG
    ) -> BoundEstimate:
        """Return the bound of each image.

        Args:
            denoiser: What is judged.
            x0: Images on the levels, or points, `(B, *D)`.
            cond: Conditions, or None.
            rng: A stream for each image.

        Raises:
            ValueError: If (on the CPU) images are not on the levels.
        """
        shape, dtype, device = x0.shape[1:], x0.dtype, x0.device
        u = self.places(rng.rand((self.draws,), dtype=torch.float64, device=x0.device))
        found = [
            self._bound.diffusion(denoiser, x0, rng.randn(shape, dtype=dtype, device=device), cond, u[:, k])
            for k in range(self.draws)
        ]
        draws = torch.stack([value for value, _ in found], dim=1)
        if self.levels is None:
            rebuilt = torch.full(
                (len(x0),), density_reconstruction(self.logsnr_max), dtype=dtype, device=device
            )
        else:
            rebuilt = self._table(x0)[self.levels.indices(x0)].flatten(1).mean(1).to(x0.dtype)
        return BoundEstimate(
            prior=prior_kl(x0, torch.tensor(self.logsnr_min, dtype=dtype, device=device)),
            reconstruction=rebuilt,
            diffusion=draws.mean(1),
            logsnr=torch.stack([logsnr for _, logsnr in found], dim=1),
            draws=draws,
        )


# ---- what the draws tell --------------------------------------------------------------------------------------


def by_level(
    logsnr: Tensor, draws: Tensor, ends: tuple[float, float], bins: int = 10
) -> list[dict[str, float]]:
    """Return how the diffusion term is made up, from low to high log-SNR.

    Args:
        logsnr: Levels, `(n, K)`.
        draws: What each says of the diffusion term, `(n, K)`.
        ends: The highest and the lowest log-SNR.
        bins: Into how many equal parts the range is divided.

    Returns:
        For each part its ends `logsnr_min` and `logsnr_max`, `value` (its share of the term; they add up to it), and
        `standard_error` over images.
    """
    high, low = ends
    place = ((logsnr.double() - low) * (bins / (high - low))).clamp(0, bins - 1).long()
    n, rows = len(logsnr), []
    for b in range(bins):
        share = torch.where(place == b, draws.double(), 0.0).mean(1)
        rows.append(
            {
                "logsnr_min": low + (high - low) * b / bins,
                "logsnr_max": low + (high - low) * (b + 1) / bins,
                "value": float(share.mean()),
                "standard_error": float(share.std()) / math.sqrt(n) if n > 1 else math.nan,
            }
        )
    return rows


def error_density(
    logsnr: Tensor, draws: Tensor, drawn_from: Schedule, ends: tuple[float, float], *, squared: bool = False
) -> AdaptiveSchedule:
    """Return the density proportional to the measured error, E[e] in each bin, or to sqrt(E[e²]), the best there is.

    Args:
        logsnr: Levels, `(n, K)`.
        draws: What each says of the diffusion term, e / (2 r), `(n, K)`.
        drawn_from: r.
        ends: The highest and the lowest log-SNR.
        squared: Whether to take the root of the mean square.
    """
    high, low = ends
    density = AdaptiveSchedule(logsnr_min=low, logsnr_max=high, bins=BINS)
    levels = logsnr.double().flatten()
    error = draws.double().flatten() * torch.exp(drawn_from.log_density(levels))
    place = density.bin_of(levels)
    zero = torch.zeros(BINS, dtype=torch.float64)
    count = zero.index_add(0, place, torch.ones_like(error))
    total = zero.index_add(0, place, error.square() if squared else error)
    mean = total / count.clamp(min=1.0)
    density.means.copy_(mean.sqrt() if squared else mean)
    return density


def deviation(logsnr: Tensor, draws: Tensor, drawn_from: Schedule, proposal: Schedule) -> float:
    """Return the standard deviation of the diffusion term estimated from one level drawn from `proposal`.

    Over images, levels and noise, in the unit of `draws`, by importance weights.

    Args:
        logsnr: Levels, `(n, K)`.
        draws: What each says of the diffusion term, `(n, K)`.
        drawn_from: The density they were drawn from.
        proposal: The density to be judged.
    """
    levels, values = logsnr.double().flatten(), draws.double().flatten()
    weight = torch.exp(drawn_from.log_density(levels) - proposal.log_density(levels))
    square = (values.square() * weight).mean()
    return float((square - values.mean().square()).clamp(min=0.0).sqrt())


@torch.no_grad()
def deviations(
    logsnr: Tensor, draws: Tensor, drawn_from: Schedule, schedule: Schedule
) -> Mapping[str, float]:
    """Return what `deviation` says of several densities of levels.

    The last two are fitted to the same draws, which flatters them by as much as 20 bins can follow noise.

    Args:
        logsnr: Levels, `(n, K)`.
        draws: What each says of the diffusion term, `(n, K)`.
        drawn_from: The density they were drawn from.
        schedule: That of the run; its ends are the range.
    """
    high, low = (float(end) for end in schedule(torch.arange(2, dtype=torch.float64)))
    densities: dict[str, Schedule] = {
        "uniform in log-SNR": LinearLogSNR(logsnr_min=low, logsnr_max=high),
        "the run's schedule": schedule,
        "as the error": error_density(logsnr, draws, drawn_from, (high, low)),
        "as its root mean square": error_density(logsnr, draws, drawn_from, (high, low), squared=True),
    }
    return {name: deviation(logsnr, draws, drawn_from, p) for name, p in densities.items()}


def frozen(schedule: Schedule) -> Schedule:
    """Return a schedule ready to be evaluated: one that learns in float64 and without gradients."""
    if isinstance(schedule, nn.Module):
        schedule.double().requires_grad_(False).eval()
    return schedule
