r"""What a sampler is, and the loop that most samplers share.

    x at grid[0]  --step-->  x at grid[1]  --step--> ... --step-->  x at grid[N] = +inf, which is x0

A grid is a 1-D tensor of log-SNRs, float64, on the CPU, increasing, ending at +inf, where alpha = 1 and sigma = 0
exactly: the last step therefore returns the denoiser's output. `grids/` makes them. Because the levels stay on the
CPU, their coefficients are computed in float64 and multiply a tensor of any device without synchronisation.

A `Stepper` is a sampler written as one step. Its state (earlier outputs of a multistep method) is handed from step to
step and never stored in the object, so one object may serve many trajectories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import expand_logsnr
from diffusion_lab.process.interpolants import Interpolant, Remembering
from diffusion_lab.rng import SampleRNG
from diffusion_lab.typing import Cond, DenoiserFn, OnStep, conditional_of

State = Any
"""What a stepper hands to its next step; None at the first."""


@runtime_checkable
class Sampler(Protocol):
    """Anything that turns noise at `grid[0]` into a sample."""

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
        """Return samples of the shape of `x`. See `Stepper.__call__`."""
        ...


class BoundDenoiser:
    """A denoiser with its conditions bound, which takes the 0-d levels of a grid and remembers its last output."""

    def __init__(self, denoiser: DenoiserFn, cond: Cond | None) -> None:
        self.interpolant: Interpolant = Remembering(denoiser.interpolant)
        self._denoiser, self._cond = denoiser, cond
        inner = conditional_of(denoiser)
        self.conditional: BoundDenoiser | None = None if inner is denoiser else BoundDenoiser(inner, cond)
        """The denoiser below guidance and modifiers, bound likewise; None where there is none of them."""
        self.last: Tensor | None = None

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return E[x0 | x] under the bound conditions (`cond` is ignored)."""
        self.last = self._denoiser(x, expand_logsnr(logsnr, x), self._cond)
        return self.last

    def with_variance(self, x: Tensor, logsnr: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return E[x0 | x] and the learned interpolation of the reverse variance, or None twice without one."""
        ask = getattr(self._denoiser, "with_variance", None)
        if ask is None:
            return None, None
        self.last, c = ask(x, expand_logsnr(logsnr, x), self._cond)
        return self.last, c


def check_grid(grid: Tensor) -> Tensor:
    """Return `grid` as float64 on the CPU.

    Raises:
        ValueError: If it has fewer than two levels, does not increase, or does not end at +inf.
    """
    grid = grid.detach().to(device="cpu", dtype=torch.float64)
    if grid.shape[0] < 2 or not bool((grid[1:] > grid[:-1]).all()):
        raise ValueError(
            "a sampling grid needs at least two log-SNRs, strictly increasing from noise to data"
        )
    if not bool(torch.isposinf(grid[-1]).all()):
        raise ValueError("a sampling grid must end at +inf, where the sample is clean")
    return grid


def check_rng(sampler: object, rng: SampleRNG | None) -> None:
    """Refuse to draw noise without streams to draw it from.

    Raises:
        ValueError: If there is no `rng`; names the sampler.
    """
    if rng is None:
        raise ValueError(f"{type(sampler).__name__} draws noise: give it rng=SampleRNG(seeds)")


class Stepper(ABC):
    """A sampler that is one step, repeated along the grid."""

    stochastic: bool = False

    @abstractmethod
    def step(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        state: State,
        rng: SampleRNG | None,
    ) -> tuple[Tensor, State]:
        """Move `x` from `logsnr` to the cleaner `logsnr_next`.

        Args:
            denoiser: Callable `(x, logsnr) -> E[x0 | x]`, conditions bound.
            x: Noisy samples `(B, *D)` at `logsnr`.
            logsnr: Present level; 0-d, or with the leading axes of `x`.
            logsnr_next: Next level; +inf at the last step.
            state: What the previous step returned; None at the first.
            rng: Noise of each sample; None is legal for deterministic steppers.

        Returns:
            Samples at `logsnr_next`, and the state for the next step.
        """

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
        """Follow the grid from noise to samples.

        Args:
            denoiser: E[x0 | x], with an `interpolant`.
            x: Samples of the marginal at `grid[0]`, normally sigma(grid[0]) times standard normal noise, `(B, *D)`.
            grid: Increasing log-SNRs that end at +inf.
            cond: Conditions, handed to every call of the denoiser.
            rng: One stream of noise a sample; stochastic samplers need it.
            on_step: Called after each step as `on_step(index, logsnr, x, x0)`, with the level and samples after the
                step and the last output of the denoiser.

        Returns:
            Samples `(B, *D)`.

        Raises:
            ValueError: If the grid is malformed, or a stochastic sampler is given no `rng`.
        """
        if self.stochastic:
            check_rng(self, rng)
        bound, state = BoundDenoiser(denoiser, cond), None
        levels = check_grid(grid).unbind(0)
        for index, (logsnr, logsnr_next) in enumerate(pairwise(levels)):
            x, state = self.step(bound, x, logsnr, logsnr_next, state, rng)
            if on_step is not None:
                assert bound.last is not None
                on_step(index, logsnr_next, x, bound.last)
        return x
