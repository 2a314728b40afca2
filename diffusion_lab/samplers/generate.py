r"""From seeds to samples: everything that has to be fixed before a denoiser can make an image.

    noise    x = sigma(grid[0]) z,   z ~ N(0, I) from the sample's own seed
    then     x0 = sampler(modifiers(guidance(denoiser)), x, grid, cond)

The same seed gives the same image whatever its batch, since noise comes from `SampleRNG`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.typing import Cond, DenoiserFn, GuidanceFactory, OnStep


class CountingDenoiser:
    """A denoiser that counts how often it is called: the true number of function evaluations (NFE)."""

    def __init__(self, denoiser: DenoiserFn) -> None:
        self.interpolant: Interpolant = denoiser.interpolant
        self.denoiser = denoiser
        self.calls = 0

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Count, and return E[x0 | x]."""
        self.calls += 1
        return self.denoiser(x, logsnr, cond)


class _Blank:
    """A denoiser that answers zero, for counting calls without a network."""

    def __init__(self, interpolant: Interpolant) -> None:
        self.interpolant = interpolant

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A recipe for samples: sampler, grid, guidance with what modifies it, and the shape of one sample.

    Attributes:
        sampler: The sampler.
        grid: Increasing log-SNRs that end at +inf.
        guidance: Wraps the denoiser; `Unguided` leaves it alone.
        shape: Shape of one sample, e.g. (1, 8, 8).
        modifiers: Wrap the guided denoiser in this order, e.g. thresholding; a mapping's values stand in its order.

    Raises:
        ValueError: If the grid is one that has yet to be fitted to a model.
    """

    sampler: Sampler
    grid: Tensor
    guidance: GuidanceFactory
    shape: Sequence[int]
    modifiers: Mapping[str, GuidanceFactory] | Sequence[GuidanceFactory] = ()

    def __post_init__(self) -> None:
        for name in ("grid", "sampler"):
            part = getattr(self, name)
            if hasattr(part, "fit") and not getattr(part, "fitted", False):
                raise ValueError(
                    f"{name}: {type(part).__name__} is fitted to a trained model: name it to sample.py"
                )

    def wrapped(self, denoiser: DenoiserFn) -> DenoiserFn:
        """Return `denoiser` under guidance and modifiers."""
        denoiser = self.guidance(denoiser)
        modifiers = self.modifiers.values() if isinstance(self.modifiers, Mapping) else self.modifiers
        for modifier in modifiers:
            denoiser = modifier(denoiser)
        return denoiser

    def __call__(
        self,
        denoiser: DenoiserFn,
        *,
        seeds: Sequence[int],
        cond: Cond | None = None,
        device: torch.device | str = "cpu",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return samples `(len(seeds), *shape)`, float32, images in about [-1, 1] and not clipped.

        Args:
            denoiser: E[x0 | x].
            seeds: One seed a sample.
            cond: Conditions of the batch, on `device`.
            device: Where to sample.
            on_step: See `Stepper.__call__`.

        Raises:
            ValueError: If the grid starts where the process has infinite noise.
        """
        rng = SampleRNG(seeds)
        _, sigma = denoiser.interpolant(self.grid[0])
        if not math.isfinite(float(sigma)):
            raise ValueError(
                "this grid starts at logsnr = -inf, where the variance-exploding process has no samples"
            )
        x = sigma * rng.randn(self.shape, device=device)
        return self.sampler(self.wrapped(denoiser), x, self.grid, cond=cond, rng=rng, on_step=on_step)

    def nfe(self, interpolant: Interpolant, cond: Cond | None = None) -> int:
        """Return the number of denoiser calls one sample costs, counted on a run with a denoiser that answers zero."""
        counting = CountingDenoiser(_Blank(interpolant))
        self(counting, seeds=[0], cond=cond)
        return counting.calls
