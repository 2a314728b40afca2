r"""Many particles for each sample: the sampler that weighs, resamples and at last draws one.

Each of B samples becomes a group of K particles, rows b K .. b K + K - 1 of a batch of B K, that follow one stepper on
noise of their own. With log-weights l_k, at first 0, after each step

    l_k <- l_k + increment_k                                what a method says of the particle's last step,
    W = softmax(l) within the group,    ESS = 1 / sum_k W_k^2,
    if ESS < threshold K:   K children, of particle k either floor(K W_k) or one more (systematic), and l <- 0,

and at the clean end one particle of each group is drawn by W. If the increments add up to the logarithm of a density
ratio of paths, the one drawn has in the limit of many particles the law that they tilt towards, and at finite K one
that is biased, by O(1 / K) where the increments are bounded.

An increment may need the denoiser's answer at the end of a step. The stepper begins its next step with that question,
so it is asked once (`Ahead`), and K particles cost K times the calls of one sample.

Nothing depends on a sample's neighbours: the particles of a sample draw from streams that are made of its seed and
their number, and so does the resampling of its group. Particle 0 begins where the sample would have, the others at
noise of their own.

References:
    Doucet & Johansen, "A Tutorial on Particle Filtering and Smoothing: Fifteen Years Later", 2009, section 3.4
    (resampling and effective sample size).
    Kitagawa, "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models", 1996 (systematic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from diffusion_lab.rng import SampleRNG, derive_seed
from diffusion_lab.samplers.base import BoundDenoiser, Sampler, State, Stepper, check_grid
from diffusion_lab.typing import SEED, Cond, DenoiserFn, OnStep


def effective_size(log_weights: Tensor) -> Tensor:
    """Return the effective number of particles `(B,)`, in [1, K], for log-weights `(B, K)`."""
    return 1.0 / torch.softmax(log_weights, dim=1).square().sum(1)


def systematic(log_weights: Tensor, u: Tensor, n: int) -> Tensor:
    """Draw `n` particles of each group by weight with one uniform number: each n W times, rounded up or down.

    Args:
        log_weights: `(B, K)`, float64.
        u: Uniform numbers in [0, 1), `(B,)`.
        n: How many to draw; one is drawn plainly by weight.

    Returns:
        Indices `(B, n)` in 0 .. K - 1, in ascending order.
    """
    ends = torch.softmax(log_weights, dim=1).cumsum(1)
    at = (u[:, None] + torch.arange(n, dtype=u.dtype)) / n
    # an index is the number of particles that end before; the sum may fall short of 1 by its rounding
    chosen = torch.searchsorted(ends.contiguous(), at.contiguous(), right=True)
    return chosen.clamp(max=log_weights.shape[1] - 1)


class Ahead(BoundDenoiser):
    """A bound denoiser that can be asked what the next step will begin by asking."""

    def __init__(self, denoiser: DenoiserFn, cond: Cond | None) -> None:
        super().__init__(denoiser, cond)
        self._x: Tensor | None = None
        self._logsnr = self._answer = torch.empty(0)

    def ask(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Return E[x0 | x], and keep it for whoever calls with this very tensor next."""
        self._answer = super().__call__(x, logsnr)
        self._x, self._logsnr = x, logsnr
        return self._answer

    def take(self, x: Tensor, rows: Tensor) -> None:
        """Let `x` stand for the rows `rows` of what was asked about."""
        if self._x is not None:
            self._x, self._answer = x, self._answer[rows.to(x.device)]

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x] under the bound conditions (`cond` is ignored)."""
        if x is self._x and bool((logsnr == self._logsnr).all()):
            self.last = self._answer
            return self._answer
        return super().__call__(x, logsnr)


class Weigher(Protocol):
    """What a particle method says of each step; made anew for each run, with a memory for each particle."""

    def start(self, denoiser: Ahead, x: Tensor, logsnr: Tensor) -> None:
        """See the particles `(rows, *D)` where they begin."""
        ...

    def weigh(
        self, denoiser: Ahead, x: Tensor, logsnr: Tensor, logsnr_next: Tensor, due: bool
    ) -> Tensor | None:
        """Return log-weights of the step just made, `(rows,)`, or None for none.

        Args:
            denoiser: To ask about `x`; not at the clean end.
            x: Particles at `logsnr_next`.
            logsnr: Where the step came from.
            logsnr_next: Present level; +inf at the clean end.
            due: Whether the weights are to be used now.
        """
        ...

    def take(self, rows: Tensor) -> None:
        """Let the particles be the rows `rows` of what they were."""
        ...


Begin = Callable[[DenoiserFn, Cond | None], tuple[DenoiserFn, Weigher]]
"""From a denoiser, and the particles' conditions, to the denoiser that the stepper follows and one run's weigher."""


@dataclass(frozen=True, kw_only=True)
class ParticleSampler:
    """A stochastic stepper followed by K particles for each sample.

    Attributes:
        stepper: The stepper.
        begin: The method's weights.
        particles: K; 1 is the stepper alone.
        every: Resampling is considered after every so many steps.
        ess_threshold: Resample where the effective number of particles is below this part of K; 0 never, 1 wherever
            their weights differ.
    """

    stepper: Stepper
    begin: Begin
    particles: int
    every: int
    ess_threshold: float

    stochastic = True

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
        """Follow the grid from noise to samples `(B, *D)`. See `Stepper.__call__`.

        `on_step` sees the particle of the largest weight of each sample, and at the end the one that was drawn.

        Raises:
            ValueError: If the grid is malformed, `rng` is missing, a guidance remembers its last evaluation, or a
                weight is not finite.
        """
        if rng is None:
            raise ValueError("particles draw noise: give them rng=SampleRNG(seeds)")
        B, K = len(x), self.particles
        if K == 1:
            return self.stepper(self.begin(denoiser, cond)[0], x, grid, cond=cond, rng=rng, on_step=on_step)
        streams = SampleRNG([derive_seed("particle", s, k) % 2**32 for s in rng.seeds for k in range(K)])
        chooser = SampleRNG([derive_seed("resampling", s) % 2**32 for s in rng.seeds])
        levels = check_grid(grid).unbind(0)
        cond = _spread(cond, K, streams)
        followed, weigher = self.begin(denoiser, cond)
        _refuse_memory(followed)
        ahead, state = Ahead(followed, cond), None
        x = self._start(ahead, x, levels[0], streams)
        weigher.start(ahead, x, levels[0])
        log_weights = torch.zeros(B, K, dtype=torch.float64)
        for index, (logsnr, logsnr_next) in enumerate(pairwise(levels)):
            x, state = self.stepper.step(ahead, x, logsnr, logsnr_next, state, streams)
            answer = ahead.last
            assert answer is not None
            last = bool(torch.isposinf(logsnr_next))
            due = last or (index + 1) % self.every == 0
            increment = weigher.weigh(ahead, x, logsnr, logsnr_next, due)
            if increment is not None:
                log_weights = log_weights + _finite(increment).reshape(B, K)
            if last:
                drawn = systematic(log_weights, chooser.rand((), torch.float64), 1)[:, 0]
                rows = drawn + K * torch.arange(B)
                x, answer = x[rows.to(x.device)], answer[rows.to(x.device)]
                if on_step is not None:
                    on_step(index, logsnr_next, x, answer)
                return x
            if on_step is not None:
                best = (log_weights.argmax(1) + K * torch.arange(B)).to(x.device)
                on_step(index, logsnr_next, x[best], answer[best])
            if due:
                log_weights, parents = self._resample(log_weights, chooser)
                if parents is not None:
                    x, state = x[parents.to(x.device)], _taken(state, parents)
                    ahead.take(x, parents)
                    weigher.take(parents)
        raise AssertionError("a grid ends at +inf")

    def _start(self, ahead: Ahead, x: Tensor, logsnr: Tensor, streams: SampleRNG) -> Tensor:
        """Return the particles' starts `(B K, *D)`: each sample's own, and noise for its other particles."""
        out = x.repeat_interleave(self.particles, dim=0)
        noise = ahead.interpolant(logsnr)[1] * streams.randn_like(out)
        noise[:: self.particles] = x
        return noise

    def _resample(self, log_weights: Tensor, chooser: SampleRNG) -> tuple[Tensor, Tensor | None]:
        """Return new log-weights, and the rows that the particles come from, or None where all stay."""
        B, K = log_weights.shape
        u = chooser.rand((), torch.float64)
        # equal weights are left alone, by more than their rounding
        needy = effective_size(log_weights) < self.ess_threshold * K * (1 - 1e-9)
        if not bool(needy.any()):
            return log_weights, None
        parents = torch.where(needy[:, None], systematic(log_weights, u, K), torch.arange(K))
        rows = (parents + K * torch.arange(B)[:, None]).reshape(-1)
        return torch.where(needy[:, None], 0.0, log_weights), rows


def check_particles(
    sampler: Sampler, particles: int, every: int, ess_threshold: float, method: str
) -> Stepper:
    """Return `sampler`, which must be a stochastic stepper.

    Raises:
        ValueError: If it is not, or a number is out of its range.
    """
    if not (particles >= 1 and every >= 1 and 0.0 <= ess_threshold <= 1.0):
        raise ValueError(
            f"{method} needs particles >= 1, every >= 1 and ess_threshold in [0, 1], got {particles}, {every} and "
            f"{ess_threshold}"
        )
    if not isinstance(sampler, Stepper) or not (sampler.stochastic or particles == 1):
        raise ValueError(
            f"{method} needs a sampler made of steps that draw noise, or copies of a particle would never part, and "
            f"{type(sampler).__name__} is none as it is set: take ddpm"
        )
    return sampler


def _refuse_memory(denoiser: DenoiserFn) -> None:
    """Raise a ValueError if a guidance remembers its last evaluation, whose rows would not follow the particles."""
    # a wrapper holds what it wraps under a name of its own; a list that grows while it is read
    parts = [denoiser]
    for part in parts:
        word = getattr(part, "remembers", "")
        if word and getattr(part, word):
            raise ValueError(
                f"particles are moved about, which the {word} of {type(part).__name__} would not follow: set {word}=0"
            )
        for inner in vars(part).values() if hasattr(part, "__dict__") else ():
            if isinstance(inner, DenoiserFn) and not any(inner is known for known in parts):
                parts.append(inner)


def _spread(cond: Cond | None, K: int, streams: SampleRNG) -> Cond | None:
    """Return the conditions of the particles; what their guidances draw is their own."""
    if cond is None:
        return None
    out = {name: value.repeat_interleave(K, dim=0) for name, value in cond.items()}
    if SEED in out:
        out[SEED] = torch.tensor(streams.seeds, dtype=out[SEED].dtype, device=out[SEED].device)
    return out


def _taken(state: State, rows: Tensor) -> State:
    """Return a stepper's memory with the rows `rows` of each tensor of a batch; levels are 0-d and stay."""
    if isinstance(state, Tensor):
        return state[rows.to(state.device)] if state.ndim and len(state) == len(rows) else state
    if isinstance(state, tuple | list):
        return type(state)(_taken(part, rows) for part in state)
    return state


def _finite(increment: Tensor) -> Tensor:
    """Return log-weights as float64 on the CPU, where particles are counted."""
    increment = increment.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(increment).all()):
        raise ValueError(
            "the weight of a particle is not finite: look at the reward, or at the guidance scale"
        )
    return increment
