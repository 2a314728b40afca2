r"""Two-dimensional densities with known score, for experiments whose right answer is a formula.

Each is a mixture of small isotropic Gaussians along a figure,

    q(x0) = (1/K) sum_k N(x0; m_k, s^2 I),

so density, score and denoiser are exact at every noise level (`Toy.denoiser`). Two classes each:

* `ring`: 8 modes on a circle, classes alternate;
* `grid`: 25 modes on a lattice, classes as on a chessboard;
* `moons`: two interleaved half circles, one a class;
* `spiral`: two arms, one a class.

The examples are fixed draws, apart for train and test, in about [-1, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.data.base import DataModule
from diffusion_lab.data.loader import InMemory, Source
from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.process.interpolants import Interpolant, VariancePreserving

Density = Literal["ring", "grid", "moons", "spiral"]


def modes(density: Density) -> tuple[Tensor, Tensor, float]:
    """Return means `(K, 2)`, classes `(K,)` and the common standard deviation of a density, float64.

    Raises:
        ValueError: If there is no such density.
    """
    if density == "ring":
        angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
        return 0.8 * torch.stack([angle.cos(), angle.sin()], 1), torch.arange(8) % 2, 0.05
    if density == "grid":
        side = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)
        return torch.cartesian_prod(side, side), torch.arange(25) % 2, 0.04
    s = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    if density == "moons":
        first = torch.stack([torch.cos(math.pi * s) - 0.5, torch.sin(math.pi * s) - 0.25], 1)
        arms = [0.6 * first, -0.6 * first]
    elif density == "spiral":
        radius, angle = 0.1 + 0.8 * s, 3 * math.pi * s
        first = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        arms = [first, -first]
    else:
        raise ValueError(f"there is no density {density!r}; there are ring, grid, moons and spiral")
    return torch.cat(arms), torch.arange(2).repeat_interleave(40), 0.03


class Toy(DataModule):
    """A two-dimensional density, `(2,)`, 2 classes.

    Args:
        density: Which one.
        batch_size: See `DataModule`.
        seed: See `DataModule`.
        num_workers: See `DataModule`.
        num_examples: Training examples; the test set has a fifth as many.

    Raises:
        ValueError: If there is no such density.
    """

    shape = (2,)
    num_classes = 2

    def __init__(
        self,
        *,
        density: Density,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        num_examples: int = 50_000,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        modes(density)
        self.density, self.num_examples, self.name = density, num_examples, f"toy-{density}"

    def denoiser(self, interpolant: Interpolant) -> GaussianMixtureDenoiser:
        """Return the exact denoiser of the density, with labels."""
        means, labels, std = modes(self.density)
        K = len(means)
        return GaussianMixtureDenoiser(
            means=means,
            variances=torch.full((K,), std**2, dtype=torch.float64),
            weights=torch.full((K,), 1 / K, dtype=torch.float64),
            labels=labels,
            interpolant=interpolant,
        )

    def source(self, split: str) -> Source:
        """See `DataModule.source`. The draws do not depend on the run's seed: they are the data set."""
        n, stream = (self.num_examples // 5, 1) if split == "test" else (self.num_examples, 0)
        x0, label = self.denoiser(VariancePreserving()).sample(n, torch.Generator().manual_seed(stream))
        return InMemory(x0.float(), label)
