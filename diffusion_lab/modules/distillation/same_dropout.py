"""Two answers under the same dropout: where they are compared, chance must not tell them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lab.modules.diffusion import seed_global
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn


class SameDropout:
    """A denoiser that leaves dropout's generators where it found them: at the seed. Whoever is asked next has the same.

    Args:
        denoiser: Asked without gradient.
        seed: Where the generators start, before and after.
    """

    def __init__(self, denoiser: DenoiserFn, seed: int) -> None:
        self.denoiser, self.seed = denoiser, seed

    @property
    def interpolant(self) -> Interpolant:
        """The process of the denoiser."""
        return self.denoiser.interpolant

    @torch.no_grad()
    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the denoiser's x0."""
        seed_global(self.seed, x.device)
        x0 = self.denoiser(x, logsnr, cond)
        seed_global(self.seed, x.device)
        # autocast may keep its copies of the weights, made here without gradient, for a call with gradient
        # (torch 2.13 looks at the gradient by itself)
        torch.clear_autocast_cache()
        return x0
