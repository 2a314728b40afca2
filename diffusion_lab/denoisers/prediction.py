r"""What a network predicts: every prediction type is one pair of coefficients.

A target is linear in data and noise, F = a x0 + b eps, and x = alpha x0 + sigma eps. Two equations, two unknowns:

    x0 = (sigma F - b x) / (sigma a - b alpha).

Subtracting the same with the true target F* gives the exchange rate between errors,

    x0_hat - x0 = sigma (F - F*) / (sigma a - b alpha),
    |eps_hat - eps|^2 = (alpha / sigma)^2 |x0_hat - x0|^2 = (alpha / (sigma a - b alpha))^2 |F - F*|^2,

so a loss is computed where it is well conditioned (F) and weighted in the unit that we state weightings in (eps).

    X0         a = 1                    b = 0                   (Both: the same, put together of two answers)
    Eps        a = 0                    b = 1
    V          a = -sigma / n           b = alpha / n           (v, n = sqrt(alpha^2 + sigma^2))
    Velocity   a = -1                   b = 1                   (d x / d s of rectified flow, s from data to noise)
    Score      a = 0                    b = -1 / sigma          (grad log q(x | x0))
    EDM        a = (1 - c_skip) / c_out b = -c_skip s / c_out   (s = sigma / alpha)

v = alpha eps - sigma x0 belongs to the variance-preserving process, where n = 1. Divided by n it depends on log-SNR
alone, so the target is the same number in every interpolant; so are all the others but the score, whose unit is that of
1 / x.

EDM's preconditioning is D = c_skip y + c_out F for y = x / alpha = x0 + s eps, with c_skip = d^2 / (s^2 + d^2),
c_out = s d / sqrt(s^2 + d^2) and d = sigma_data. Solving for F gives the row above, for any interpolant.

References:
    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, section 4 and appendix D.
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, eq. 7 and table 1.
    Liu et al., "Flow Straight and Fast", 2022 (velocity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion_lab.process.broadcast import broadcast_right


@runtime_checkable
class Prediction(Protocol):
    """A prediction type: the coefficients of F = a x0 + b eps."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(a, b)`, each of the shape of `alpha`."""
        ...


@dataclass(frozen=True, kw_only=True)
class X0:
    """The network predicts the clean data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        return torch.ones_like(alpha), torch.zeros_like(sigma)


@dataclass(frozen=True, kw_only=True)
class Both(X0):
    r"""The network predicts data and noise, in twice the channels, and x0 is put together of both.

        F = x0_hat = (sigma^2 x~ + alpha (x - sigma eps~)) / (alpha^2 + sigma^2)

    At high noise it listens to x~, at low noise to what eps~ leaves of x. From there on F is that of `X0`.

    References:
        Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, section 4.
    """

    def merge(self, answer: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return F, of the shape of `x`, for the network's answer `(B, 2 C, *)`.

        Raises:
            ValueError: If the network has not twice the channels of the data.
        """
        if answer.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"prediction=both needs a network of {2 * x.shape[1]} output channels for data of {x.shape[1]}, "
                f"this one has {answer.shape[1]}: set model.out_channels={2 * x.shape[1]}"
            )
        data, noise = answer.chunk(2, dim=1)
        square = alpha**2 + sigma**2
        of_data, of_noise = sigma**2 / square, alpha / square
        rest = x - broadcast_right(sigma, x) * noise
        return broadcast_right(of_data, x) * data + broadcast_right(of_noise, x) * rest


@dataclass(frozen=True, kw_only=True)
class Eps:
    """The network predicts the noise. Undefined at logsnr = -inf, where x holds no trace of x0."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        return torch.zeros_like(alpha), torch.ones_like(sigma)


@dataclass(frozen=True, kw_only=True)
class EpsResidual:
    """The network predicts the noise less the noisy input: at high noise there is next to nothing left to say.

    VDM's: F = eps - x / n, x / n being the input of the network at the length of the variance-preserving process,
    n = sqrt(alpha^2 + sigma^2). Undefined at logsnr = -inf, as `Eps`.

    References:
        Kingma et al., "Variational Diffusion Models", 2021, its published code.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`; 1 - sigma / n without cancellation."""
        norm = torch.sqrt(alpha**2 + sigma**2)
        return -alpha / norm, alpha**2 / (norm * (norm + sigma))


@dataclass(frozen=True, kw_only=True)
class V:
    """The network predicts the variance-preserving process's v = alpha eps - sigma x0: good at both ends."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        norm = torch.sqrt(alpha**2 + sigma**2)
        return -sigma / norm, alpha / norm


@dataclass(frozen=True, kw_only=True)
class Velocity:
    """The network predicts eps - x0, the velocity of rectified flow."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        return -torch.ones_like(alpha), torch.ones_like(sigma)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The network predicts -eps / sigma, the score of q(x | x0). Undefined at logsnr = ±inf."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`."""
        return torch.zeros_like(alpha), -1.0 / sigma


@dataclass(frozen=True, kw_only=True)
class EDM:
    """The network predicts EDM's preconditioned residual, of unit variance when the data have std `sigma_data`.

    Raises:
        ValueError: If `sigma_data` is not positive.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0.0:
            raise ValueError(f"EDM needs sigma_data > 0, got {self.sigma_data}")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See `Prediction`. With s = sigma / alpha: a = s / (d sqrt(s^2 + d^2)), b = -d / sqrt(s^2 + d^2)."""
        d = self.sigma_data
        # multiplied through by alpha, so that alpha = 0 is no special case
        norm = torch.sqrt(sigma**2 + (alpha * d) ** 2)
        return sigma / (d * norm), -d * alpha / norm


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return F* = a x0 + b eps; `alpha` and `sigma` have the leading axes of `x0`."""
    a, b = prediction.coefficients(alpha, sigma)
    return broadcast_right(a, x0) * x0 + broadcast_right(b, x0) * eps


def x0_from(prediction: Prediction, x: Tensor, raw: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = (sigma F - b x) / (sigma a - b alpha) for the network output F = `raw`."""
    a, b = prediction.coefficients(alpha, sigma)
    determinant = sigma * a - b * alpha
    return broadcast_right(sigma / determinant, x) * raw - broadcast_right(b / determinant, x) * x


def eps_error_scale(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return s, of the shape of `alpha`, with |eps_hat - eps|^2 = s |F - F*|^2."""
    a, b = prediction.coefficients(alpha, sigma)
    return (alpha / (sigma * a - b * alpha)) ** 2
