r"""Predictor-corrector guidance: an unguided step, then Langevin steps on the sharpened distribution.

Classifier-free guidance follows a score that is that of no diffused distribution. It has a meaning all the same. With
gamma' = 2 gamma - 1, at each step of the grid, from logsnr to logsnr_next,

    predictor    x <- a step of the sampler on the conditional denoiser
    corrector    K times, at the new level,   x <- alpha x0' + sqrt(q) (x - alpha x0') + sqrt(1 - q) sigma z,
                 x0' = x0_uncond + gamma' (x0_cond - x0_uncond),      q = exp(size (logsnr - logsnr_next))

The corrector is Langevin dynamics towards p_t(x | c)^gamma' p_t(x)^(1 - gamma'), the gamma'-powered distribution, over
the time -sigma^2 ln(q) / 2, solved exactly for an x0' that is held. To first order in the step it is the paper's

    x <- x + e s' + sqrt(2 e) z,      e = beta dt / 2,     s' = (alpha x0' - x) / sigma^2 ,

and unlike that it cannot overshoot when steps are long; with size = 1 and x0' the predictor's own x0, DDIM and one
correction are ancestral sampling. In y = x / alpha and rho = sigma / alpha, over a step of d(rho^2) towards the data,
DDIM moves by s d(rho^2) / 2 and the corrector by s' d(rho^2) / 2 with noise of variance d(rho^2): together

    dy = [(s + s') / 2] d(rho^2) + dW,        (s + s') / 2 = s_uncond + gamma (s_cond - s_uncond),

since (1 + gamma') / 2 = gamma; here K = 1 and size = 1. So in the limit of many steps classifier-free guidance of an
SDE sampler at scale gamma *is* this guidance at `scale` = gamma; the paper's own guidance weight is gamma' (its theorem
3). More corrections bring samples nearer to the powered distribution of each level, which at the clean end is
p(x | c)^gamma' p(x)^(1 - gamma') up to a normalising constant, and so make guidance stronger.

Limits: the equivalence holds for classifier-free guidance of SDE samplers alone. At finitely many steps the two
differ by O(1 / N).

References:
    Bradley & Nakkiran, "Classifier-Free Guidance is a Predictor-Corrector", 2024, algorithm 1 and theorem 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.guidance.classifier_free import ClassifierFree
from diffusion_lab.guidance.interval import EVERYWHERE, Interval
from diffusion_lab.guidance.unguided import unguided
from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.process.gaussian import coefficients
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import BoundDenoiser, Sampler, State, Stepper, check_grid
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, OnStep


@dataclass(frozen=True, kw_only=True)
class PredictorCorrectorGuidance:
    """Guidance by Langevin corrections. A step costs the sampler's calls and `2 steps` more; the last step none more.

    It is for a sampler that is a `Stepper`. One that remembers earlier answers begins afresh after each correction,
    since those belong to another x.

    Attributes:
        scale: gamma, the scale of the classifier-free guidance that one correction a step amounts to; the corrector's
            own is 2 gamma - 1. At 1 corrections are towards p_t(x | c) and cost one call.
        steps: K, corrections after each step; 0 is the sampler alone.
        size: Length of a correction; 1 is the paper's.
        interval: `(low, high)`: correct at levels low <= logsnr <= high, and call nothing for it elsewhere.
        inner: A guidance of predictor and corrector alike.
        batched: Whether both answers come from one call, which needs the memory of both.

    Raises:
        ValueError: If `steps` is negative, `size` is not positive, or the interval is not ordered.
    """

    scale: float
    steps: int = 1
    size: float = 1.0
    interval: Sequence[float] = EVERYWHERE
    inner: GuidanceFactory = unguided
    batched: bool = True

    takes_modifiers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.steps >= 0 and self.size > 0.0):
            raise ValueError(
                f"predictor-corrector guidance needs steps >= 0 and size > 0, got {self.steps} and {self.size}"
            )
        Interval(self.interval)

    def __call__(self, denoiser: DenoiserFn) -> DenoiserFn:
        """Return the denoiser of the predictor; the corrector guides its answers."""
        return self.inner(denoiser)

    def around(self, sampler: Sampler) -> Sampler:
        """Return `sampler` with corrections.

        Raises:
            ValueError: If it does not go along the grid step by step.
        """
        if not isinstance(sampler, Stepper):
            raise ValueError(
                f"predictor-corrector guidance needs a sampler made of steps, and {type(sampler).__name__} is none: "
                "take ddim"
            )
        return CorrectedSampler(predictor=sampler, guidance=self)


@dataclass(frozen=True, kw_only=True)
class CorrectedSampler:
    """A stepper with Langevin corrections between its steps: what `PredictorCorrectorGuidance.around` returns.

    Attributes:
        predictor: The stepper.
        guidance: Settings of the corrections.
    """

    predictor: Stepper
    guidance: PredictorCorrectorGuidance

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.predictor.stochastic or self.guidance.steps > 0

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

        Raises:
            ValueError: If the grid is malformed, or noise is needed and `rng` is missing.
        """
        if self.stochastic and rng is None:
            raise ValueError("predictor-corrector guidance draws noise: give it rng=SampleRNG(seeds)")
        bound = BoundDenoiser(denoiser, cond)
        sharpened = ClassifierFree(denoiser, 2.0 * self.guidance.scale - 1.0, batched=self.guidance.batched)
        sharp = BoundDenoiser(sharpened, cond)
        low, high = self.guidance.interval
        state: State = None
        for index, (logsnr, logsnr_next) in enumerate(pairwise(check_grid(grid).unbind(0))):
            x, state = self.predictor.step(bound, x, logsnr, logsnr_next, state, rng)
            assert bound.last is not None
            # the clean end has no noise to correct with
            within = low <= float(logsnr_next) <= high and not bool(torch.isposinf(logsnr_next))
            for _ in range(self.guidance.steps if within else 0):
                assert rng is not None
                x, state = self.correct(sharp, x, logsnr, logsnr_next, rng), None
            if on_step is not None:
                on_step(index, logsnr_next, x, bound.last)
        return x

    def correct(
        self, sharp: DenoiserFn, x: Tensor, logsnr: Tensor, logsnr_next: Tensor, rng: SampleRNG
    ) -> Tensor:
        """Return `x` `(B, *D)` after one correction at `logsnr_next`, as long as the step from `logsnr` asks for.

        Args:
            sharp: Denoiser guided at gamma', conditions bound.
            x: Samples at `logsnr_next`.
            logsnr: Where the step came from; from -inf the correction forgets x and keeps x0'.
            logsnr_next: Present level, finite.
            rng: Noise of each sample.
        """
        alpha, sigma = coefficients(sharp.interpolant, logsnr_next, x)
        mean = alpha * sharp(x, logsnr_next)
        log_q = self.guidance.size * (logsnr - logsnr_next)
        kept, fresh = torch.exp(0.5 * log_q), torch.sqrt(-torch.expm1(log_q))
        z = rng.randn_like(x)
        return mean + broadcast_right(kept, x) * (x - mean) + broadcast_right(fresh, x) * sigma * z
