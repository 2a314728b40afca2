"""Denoisers that count what they are asked, and one that answers without a network, to be counted with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond, DenoiserFn


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
