r"""Stochastic interpolants: a bridge between two laws of data, of which neither need be noise.

    x = a source + b data + g xi,        xi ~ N(0, I),        tau in [0, 1] from source to data

    linear           a = 1 - tau,              b = tau
    trigonometric    a = cos(pi tau / 2),      b = sin(pi tau / 2)
    latent noise     g = sqrt(c tau (1 - tau)),  which vanishes at both ends

(source, data) may be drawn together, as pairs, or apart. The law of x moves with the velocity

    v(x, tau) = E[a' source + b' data + g' xi | x],          and has the score      s(x, tau) = -E[xi | x] / g,

so both are regressions, on the target in the brackets and on xi. Any epsilon(tau) >= 0 then gives a process with the
same marginals: dX = (v + epsilon s) dtau + sqrt(2 epsilon) dW (`samplers/transport.py`). v stays finite at the ends,
while g' and 1 / g do not: train on [margin, 1 - margin], and let epsilon vanish where g does.

This stands beside the log-SNR contract, not on it: a bridge has no denoiser E[x0 | x] that the samplers could use, for
x holds two unknowns besides its noise. They meet where the source is standard normal and c = 0: linear is
`RectifiedFlow` and trigonometric `VariancePreserving`, at logsnr = 2 log(b / a), and v is minus `Velocity`'s target, or
minus pi / 2 times `V`'s. So that a network of this house, which is told a log-SNR, can serve, `logsnr` gives each tau
one.

References:
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023,
        section 2 (definition, velocity, score, losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right
from diffusion_lab.typing import Cond

Field = Callable[[Tensor, Tensor, Cond | None], tuple[Tensor, Tensor | None]]
"""A bridge's model: `(x (B, *D), tau (B,), cond) -> (v, xi)`, both like x; xi may be None where there is none."""


@runtime_checkable
class BridgePath(Protocol):
    """How much of source and of data there is at tau."""

    def __call__(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(a, b)`, of the shape of `tau`: (1, 0) at 0 and (0, 1) at 1."""
        ...

    def slopes(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return their derivatives `(a', b')`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearPath:
    """a = 1 - tau, b = tau: rectified flow's, towards data."""

    def __call__(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """See `BridgePath`."""
        return 1.0 - tau, tau

    def slopes(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """See `BridgePath`."""
        return -torch.ones_like(tau), torch.ones_like(tau)


@dataclass(frozen=True, kw_only=True)
class TrigonometricPath:
    """a = cos(pi tau / 2), b = sin(pi tau / 2): keeps the variance of independent source and data."""

    def __call__(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """See `BridgePath`."""
        # sin of the complement is exactly 0 at tau = 1, where cos(pi / 2) is not
        return torch.sin(0.5 * math.pi * (1.0 - tau)), torch.sin(0.5 * math.pi * tau)

    def slopes(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """See `BridgePath`."""
        a, b = self(tau)
        return -0.5 * math.pi * b, 0.5 * math.pi * a


@dataclass(frozen=True, kw_only=True)
class StochasticInterpolant:
    """x = a source + b data + sqrt(c tau (1 - tau)) xi.

    Args:
        path: a and b.
        noise: c; 0 for a bridge without noise, which has a velocity but no score to learn.

    Raises:
        ValueError: If `noise` is negative or not finite.
    """

    path: BridgePath
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < math.inf:
            raise ValueError(f"StochasticInterpolant needs a finite noise >= 0, got {self.noise}")

    def latent(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(g, g')`; g' is infinite at both ends, unless there is no noise."""
        if self.noise == 0.0:
            return torch.zeros_like(tau), torch.zeros_like(tau)
        g = torch.sqrt(self.noise * tau * (1.0 - tau))
        return g, 0.5 * self.noise * (1.0 - 2.0 * tau) / g

    def logsnr(self, tau: Tensor) -> Tensor:
        """Return log(b^2 / (a^2 + g^2)): data against all else, for a source of unit variance; rises with tau."""
        a, b = self.path(tau)
        return 2.0 * torch.log(b) - torch.log(a**2 + self.noise * tau * (1.0 - tau))


def bridge(
    interpolant: StochasticInterpolant, source: Tensor, data: Tensor, xi: Tensor, tau: Tensor
) -> Tensor:
    """Return x at `tau`, which is 0-d or has the leading axes of `source`, `data` and `xi` `(B, *D)`."""
    a, b = interpolant.path(tau)
    g, _ = interpolant.latent(tau)
    return broadcast_right(a, source) * source + broadcast_right(b, data) * data + broadcast_right(g, xi) * xi


def velocity_target(
    interpolant: StochasticInterpolant, source: Tensor, data: Tensor, xi: Tensor, tau: Tensor
) -> Tensor:
    """Return a' source + b' data + g' xi, whose mean given x is the velocity; for tau inside (0, 1) unless g = 0."""
    a, b = interpolant.path.slopes(tau)
    _, g = interpolant.latent(tau)
    return broadcast_right(a, source) * source + broadcast_right(b, data) * data + broadcast_right(g, xi) * xi


def score_from_xi(interpolant: StochasticInterpolant, xi: Tensor, tau: Tensor) -> Tensor:
    """Return the score -xi / g of the law of x at tau inside (0, 1), from xi = E[xi | x]."""
    g, _ = interpolant.latent(tau)
    return -xi / broadcast_right(g, xi)
