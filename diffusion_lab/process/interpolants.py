r"""Interpolants: how a log-SNR becomes the two coefficients of x = alpha x0 + sigma eps.

With l = log(alpha^2 / sigma^2), each interpolant fixes one more relation between alpha and sigma:

    variance preserving    alpha^2 + sigma^2 = 1     alpha = sqrt(sigmoid(l)),   sigma = sqrt(sigmoid(-l))
    variance exploding     alpha = 1                 sigma = exp(-l / 2)
    rectified flow         alpha + sigma = 1         alpha = sigmoid(l / 2),     sigma = sigmoid(-l / 2)

They are the same process up to a rescaling of x, so a sampler written in terms of alpha and sigma gives the same images
in all three. All are exact at l = +inf (alpha = 1, sigma = 0); at l = -inf the first and the last give (0, 1) and the
exploding one gives (1, inf).

References:
    Kingma et al., "Variational Diffusion Models", 2021 (log-SNR as the coordinate, equivalence of processes).
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021 (VP and VE).
    Liu et al., "Flow Straight and Fast", 2022 (rectified flow).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Interpolant(Protocol):
    """A map from log-SNR to (alpha, sigma)."""

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(alpha, sigma)`, each of the shape of `logsnr` and at least float32."""
        ...


def _at_least_float32(logsnr: Tensor) -> Tensor:
    # half precision cannot hold sigma^2 = sigmoid(-13); the coefficients are few, so exactness is free
    return logsnr if logsnr.dtype in (torch.float32, torch.float64) else logsnr.float()


def _sigmoid(logsnr: Tensor) -> Tensor:
    # torch.sigmoid rounds the end of a vector otherwise than its middle (2.13, CPU), so that a sample's coefficients
    # would depend on its place in the batch; exp does not
    return 1.0 / (1.0 + torch.exp(-logsnr))


@dataclass(frozen=True, kw_only=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1: the DDPM and VDM process."""

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(sqrt(sigmoid(logsnr)), sqrt(sigmoid(-logsnr)))`."""
        logsnr = _at_least_float32(logsnr)
        return _sigmoid(logsnr).sqrt(), _sigmoid(-logsnr).sqrt()


@dataclass(frozen=True, kw_only=True)
class VarianceExploding:
    """alpha = 1: the NCSN, score-SDE VE and EDM process, in which sigma is the noise-to-signal ratio."""

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(1, exp(-logsnr / 2))`."""
        logsnr = _at_least_float32(logsnr)
        return torch.ones_like(logsnr), torch.exp(-0.5 * logsnr)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """alpha + sigma = 1: straight lines between data and noise; sigma is the flow's time."""

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(sigmoid(logsnr / 2), sigmoid(-logsnr / 2))`."""
        logsnr = _at_least_float32(logsnr)
        return _sigmoid(0.5 * logsnr), _sigmoid(-0.5 * logsnr)


class Remembering:
    """An interpolant for which what depends on the levels of a grid alone is computed only once.

    A sampler asks for each level of its grid several times, for every batch anew, and a dozen operations on single
    numbers take as long as a step of a small image. What is remembered: float64 levels on the CPU, as grids have them.

    Args:
        interpolant: The interpolant; with one that cannot be hashed nothing is remembered.
    """

    def __init__(self, interpolant: Interpolant) -> None:
        self.interpolant: Any = interpolant
        try:
            hash(interpolant)
        except TypeError:
            self.able = False
        else:
            self.able = True

    def __call__(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(alpha, sigma)`, which must not be changed in place."""
        return at_levels(_call, self, logsnr)


def _call(interpolant: Interpolant, logsnr: Tensor) -> tuple[Tensor, ...]:
    return interpolant(logsnr)


@lru_cache(maxsize=16384)
def _at_levels(function: Any, interpolant: Any, *levels: float) -> tuple[Tensor, ...]:
    return function(interpolant, *(torch.tensor(level, dtype=torch.float64) for level in levels))


def at_levels(
    function: Callable[..., tuple[Tensor, ...]], interpolant: Interpolant, *levels: Tensor
) -> tuple[Any, ...]:
    """Return `function(interpolant, *levels)`; from memory where `interpolant` is a `Remembering` one.

    Args:
        function: A plain function `(interpolant, *levels) -> coefficients` of the levels alone.
        interpolant: The interpolant.
        levels: Log-SNRs.
    """
    if not isinstance(interpolant, Remembering):
        return function(interpolant, *levels)
    if interpolant.able and all(
        level.ndim == 0 and level.dtype == torch.float64 and level.device.type == "cpu" for level in levels
    ):
        return _at_levels(function, interpolant.interpolant, *(float(level) for level in levels))
    return function(interpolant.interpolant, *levels)
