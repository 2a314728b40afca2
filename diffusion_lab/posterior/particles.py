r"""Particles steered by a reward: resampling towards what any function r(x0) of clean samples prefers.

Of each sample's K particles those whose x0_hat earns more are copied while they are still noisy (`resampling.py`). The
law aimed at is

    p(x0) exp(scale r(x0)) / Z,

p being the sampler's own. With r_i the reward of the i-th x0_hat looked at, and r_n = r(x0) of the finished sample, the
logarithms of the potentials, by which particles are weighed, are

    difference    scale (r_i - r_(i-1)),  r_0 = 0        a step forward counts, a step back counts against
    max           scale max_(j <= i) r_j                 having been good once counts, at each look
    sum           scale sum_(j <= i) r_j                 having been good long counts, at each look

with, at the end, whatever makes all of them add up to scale r(x0): so the law in the limit of many particles is the
same. At few particles it is not. "difference" stays between p and the tilted law for most of the way: on N(0, 1) with
r = x and scale 1.5 the mean is 0.44 short of 1.5 at K = 4 and 0.14 at K = 16. "max" and "sum" count a reward again at
each look and overshoot, the more the more particles there are to choose from: with scale 1 and 9 looks the mean 1
becomes 1.4 and 2.8 at K = 64, since what the last potential would prefer has died out by then. They search; to sample,
take "difference".

With r = log p(y | x0) and scale = 1 the law is the posterior. Soft values, log E[exp(scale r(x0)) | x], are here
approximated by scale r(x0_hat), which costs variance, not exactness.

The reward need not be differentiable; x0_hat costs no call beyond those of the sampler, which runs K times. The reward
also sees the conditions, those meant for wrappers included. In many dimensions, or with a sharp reward, one particle
soon outweighs all: samples then are copies of few starts, and the law is far from the one aimed at.

References:
    Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models", 2025, section 3
    (potentials; lambda is `scale`).
    Li et al., "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding",
    2024 (x0_hat's reward as the soft value; it keeps one child of one particle at each step, where this keeps K).
    Wu et al., "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models", 2023 (why weights that add
    up are exact in the limit).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.guidance.unguided import unguided
from diffusion_lab.posterior.resampling import Ahead, ParticleSampler, Weigher, check_particles
from diffusion_lab.rewards.base import Reward
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory

POTENTIALS = ("difference", "max", "sum")


@dataclass(frozen=True, kw_only=True)
class Particles:
    """Steering by a reward. It costs K times the sampler's calls, in batches K times as large.

    It is for a sampler that is a `Stepper` and draws noise. One that does not begin a step by asking about x itself,
    such as EDM's with churn, costs one call more after each look.

    Attributes:
        reward: r.
        particles: K; 1 is the sampler alone.
        potential: "difference", "max" or "sum".
        scale: lambda, how much a unit of reward is worth; 0 leaves the law alone.
        every: Look at the rewards after every so many steps, and at the end.
        ess_threshold: Resample where the effective number of particles is below this part of K; 0 never, 1 wherever
            their weights differ.
        inner: A guidance of the denoiser that the particles follow.

    Raises:
        ValueError: If the potential is unknown or a number out of its range.
    """

    reward: Reward
    particles: int = 4
    potential: str = "difference"
    scale: float = 1.0
    every: int = 1
    ess_threshold: float = 0.5
    inner: GuidanceFactory = unguided

    def __post_init__(self) -> None:
        if self.potential not in POTENTIALS:
            raise ValueError(f"Particles knows the potentials {', '.join(POTENTIALS)}, got {self.potential}")

    def __call__(self, denoiser: DenoiserFn) -> DenoiserFn:
        """Return the denoiser that the particles follow."""
        return self.inner(denoiser)

    def around(self, sampler: Sampler) -> Sampler:
        """Return `sampler` with particles.

        Raises:
            ValueError: If it does not go step by step, draws no noise, or a number is out of its range.
        """
        stepper = check_particles(sampler, self.particles, self.every, self.ess_threshold, "Particles")

        def begin(denoiser: DenoiserFn, cond: Cond | None) -> tuple[DenoiserFn, Weigher]:
            return denoiser, RewardWeights(self.reward, self.potential, self.scale, cond)

        return ParticleSampler(
            stepper=stepper,
            begin=begin,
            particles=self.particles,
            every=self.every,
            ess_threshold=self.ess_threshold,
        )


class RewardWeights:
    """The potentials of one run; see the module.

    Args:
        reward: r.
        potential: One of `POTENTIALS`.
        scale: lambda.
        cond: The particles' conditions.
    """

    def __init__(self, reward: Reward, potential: str, scale: float, cond: Cond | None) -> None:
        self.reward, self.potential, self.scale, self.cond = reward, potential, scale, cond
        # of each particle's path: the logarithm of the product of its potentials, and the running maximum or sum
        self.path = torch.zeros((), dtype=torch.float64)
        self.memory = torch.tensor(-torch.inf if potential == "max" else 0.0, dtype=torch.float64)

    def start(self, denoiser: Ahead, x: Tensor, logsnr: Tensor) -> None:
        """See `Weigher.start`."""

    def weigh(
        self, denoiser: Ahead, x: Tensor, logsnr: Tensor, logsnr_next: Tensor, due: bool
    ) -> Tensor | None:
        """See `Weigher.weigh`."""
        if not due:
            return None
        last = bool(torch.isposinf(logsnr_next))
        x0 = x if last else denoiser.ask(x, logsnr_next)
        r = self.reward(x0, self.cond)
        if r.shape != x.shape[:1]:
            raise ValueError(
                f"a reward of {len(x)} samples must have shape ({len(x)},), got {tuple(r.shape)}"
            )
        r = r.detach().to(device="cpu", dtype=torch.float64)
        if last or self.potential == "difference":
            path = self.scale * r
        else:
            self.memory = torch.maximum(self.memory, r) if self.potential == "max" else self.memory + r
            path = self.path + self.scale * self.memory
        increment, self.path = path - self.path, path
        return increment

    def take(self, rows: Tensor) -> None:
        """See `Weigher.take`."""
        self.path = self.path[rows]
        if self.memory.ndim:
            self.memory = self.memory[rows]
