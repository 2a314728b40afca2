r"""From seeds to samples: everything that has to be fixed before a denoiser can make an image.

    noise    x = sigma(grid[0]) z,   z ~ N(0, I) from the sample's own seed
    then     x0 = sampler(modifiers(guidance(denoiser)), x, grid, cond)

The same seed gives the same image whatever its batch, since noise comes from `SampleRNG`. Two things a guidance may
say about itself: `draws = True` on its class, and each sample's seed is in `cond["seed"]`; a method `around(sampler)`,
and it is asked for the sampler to use, because it has to touch the samples and not only the denoiser's answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.typing import SEED, Cond, DenoiserFn, GuidanceFactory, OnStep


class CountingDenoiser:
    """A denoiser that counts its function evaluations (NFE).

    Args:
        denoiser: The denoiser.
        batch: Number of samples: a call with n times as many rows is n evaluations. None counts calls.
    """

    def __init__(self, denoiser: DenoiserFn, batch: int | None = None) -> None:
        self.interpolant: Interpolant = denoiser.interpolant
        self.denoiser, self.batch = denoiser, batch
        self.calls = 0

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Count, and return E[x0 | x]."""
        self.calls += 1 if self.batch is None else -(-len(x) // self.batch)
        return self.denoiser(x, logsnr, cond)

    @property
    def embed(self) -> Callable[[Cond], Cond]:
        """The denoiser's own `embed`; absent where it has none."""
        return self.denoiser.embed  # type: ignore[attr-defined, no-any-return]


def _draws(factory: object) -> bool:
    """Whether a guidance, or one it has been given to build on, draws noise."""
    if getattr(getattr(factory, "func", factory), "draws", False):
        return True
    inner = getattr(factory, "inner", None) or getattr(factory, "keywords", {}).get("inner")
    return inner is not None and _draws(inner)


class BlankDenoiser:
    """A denoiser that answers zero, in a way that can be differentiated: for counting calls without a network.

    Args:
        interpolant: The process.
    """

    def __init__(self, interpolant: Interpolant) -> None:
        self.interpolant = interpolant

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return zeros of the shape of `x`."""
        return torch.zeros_like(x) * x

    def embed(self, cond: Cond) -> Cond:
        """Return `cond`: there is no network that would make vectors of labels."""
        return cond


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
        if _draws(self.guidance):
            cond = {**(cond or {}), SEED: torch.tensor(list(seeds), dtype=torch.int64, device=device)}
        around = getattr(self.guidance, "around", None)
        sampler = self.sampler if around is None else around(self.sampler)
        _, sigma = denoiser.interpolant(self.grid[0])
        if not math.isfinite(float(sigma)):
            raise ValueError(
                "this grid starts at logsnr = -inf, where the variance-exploding process has no samples"
            )
        x = sigma * rng.randn(self.shape, device=device)
        return sampler(self.wrapped(denoiser), x, self.grid, cond=cond, rng=rng, on_step=on_step)

    def nfe(self, interpolant: Interpolant, cond: Cond | None = None) -> int:
        """Return the number of denoiser calls one sample costs, counted on a run with a denoiser that answers zero."""
        counting = CountingDenoiser(BlankDenoiser(interpolant), batch=1)
        self(counting, seeds=[0], cond=cond)
        return counting.calls
